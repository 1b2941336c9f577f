"""A service that answers when a test says so, behind the real HTTP server: no model, no cache, no cloud."""

import asyncio
import contextlib
import json

import numpy as np

from edge_runtime.core.errors import UnknownModel
from edge_runtime.core.messages import InferReply, ModelInfo, ModelStatistics, Signature, Tensor, TensorSpec
from edge_runtime.server import start_server

INFO = ModelInfo(
    name="echo",
    version="1",
    digest="0" * 64,
    platform="fake",
    max_batch=8,
    is_batch_invariant=True,
    signature=Signature((TensorSpec("text", "BYTES", (-1,)),), (TensorSpec("size", "INT64", (-1,)),)),
    accept_threshold=None,
)


class FakeService:
    """Answers each text with its length; `gate` holds all answers back until it is set."""

    def __init__(self):
        self.is_ready = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0
        self.cancelled = 0
        self.begun = asyncio.Semaphore(0)  # released once for each request that reaches the service
        self.calls = []
        self.padding = b""  # a text that each answer brings, to make it long

    async def infer(self, model, version, request, **travel):
        self.calls.append((model, request, travel))
        self.running += 1
        self.begun.release()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        (tensor,) = request.inputs
        sizes = np.array([len(text) for text in tensor.data], np.int64)
        outputs = [Tensor("size", "INT64", sizes.shape, sizes)]
        if self.padding:
            outputs.append(Tensor("padding", "BYTES", (1,), (self.padding,)))
        return InferReply(model, "1", tuple(outputs), id=request.id)

    def models(self):
        return [INFO]

    def model(self, name, version=None):
        if name != INFO.name:
            raise UnknownModel("No such model.")
        return INFO

    def statistics(self, name):
        return ModelStatistics()


class FakeApplication:
    """What the server needs of a runtime."""

    def __init__(self):
        self.service = FakeService()

    def metrics(self):
        return b"# none\n"

    def status(self):
        return {"ready": True}


@contextlib.asynccontextmanager
async def fake_server(tmp_path, limits=None, **more):
    """A server on a loopback port and a Unix socket; yields (service, server, port)."""
    application = FakeApplication()
    server = await start_server(
        application, socket_path=tmp_path / "fake.sock", tcp=("127.0.0.1", 0), limits=limits, **more
    )
    try:
        yield application.service, server, int(server.addresses[1].rpartition(":")[2])
    finally:
        await server.close()


async def read_answer(reader, *, is_bodiless=False):
    """One answer from a stream: (status, headers, body)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
    length = 0 if is_bodiless else int(headers["content-length"])
    return int(head[0].split()[1]), headers, await reader.readexactly(length)


LIMIT_S = 30


def run(scenario):
    """Run a coroutine function on a loop of its own, with a limit."""

    async def limited():
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(limited())


async def until(condition):
    """Let the loop run until `condition` holds; the test's own time limit bounds this."""
    while not condition():
        await asyncio.sleep(0)


async def connect(port):
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(port, raw, *, is_bodiless=False):
    """Send one request on a new connection; its answer."""
    reader, writer = await connect(port)
    writer.write(raw)
    answer = await read_answer(reader, is_bodiless=is_bodiless)
    writer.close()
    return answer


def infer(text="hi", request_id="", headers="", path="/v2/models/echo/infer", more=None):
    """The bytes of an inference request for the fake service."""
    tree = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], **(more or {})}
    body = json.dumps({**tree, "id": request_id}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body
