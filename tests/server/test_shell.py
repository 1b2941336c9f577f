"""Connections and listeners over real sockets, with a service that answers when the test says so."""

import asyncio
import contextlib
import json
import socket
import struct

import pytest

from edge_runtime.server.flow_control import WriteFlow
from edge_runtime.server.limits import HttpLimits
from tests.server.fakes import fake_server, read_answer
from tests.server.test_http11 import get

LIMIT_S = 30


def run(scenario):
    async def limited():
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(limited())


def infer(text="hi", request_id="", headers="", path="/v2/models/echo/infer", more=None):
    tree = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], **(more or {})}
    body = json.dumps({**tree, "id": request_id}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


async def until(condition):
    """Let the loop run until `condition` holds; the test's own time limit bounds this."""
    while not condition():
        await asyncio.sleep(0)


def test_answers_leave_in_the_order_of_requests_and_only_when_they_are_due(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            service.gate.clear()
            writer.write(infer(request_id="slow"))
            await service.begun.acquire()
            writer.write(get("/v2/health/live") + infer(request_id="other"))
            await service.begun.acquire()
            service.gate.set()
            ids = []
            for _ in range(3):
                status, _, body = await read_answer(reader)
                assert status == 200
                ids.append(json.loads(body).get("id"))
            assert ids == ["slow", None, "other"]
            writer.close()

    run(scenario)


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_requests_of_a_peer_that_left_are_cancelled(tmp_path, way):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            if way == "tcp":
                peer = socket.create_connection(("127.0.0.1", port))
                # Close with a reset, as the system does for a process that was killed with unread data.
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                peer = socket.socket(socket.AF_UNIX)
                peer.connect(str(tmp_path / "fake.sock"))
            peer.sendall(infer() * 3)
            for _ in range(3):
                await service.begun.acquire()
            peer.close()
            await until(lambda: service.cancelled == 3)
            assert service.running == 0
            assert await server.drain(LIMIT_S)

    run(scenario)


def test_a_neighbour_is_not_cancelled_with_a_peer_that_left(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            service.gate.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            _, other = await asyncio.open_connection("127.0.0.1", port)
            writer.write(infer())
            other.write(infer())
            await service.begun.acquire()
            await service.begun.acquire()
            other.transport.abort()
            await until(lambda: service.cancelled == 1)
            service.gate.set()
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(scenario)


def test_connections_are_bounded_and_one_more_is_refused_with_an_answer(tmp_path):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(tcp_connections=2)) as (service, _, port):
            service.gate.clear()
            busy = []
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(infer())
                await service.begun.acquire()
                busy.append((reader, writer))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (503, "close")
            writer.close()
            service.gate.set()
            for reader, writer in busy:
                assert (await read_answer(reader))[0] == 200
                writer.close()

    run(scenario)


def test_pipelined_requests_are_bounded_over_a_socket(tmp_path):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(pipelined=4)) as (service, _, port):
            service.gate.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(infer() * 5)
            for _ in range(4):
                await service.begun.acquire()
            service.gate.set()
            assert [(await read_answer(reader))[0] for _ in range(5)] == [200] * 4 + [429]
            assert await reader.read() == b""
            assert len(service.calls) == 4
            writer.close()

    run(scenario)


def test_an_answer_to_a_refused_request_comes_after_those_before_it(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            service.gate.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(infer() + b"NONSENSE\r\n\r\n")
            await service.begun.acquire()
            service.gate.set()
            assert (await read_answer(reader))[0] == 200
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (400, "close")
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_what_comes_after_a_refusal_is_swallowed(tmp_path):
    """To close with unread bytes would reset the connection, and the reset may overtake the answer."""

    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            loop = asyncio.get_running_loop()
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.setblocking(False)
                await loop.sock_sendall(peer, b"NONSENSE\r\n\r\n")
                answer = b""
                while piece := await loop.sock_recv(peer, 65_536):
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 400")
                await loop.sock_sendall(peer, b"x" * (10 << 20))  # more than all buffers hold

    run(scenario)


def test_a_peer_that_asks_to_close_is_closed_after_its_answer(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(infer(headers="Connection: close\r\n"))
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "close")
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_continue_is_said_before_the_body_is_sent(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head, _, body = infer(headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(scenario)


def test_a_defect_of_a_route_is_answered_and_the_connection_goes_on(tmp_path, caplog):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            service.statistics = None
            writer.write(get("/v2/models/stats") + infer())
            assert (await read_answer(reader))[0] == 500
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(scenario)
    assert "event=request_failed" in caplog.text


@pytest.mark.parametrize(
    ("raw", "limits", "status"),
    [
        (b"GET /v2 HT", HttpLimits(header_s=0.0), 408),
        (infer()[:-1], HttpLimits(body_s=0.0), 408),
        (b"", HttpLimits(idle_s=0.0), None),
    ],
)
def test_each_phase_has_its_time_limit(tmp_path, raw, limits, status):
    async def scenario():
        async with fake_server(tmp_path, limits) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw)
            if status is None:
                assert await reader.read() == b""
            else:
                assert (await read_answer(reader))[0] == status
            writer.close()

    run(scenario)


def test_draining_finishes_what_runs_and_turns_new_peers_away(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            service.gate.clear()
            writer.write(infer())
            await service.begun.acquire()
            await server.close_ingress()
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port)
            assert not (tmp_path / "fake.sock").exists()
            assert not await server.drain(0)  # it still runs
            drained = asyncio.ensure_future(server.drain(LIMIT_S))
            await asyncio.sleep(0)
            assert not drained.done()
            service.gate.set()
            assert await drained
            status, headers, body = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "close")
            assert json.loads(body)["outputs"][0]["data"] == [2]
            with contextlib.suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()

    run(scenario)


def test_write_flow_knows_since_when_the_peer_does_not_read():
    flow = WriteFlow()
    assert not flow.is_stalled(100.0, 1.0)
    flow.pause(10.0)
    assert flow.is_paused
    assert not flow.is_stalled(11.0, 1.0)
    assert flow.is_stalled(11.1, 1.0)
    flow.resume()
    assert not flow.is_paused
    assert not flow.is_stalled(100.0, 1.0)
