"""Connections and listeners over real sockets, with a service that answers when the test says so."""

import asyncio
import contextlib
import json
import socket
import struct

import pytest

from edge_runtime.server.flow_control import WriteFlow
from edge_runtime.server.http11 import State
from edge_runtime.server.limits import HttpLimits
from tests.server.fakes import LIMIT_S, ask, connect, fake_server, infer, read_answer, run, until
from tests.server.test_http11 import get

pytestmark = pytest.mark.usefixtures("both_loops")


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
            _, other = await asyncio.open_unix_connection(tmp_path / "fake.sock")
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
        async with fake_server(tmp_path, HttpLimits(connections=2)) as (service, server, port):
            service.gate.clear()
            busy = []
            for _ in range(2):
                reader, writer = await connect(port)
                writer.write(infer())
                await service.begun.acquire()
                busy.append((reader, writer))
            status, headers, body = await ask(port, infer())
            assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
            assert json.loads(body)["reason"] == "connections"
            assert server.status()["refused"] == {"connections": 1}
            # A health check is answered all the same, and its connection may go on to ask for it.
            reader, writer = await connect(port)
            writer.write(get("/v2/health/live") * 2)
            assert [(await read_answer(reader))[0] for _ in range(2)] == [200, 200]
            service.gate.set()
            for one_reader, one_writer in busy:
                assert (await read_answer(one_reader))[0] == 200
                one_writer.close()
            await until(lambda: server.status()["connections"]["tcp"] == 1)
            writer.write(infer())  # a place has become free for the spare connection
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(scenario)


def test_a_health_check_is_answered_however_many_connections_say_nothing(tmp_path):
    async def scenario():
        limits = HttpLimits(connections=3, spare_connections=2)
        async with fake_server(tmp_path, limits) as (_, _, port):
            silent = [await connect(port) for _ in range(12)]
            assert (await ask(port, get("/v2/health/live")))[0] == 200
            for reader, _ in silent[3:-2]:  # each gave way to a newer one, with an answer
                assert (await read_answer(reader))[0] == 503
                assert await reader.read() == b""
            for _, writer in silent:
                writer.close()

    run(scenario)


def test_of_idle_connections_the_one_idle_for_longest_gives_way_with_an_answer(tmp_path):
    async def scenario():
        limits = HttpLimits(connections=3, idle_before_shed_s=0.0)
        async with fake_server(tmp_path, limits) as (service, _, port):
            sending = await connect(port)
            sending[1].write(infer()[:-1])
            idle = []
            for _ in range(2):
                idle.append(await connect(port))
                idle[-1][1].write(get("/v2"))
                assert (await read_answer(idle[-1][0]))[0] == 200
            assert (await ask(port, infer()))[0] == 200
            status, headers, body = await read_answer(idle[0][0])
            assert (status, headers["connection"]) == (503, "close")
            assert json.loads(body)["reason"] == "idle_connection"
            idle[0][1].write(infer())  # too late: it was told, and what it sends now is swallowed
            assert await idle[0][0].read() == b""
            sending[1].write(infer()[-1:])  # who was sending was not idle
            assert (await read_answer(sending[0]))[0] == 200
            assert len(service.calls) == 2
            for _, writer in (*idle, sending):
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


