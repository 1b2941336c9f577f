"""Shutting down: every request whose first byte came before the signal is answered, whole; later ones hear why not."""

import asyncio
import json
import socket

import pytest

from edge_runtime.server.drain import Drain
from edge_runtime.server.limits import HttpLimits
from tests.server.fakes import LIMIT_S, connect, fake_server, infer, read_answer, run, until
from tests.server.test_http11 import get

pytestmark = pytest.mark.usefixtures("both_loops")


def blocking(port):
    return socket.create_connection(("127.0.0.1", port))


def read_all(peer):
    peer.settimeout(LIMIT_S)
    answer = b""
    while piece := peer.recv(1 << 20):
        answer += piece
    return answer


def statuses(answers):
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


def test_requests_in_the_kernel_are_owed_an_answer_and_later_ones_are_not():
    drain = Drain()
    assert drain.owes_present
    assert drain.owes_more
    drain.begin(10, is_reading_one=False)
    assert not drain.owes_present
    drain.read(6, is_between=True)
    assert (drain.owes_present, drain.owes_more) == (True, True)
    drain.read(6, is_between=False)  # the rest of the same request
    assert (drain.owes_present, drain.owes_more) == (True, False)
    drain.read(5, is_between=True)
    assert not drain.owes_present
    drain = Drain()
    drain.begin(0, is_reading_one=True)
    drain.read(50, is_between=False)
    assert drain.owes_present


def test_a_request_whose_bytes_wait_in_the_kernel_is_answered(tmp_path):
    """On a connection that was never accepted, and on one that was idle: the loop has not looked at either yet."""

    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            reader, writer = await connect(port)
            writer.write(get("/v2"))
            await read_answer(reader)
            writer.write(infer(request_id="idle"))  # sent at once, while the loop stands still
            with blocking(port) as queued:
                queued.sendall(infer(request_id="queued"))
                await server.close_ingress()
                drained = asyncio.ensure_future(server.drain(LIMIT_S))
                answer = json.loads((await read_answer(reader))[2])
                assert answer["id"] == "idle"
                assert await drained
                assert b'"id":"queued"' in await asyncio.to_thread(queued.recv, 65_536)
            assert len(service.calls) == 2
            writer.close()

    run(scenario)


def test_a_body_that_is_half_sent_is_waited_for(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            reader, writer = await connect(port)
            raw = infer()
            writer.write(raw[:-5])
            await until(lambda: server.connections() and server.connections()[0]._incoming is not None)
            await server.close_ingress()
            drained = asyncio.ensure_future(server.drain(LIMIT_S))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not drained.done()
            writer.write(raw[-5:])
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (200, "close")
            assert await drained
            assert len(service.calls) == 1
            writer.close()

    run(scenario)


def test_a_request_after_the_signal_is_told_why_it_is_refused(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            reader, writer = await connect(port)
            writer.write(infer())
            await service.begun.acquire()
            await server.close_ingress()
            writer.write(infer())
            (connection,) = server.connections()
            await until(lambda: connection._is_refused)
            service.gate.set()
            assert (await read_answer(reader))[0] == 200
            status, headers, body = await read_answer(reader)
            assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
            assert json.loads(body)["reason"] == "draining"
            assert len(service.calls) == 1
            assert await server.drain(LIMIT_S)
            writer.close()

    run(scenario)


def test_idle_connections_are_told_that_they_end(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, server, port):
            idle = []
            for _ in range(40):
                idle.append(await connect(port))
                idle[-1][1].write(get("/v2"))
                await read_answer(idle[-1][0])
            await server.close_ingress()
            assert await server.drain(LIMIT_S)
            for at, (reader, writer) in enumerate(idle):
                if at % 2:
                    writer.write(infer())  # it crosses the notice, and is swallowed
                status, headers, body = await read_answer(reader)
                assert (status, headers["connection"]) == (503, "close")
                assert json.loads(body)["reason"] == "draining"
                assert await reader.read() == b""
                writer.close()

    run(scenario)


def test_an_answer_is_delivered_only_once_all_of_it_has_left(tmp_path):
    """The reader is slower than the answer; the handler has long returned."""

    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.padding = b"x" * (4 << 20)
            with blocking(port) as peer:
                peer.sendall(infer())
                await service.begun.acquire()
                (connection,) = server.connections()
                await until(lambda: connection._answers.flow.is_paused)
                await server.close_ingress()
                drained = asyncio.ensure_future(server.drain(LIMIT_S))
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not drained.done()
                answer = await asyncio.to_thread(read_all, peer)
                assert answer.count(b"x") == 4 << 20
                assert await drained

    run(scenario)


def test_what_is_not_ready_at_the_end_of_the_drain_is_answered_with_503(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            with blocking(port) as waiting, blocking(port) as uploading:
                waiting.sendall(infer() + infer())
                uploading.sendall(infer()[:-5])
                for _ in range(2):
                    await service.begun.acquire()
                await until(lambda: sum(one._incoming is not None for one in server.connections()) == 1)
                await server.close_ingress()
                assert not await server.drain(0)
                await until(lambda: service.cancelled == 2)
                for peer, expected in ((waiting, [503, 503]), (uploading, [503])):
                    answer = await asyncio.to_thread(peer.recv, 65_536)
                    assert statuses(answer) == expected
                    assert b"draining" in answer
                    assert answer.count(b"Connection: close") == 1

    run(scenario)


def test_an_answer_that_is_ready_at_the_end_of_the_drain_is_not_replaced(tmp_path):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(write_s=LIMIT_S)) as (service, server, port):
            service.padding = b"x" * (4 << 20)
            with blocking(port) as peer:
                peer.sendall(infer())
                await service.begun.acquire()
                (connection,) = server.connections()
                await until(lambda: connection._answers.flow.is_paused)
                await server.close_ingress()
                drained = asyncio.ensure_future(server.drain(0))
                answer = await asyncio.to_thread(read_all, peer)
                assert statuses(answer) == [200, 503]  # the second is what every idle peer hears
                assert answer.count(b"x") == 4 << 20
                await drained

    run(scenario)


def test_a_draining_daemon_is_alive_and_not_ready(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            reader, writer = await connect(port)
            writer.write(infer())
            await service.begun.acquire()
            await server.close_ingress()
            writer.write(get("/v2/health/live") + get("/v2/health/ready") + get("/status"))
            await until(lambda: server.connections()[0]._is_refused)
            service.gate.set()
            assert [(await read_answer(reader))[0] for _ in range(4)] == [200, 200, 503, 503]
            assert server.status()["draining"] is True
            writer.close()

    run(scenario)


def test_draining_twice_is_draining_once(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, server, _port):
            await server.close_ingress()
            await server.close_ingress()
            assert await server.drain(LIMIT_S)
            await server.close()
            await server.close()

    run(scenario)
