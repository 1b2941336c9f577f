"""The bytes and connections that all peers together may hold, and the tenant a peer may name: alone, then over sockets."""

import asyncio
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.server.byte_budget import SMALL_BYTES, ByteBudget, Lease
from edge_runtime.server.connection_table import SHED, TOO_MANY, ConnectionTable
from edge_runtime.server.counters import HttpCounters
from edge_runtime.server.events import Refusal
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.tenancy import Tenancy
from tests.server.fakes import ask, connect, fake_server, infer, read_answer, run, until
from tests.server.test_http11 import CHUNKED, get

BIG = 1 << 20


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 300_000))), max_size=40))
def test_the_budget_is_never_passed_and_everything_comes_back(calls):
    budget = ByteBudget(400_000)
    leases = [Lease(budget) for _ in range(6)]
    for at, size in calls:
        if size is None:
            leases[at].release()
        elif leases[at].resize(size):
            assert leases[at].size_bytes == size
        assert budget.held_bytes == sum(lease.size_bytes for lease in leases) <= budget.limit_bytes
    for lease in leases:
        lease.release()
        lease.release()
        assert not lease.resize(1)
    assert budget.held_bytes == 0


def test_uploads_leave_room_for_small_requests():
    budget = ByteBudget(4 * BIG)
    uploads = [Lease(budget) for _ in range(4)]
    assert [lease.resize(BIG) for lease in uploads] == [True, True, True, False]
    small = [Lease(budget) for _ in range(BIG // SMALL_BYTES)]
    assert all(lease.resize(SMALL_BYTES) for lease in small)
    assert not Lease(budget).resize(1)
    uploads[0].resize(0)  # to shrink always succeeds
    assert Lease(budget).resize(1)


class FakePeer:
    def __init__(self, since=0.0, *, idle=True):
        self.since, self.idle, self.refusals, self.aborted = since, idle, [], False

    def is_idle(self):
        return self.idle

    def refuse(self, refusal):
        self.refusals.append(refusal)
        self.table.ending(self)

    def abort(self):
        self.aborted = True
        self.table.lost(self)


def table_of(limit=3, spare=2):
    table = ConnectionTable(HttpLimits(connections=limit, spare_connections=spare), HttpCounters())

    def admit(peer, now=100.0):
        peer.table = table
        table.admit(peer, now)
        return peer

    return table, admit


def test_the_longest_idle_peer_gives_way_and_nobody_who_is_at_work():
    table, admit = table_of()
    working, older, newer = admit(FakePeer(1.0, idle=False)), admit(FakePeer(3.0)), admit(FakePeer(2.0))
    fourth = admit(FakePeer())
    assert newer.refusals == [SHED]
    assert working.refusals == older.refusals == fourth.refusals == []
    assert table.serve(fourth)
    assert len(table) == 4  # the one that gave way waits for its end


def test_a_peer_that_was_idle_for_a_moment_does_not_give_way():
    table, admit = table_of()
    peers = [admit(FakePeer(96.0)) for _ in range(3)]  # idle for 4 of 5 seconds
    spare = admit(FakePeer(100.0))
    assert not table.serve(spare)
    assert all(peer.refusals == [] for peer in peers)
    table.lost(peers[0])
    assert table.serve(spare)
    assert not table.serve(admit(FakePeer(100.0)))


def test_of_the_spares_the_oldest_gives_way():
    table, admit = table_of(limit=2, spare=2)
    for _ in range(2):
        admit(FakePeer(idle=False))
    spares = [admit(FakePeer(idle=False)) for _ in range(4)]
    assert [peer.refusals for peer in spares] == [[TOO_MANY], [TOO_MANY], [], []]
    assert len(table) == 6


def test_peers_that_wait_for_their_end_are_bounded():
    table, admit = table_of(limit=2)
    peers = [FakePeer() for _ in range(4)]
    for peer in peers:
        admit(peer)
        table.ending(peer)
    assert [peer.aborted for peer in peers] == [True, True, False, False]


def test_what_is_refused_is_logged_once_a_second_at_most(caplog):
    counters = HttpCounters()
    counters.log_news()
    for _ in range(1000):
        counters.count("connections")
    counters.count("buffer")
    counters.log_news()
    counters.log_news()
    assert [record.message for record in caplog.records] == ["event=http_refused connections=1000 buffer=1"]
    counters.count("buffer")
    counters.log_news()
    assert caplog.records[-1].message == "event=http_refused buffer=1"


def test_unfinished_uploads_together_stay_within_the_budget(tmp_path, both_loops):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(buffer_bytes=4 * BIG)) as (_, server, port):
            head = b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (2 * BIG)
            peers = []
            for number in range(20):
                reader, writer = await connect(port)
                writer.write((head if number % 2 else CHUNKED + b"%x\r\n" % (2 * BIG)) + b"x" * (BIG // 2))
                peers.append((reader, writer))
            await until(lambda: server.status()["refused"].get("buffer", 0) == 14)
            assert server.status()["held_bytes"] == 3 * BIG
            assert (await ask(port, infer()))[0] == 200  # a small request is served beside them
            refused = 0
            for reader, writer in peers:
                if reader._buffer:
                    status, headers, body = await read_answer(reader)
                    assert (status, headers["retry-after"]) == (503, "1")
                    assert json.loads(body)["reason"] == "buffer"
                    refused += 1
                writer.transport.abort()
            assert refused == 14
            await until(lambda: not server.connections())
            assert server.status()["held_bytes"] == 0

    run(scenario)


def test_a_body_that_can_never_fit_is_too_large_and_one_that_does_not_fit_now_is_not_asked_for(tmp_path):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(buffer_bytes=BIG)) as (_, server, port):
            head = (
                "POST /v2 HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n"
            )
            status, headers, _ = await ask(port, head.format(2 * BIG).encode())
            assert (status, headers.get("retry-after")) == (413, None)
            server._budget.held_bytes = BIG // 2
            assert (await ask(port, head.format(BIG // 2).encode()))[0] == 503
            server._budget.held_bytes = 0

    run(scenario)


def test_an_answer_that_does_not_fit_is_replaced_by_a_refusal(tmp_path, both_loops):
    async def scenario():
        async with fake_server(tmp_path, HttpLimits(buffer_bytes=BIG)) as (service, server, port):
            service.padding = b"x" * BIG
            status, headers, _ = await ask(port, infer())
            assert (status, headers["retry-after"]) == (503, "1")
            assert server.status()["held_bytes"] == 0

    run(scenario)


def test_requests_hold_their_bytes_until_they_are_answered_however_they_end(tmp_path, both_loops):
    async def scenario():
        async with fake_server(tmp_path) as (service, server, port):
            service.gate.clear()
            raw = infer("x" * 50_000)
            for _ in range(2):
                reader, writer = await connect(port)
                writer.write(raw * 4)
                for _ in range(4):
                    await service.begun.acquire()
                assert server.status()["held_bytes"] > 200_000
                if service.cancelled == 0:
                    writer.transport.abort()
                    (connection,) = server.connections()
                    connection._transport.abort()
                    await until(lambda: service.cancelled == 4)
                else:
                    service.gate.set()
                    for _ in range(4):
                        assert (await read_answer(reader))[0] == 200
                    writer.close()
                await until(lambda: server.status()["held_bytes"] == 0)

    run(scenario)


def test_refusals_and_held_bytes_are_in_the_reports(tmp_path):
    async def scenario():
        async with fake_server(tmp_path) as (_, server, port):
            await ask(port, get("/v2", "Origin: null\r\n"))
            status = json.loads((await ask(port, get("/status")))[2])["http"]
            assert status["refused"] == {"web_page": 1}
            assert status["addresses"] == server.addresses
            metrics = (await ask(port, get("/metrics")))[2].decode()
            assert 'edge_http_refused_total{reason="web_page"} 1' in metrics
            assert metrics.startswith("# none\n")

    run(scenario)


def test_a_tenant_is_named_only_where_the_operator_allows_it():
    off = Tenancy()
    assert off.is_off
    assert off.tenant_of({"x-tenant": "kitchen"}, 1000) == "local"
    named = Tenancy("x-tenant", frozenset({"kitchen", "hall"}))
    assert not named.is_off
    assert named.tenant_of({"x-tenant": "kitchen"}, None) == "kitchen"
    assert named.tenant_of({}, None) == "local"
    for name in ("garage", "", "Kitchen", "kitchen, hall", "local", "user-0"):
        refused = named.tenant_of({"x-tenant": name}, None)
        assert isinstance(refused, Refusal)
        assert refused.status == 403
    users = Tenancy("x-tenant", frozenset({"kitchen"}), by_user=True)
    assert users.tenant_of({"x-tenant": "kitchen"}, 1000) == "user-1000"  # the kernel's word, not the peer's
    assert users.tenant_of({"x-tenant": "kitchen"}, None) == "kitchen"


def test_tenant_and_flow_of_a_connection_reach_the_service(tmp_path, both_loops):
    async def scenario():
        tenancy = Tenancy("x-tenant", frozenset({"kitchen"}), by_user=True)
        async with fake_server(tmp_path, tenancy=tenancy) as (service, _, port):
            assert (await ask(port, infer(headers="X-Tenant: kitchen\r\n")))[0] == 200
            assert (await ask(port, infer(headers="X-Tenant: hall\r\n")))[0] == 403
            assert (await ask(port, infer(headers="X-Tenant: kitchen\r\nX-Tenant: kitchen\r\n")))[0] == 403
            reader, writer = await asyncio.open_unix_connection(tmp_path / "fake.sock")
            writer.write(infer(headers="X-Tenant: kitchen\r\n") * 2)
            for _ in range(2):
                assert (await read_answer(reader))[0] == 200
            writer.close()
            travels = [travel for _, _, travel in service.calls]
            user = f"user-{os.getuid()}"
            assert [travel["tenant"] for travel in travels] == ["kitchen", user, user]
            flows = [travel["flow"] for travel in travels]
            assert flows[0].startswith("tcp-")
            assert flows[1] == flows[2]
            assert flows[1].startswith("unix-")

    run(scenario)


@pytest.mark.parametrize("size", [1, 5000])
def test_memory_is_short_for_the_inflated_body_too(tmp_path, size):
    import gzip

    async def scenario():
        async with fake_server(tmp_path, HttpLimits(buffer_bytes=BIG)) as (service, server, port):
            body = gzip.compress(
                json.dumps(
                    {
                        "inputs": [
                            {"name": "text", "shape": [size], "datatype": "BYTES", "data": ["x" * 200] * size}
                        ]
                    }
                ).encode()
            )
            head = "POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: GZIP\r\n"
            status, headers, answer = await ask(
                port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            if size == 1:
                assert status == 200
            else:
                assert (status, headers["retry-after"]) == (429, "1"), answer
                assert service.calls == []
            await until(lambda: server.status()["held_bytes"] == 0)

    run(scenario)
