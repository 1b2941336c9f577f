"""Memory comes back when a connection ends, without the garbage collector, which the daemon tells to run rarely."""

import asyncio
import contextlib
import gc
import socket
import struct
import weakref

import pytest

from edge_runtime.server import shell
from edge_runtime.server.limits import HttpLimits
from tests.server.fakes import connect, fake_server, infer, read_answer, run, until
from tests.server.test_http11 import CHUNKED, MALFORMED, get

pytestmark = pytest.mark.usefixtures("both_loops")

UPLOAD = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n" + bytes(
    100_000
)
#: Requests by how they end: an upload that is given up, refusals before and after the route, answers.
ENDINGS = {
    "an upload that is given up": UPLOAD,
    "a chunked upload that is given up": CHUNKED + b"ffff\r\nabc",
    "too large": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 80000000\r\n\r\n",
    "a chunked body that is too large": CHUNKED + b"186a0\r\n" + bytes(100_000) + b"\r\n",
    "malformed": MALFORMED[-4][0],
    "not found": get("/nowhere"),
    "no such model": infer(path="/v2/models/none/infer"),
    "a body that is no JSON": b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n{",
    "a wrong input": infer(
        more={"inputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [1e39]}]}
    ),
    "an answer": infer(),
    "many answers": infer() * 5 + get("/v2") * 5,
    "a defect": get("/v2/models/stats"),
    "an upgrade": get("/v2", "Connection: Upgrade\r\nUpgrade: h2c\r\n"),
    "nothing": b"",
}


@contextlib.contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", ["reset", "close"])
def test_a_connection_is_freed_with_its_last_reference(tmp_path, ending, way, monkeypatch):
    """One reference cycle between a connection and its parser kept 7 MB for each upload that was given up."""
    alive = []
    made = shell.Connection.__init__

    def remembered(self, config):
        made(self, config)
        alive.extend([weakref.ref(self), weakref.ref(self._machine._reader), weakref.ref(self._answers)])

    monkeypatch.setattr(shell.Connection, "__init__", remembered)
    monkeypatch.setattr(shell._log, "disabled", True)  # pytest keeps log records, and with them frames

    async def scenario():
        async with fake_server(tmp_path, HttpLimits(body_bytes=8_000_000, linger_s=0.0)) as (
            service,
            server,
            port,
        ):
            service.statistics = None  # the defect
            with no_collector():
                for _ in range(3):
                    peer = socket.create_connection(("127.0.0.1", port))
                    peer.sendall(ENDINGS[ending])
                    await until(server.connections)
                    for _ in range(20):
                        await asyncio.sleep(0)
                    if way == "reset":
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    peer.close()
                    await until(lambda: not server.connections())
                    for _ in range(5):
                        await asyncio.sleep(0)
                assert alive
                assert [one() for one in alive if one() is not None] == []
                assert server.status()["held_bytes"] == 0

    run(scenario)


def test_requests_that_are_cancelled_are_freed(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, _port):
            service.gate.clear()
            with no_collector():
                _, writer = await asyncio.open_unix_connection(tmp_path / "fake.sock")
                writer.write(infer() * 3)
                for _ in range(3):
                    await service.begun.acquire()
                tasks = [
                    weakref.ref(task) for task in asyncio.all_tasks() if task.get_name() == "http-request"
                ]
                assert len(tasks) == 3
                writer.transport.abort()
                await until(lambda: service.cancelled == 3)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert [task() for task in tasks] == [None] * 3
            assert server.connections() == []

    run(scenario)


def test_requests_leave_no_cycles_behind_on_a_connection_that_stays(tmp_path):
    """The daemon spares the collector, since requests leave nothing for it."""

    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await connect(port)
            kinds = [
                infer(),
                get("/nowhere"),
                infer(path="/v2/models/none/infer"),
                infer(more={"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a"]}]}),
                infer(more={"parameters": {"timeout": -1}}),
            ]
            for raw in kinds:
                found = []
                for count in (5, 50):
                    with no_collector():
                        for _ in range(count):
                            writer.write(raw)
                            await read_answer(reader)
                        found.append(gc.collect())
                assert found[1] <= found[0] + 20, raw  # it does not grow with the requests
            writer.close()

    run(scenario)