def test_head_is_get_without_the_body(tmp_path):
    """A strict client reads a body after a HEAD as the next answer (RFC 9110, 9.3.2)."""

    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await connect(port)
            for path, status in (
                ("/v2", 200),
                ("/nowhere", 404),
                ("/v2/models/echo/infer", 405),
                ("/v2/models/no", 404),
            ):
                writer.write(get(path).replace(b"GET", b"HEAD") + get(path))
                head = await read_answer(reader, is_bodiless=True)
                got = await read_answer(reader)
                assert head[0] == got[0] == status
                assert head[1] == got[1]
                assert int(head[1]["content-length"]) == len(got[2]) > 0
            writer.write(get("/v2", "Origin: null\r\n").replace(b"GET", b"HEAD"))
            status, headers, _ = await read_answer(reader, is_bodiless=True)
            assert (status, headers["connection"]) == (403, "close")
            assert await reader.read() == b""
            writer.close()

    run(scenario)


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_peer_that_ends_its_side_gets_all_its_answers(tmp_path, way):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            service.gate.clear()
            reader, writer = await (
                connect(port) if way == "tcp" else asyncio.open_unix_connection(tmp_path / "fake.sock")
            )
            writer.write(infer(request_id="a") + infer(request_id="b"))
            writer.write_eof()
            await service.begun.acquire()
            await service.begun.acquire()
            service.gate.set()
            answers = [await read_answer(reader) for _ in range(2)]
            assert [json.loads(body)["id"] for _, _, body in answers] == ["a", "b"]
            assert [headers.get("connection") for _, headers, _ in answers] == [None, "close"]
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_a_request_that_ends_too_early_is_refused(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            reader, writer = await connect(port)
            writer.write(infer()[:-1])
            writer.write_eof()
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (400, "close")
            assert service.calls == []
            writer.close()

    run(scenario)


def test_work_for_a_peer_that_closed_is_found_out_and_cancelled(tmp_path):
    """Over TCP the end of a peer looks like a half-close until something is written to it."""

    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            peer = socket.create_connection(("127.0.0.1", port))
            peer.sendall(infer())
            await service.begun.acquire()
            peer.close()
            (connection,) = server.connections()
            await until(lambda: connection._ended_at is not None)
            assert service.cancelled == 0
            now = connection._ended_at + 2.0
            connection.check_time(
                now
            )  # writes an interim answer, which the closed socket answers with a reset
            while service.cancelled == 0:
                connection.check_time(now)
                await asyncio.sleep(0)

    run(scenario)


def test_a_half_closed_peer_that_waits_long_reads_an_interim_answer_first(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            reader, writer = await connect(port)
            writer.write(infer())
            writer.write_eof()
            await service.begun.acquire()
            (connection,) = server.connections()
            await until(lambda: connection._ended_at is not None)
            connection.check_time(connection._ended_at + 2.0)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.check_time(connection._ended_at + 4.0)
            service.gate.set()
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(scenario)


def test_a_client_of_http_1_0_is_told_that_the_connection_stays(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await connect(port)
            old = get("/v2").replace(b"HTTP/1.1", b"HTTP/1.0")
            writer.write(old.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"))
            assert (await read_answer(reader))[1]["connection"] == "keep-alive"
            writer.write(old)
            assert (await read_answer(reader))[1]["connection"] == "close"
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_large_pipelined_requests_are_taken(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            reader, writer = await connect(port)
            text = "x" * 50_000
            raw = infer(
                more={"inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "data": [text] * 3}]}
            )
            assert len(raw) > 150_000
            writer.write(raw * 5)
            for _ in range(5):
                status, _, body = await read_answer(reader)
                assert status == 200
                assert json.loads(body)["outputs"][0]["data"] == [50_000] * 3
            writer.close()

    run(scenario)


def test_continue_comes_after_the_answers_before_it(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            service.gate.clear()
            reader, writer = await connect(port)
            head, _, body = infer(request_id="b", headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
            writer.write(infer(request_id="a") + head + b"\r\n\r\n")
            await service.begun.acquire()
            service.gate.set()
            assert json.loads((await read_answer(reader))[2])["id"] == "a"
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert json.loads((await read_answer(reader))[2])["id"] == "b"
            writer.close()

    run(scenario)


def test_who_does_not_read_its_answers_may_ask_nothing_more(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.padding = b"x" * (4 << 20)
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.sendall(infer())
                await service.begun.acquire()
                (connection,) = server.connections()
                await until(lambda: connection._answers.flow.is_paused)
                peer.sendall(infer())
                for _ in range(50):
                    await asyncio.sleep(0)
                assert len(service.calls) == 1
                assert server.status()["held_bytes"] >= 4 << 20
                connection.check_time(asyncio.get_running_loop().time() + 29.0)
                assert server.connections() == [connection]
                connection.check_time(asyncio.get_running_loop().time() + 31.0)
                await until(lambda: not server.connections())
                assert server.status()["held_bytes"] == 0

    run(scenario)


def test_a_slow_reader_gets_its_answer_whole(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.padding = b"x" * (4 << 20)
            reader, writer = await connect(port)
            writer.write(infer() * 2)
            for _ in range(2):
                status, _, body = await read_answer(reader)
                assert status == 200
                assert len(json.loads(body)["outputs"][1]["data"][0]) == 4 << 20
            await until(lambda: server.status()["held_bytes"] == 0)
            writer.close()

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
    ("raw", "limit_s", "status"),
    [
        (b"GET /v2 HT", 5.0, 408),
        (infer()[:-1], 10.0, 408),  # no progress
        (b"", 75.0, None),
    ],
)
def test_each_phase_has_its_time_limit(tmp_path, raw, limit_s, status):
    async def scenario():
        async with fake_server(tmp_path) as (_, server, port):
            reader, writer = await connect(port)
            writer.write(raw)
            await until(server.connections)
            (connection,) = server.connections()
            await until(lambda: connection._machine.state is not State.IDLE or not raw)
            now = asyncio.get_running_loop().time()
            connection.check_time(now + limit_s - 1.0)
            assert not connection._is_finished
            connection.check_time(now + limit_s + 1.0)
            if status is not None:
                assert (await read_answer(reader))[0] == status
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_a_body_has_a_time_limit_however_steadily_it_comes(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, server, port):
            reader, writer = await connect(port)
            writer.write(b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
            await until(lambda: server.connections() and server.connections()[0]._incoming is not None)
            (connection,) = server.connections()
            begun = asyncio.get_running_loop().time()
            for second in range(1, 61, 5):
                writer.write(b"x" * 2048)
                await until(lambda: len(connection._incoming.body) == 2048 * (second // 5 + 1))  # noqa: B023
                connection.check_time(begun + second)
                assert not connection._is_refused
            connection.check_time(begun + 61)
            assert (await read_answer(reader))[0] == 408
            writer.close()

    run(scenario)


@pytest.mark.parametrize("limits", [HttpLimits(header_s=0.0)])
def test_the_sweep_looks_at_every_connection(tmp_path, limits):
    async def scenario():
        async with fake_server(tmp_path, limits) as (_, _, port):
            reader, writer = await connect(port)
            writer.write(b"GET /v2 HT")
            assert (await read_answer(reader))[0] == 408
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


def test_write_flow_knows_since_when_the_peer_reads_nothing():
    flow = WriteFlow()
    assert not flow.is_stalled(100.0, 10, 1.0)
    flow.pause(10.0, 500)
    assert flow.is_paused
    assert not flow.is_stalled(11.0, 500, 1.0)
    assert flow.is_stalled(11.1, 500, 1.0)
    assert not flow.is_stalled(11.2, 499, 1.0)  # slow, but not stalled
    assert not flow.is_stalled(12.2, 499, 1.0)
    assert flow.is_stalled(12.3, 499, 1.0)
    flow.resume()
    assert not flow.is_paused
    assert not flow.is_stalled(100.0, 499, 1.0)
