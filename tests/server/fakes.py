"""A service that answers when a test says so, behind the real HTTP server: no model, no cache, no cloud."""

import asyncio
import contextlib

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
        return InferReply(model, "1", (Tensor("size", "INT64", sizes.shape, sizes),), id=request.id)

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


async def read_answer(reader):
    """One answer from a stream: (status, headers, body)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
