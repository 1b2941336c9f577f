"""The edge's side of escalation in virtual time: time-outs, breaker, windows, orders of events. No socket, no waiting."""

import asyncio
from types import SimpleNamespace

import pytest

from edge_runtime.core.escalation.breaker import Breaker, BreakerLimits, BreakerState
from edge_runtime.core.escalation.decision import CloudUnavailable
from edge_runtime.core.messages import InferReply, InferRequest, Reason, Tensor
from edge_runtime.core.protocol import oip
from edge_runtime.mqtt.client import Broker, ConnectOptions
from edge_runtime.mqtt.envelope import Message, pack, unpack
from edge_runtime.mqtt.fake import FakeBroker
from edge_runtime.uplink.uplink import Uplink
from tests.virtual_time import now_ns, run_virtual, settle

RSP = "er/v1/home/d1/rsp"
SETTINGS = SimpleNamespace(
    broker="mqtt://nowhere", tenant="home", username="", password_file="", ca_file="", cert_file="", key_file=""
)  # fmt: skip


def question(text=b"hi"):
    return InferRequest((Tensor("text", "BYTES", (1,), (text,)),))


def answer(request, text=b"greeting"):
    reply = InferReply("commands", "1", (Tensor("intent", "BYTES", (1,), (text,)),))
    return pack(RSP, *oip.encode_reply(reply), correlation=request.correlation, expiry_s=5)


class Cloud:
    """A worker played by the test: keeps the requests; `answers` says after how many seconds each is answered."""

    def __init__(self, server):
        self.requests, self.delay_s = [], None
        options = ConnectOptions("w", 0, True, 100, 30, 5.0)
        self.client = server.new_client(Broker("", "w"), options, self)

    async def start(self):
        await self.client.open()
        self.client.subscribe(["$share/workers/er/v1/+/+/req/commands"])

    def on_message(self, message, packet_id, qos):
        self.requests.append(message)
        if self.delay_s is not None:
            asyncio.get_running_loop().call_later(self.delay_s, self.reply, message)

    def reply(self, request, text=b"greeting"):
        self.client.publish(answer(request, text))

    def __getattr__(self, name):
        return lambda *_: None


class Edge:
    def __init__(self, breaker=None, **server):
        self.server = FakeBroker(**server)
        self.cloud = Cloud(self.server)
        self.breaker = breaker or Breaker(BreakerLimits(min_count=3, open_ns=10_000_000_000))
        self.uplink = Uplink(
            SETTINGS, device="d1", breaker=self.breaker, new_client=self.server.new_client, clock_ns=now_ns
        )

    @property
    def state(self):
        return self.breaker.state(now_ns())

    def ask(self, seconds=2.0, text=b"hi"):
        deadline_ns = now_ns() + round(seconds * 1e9)
        return asyncio.create_task(self.uplink.ask("commands", question(text), deadline_ns=deadline_ns))

    async def reason(self, seconds=2.0):
        with pytest.raises(CloudUnavailable) as failure:
            await self.ask(seconds)
        return failure.value.reason

    async def __aenter__(self):
        await self.cloud.start()
        await self.uplink.start()
        assert await self.uplink.wait_connected(1)
        return self

    async def __aexit__(self, *_):
        await self.uplink.close()


def in_rig(scenario, **options):
    async def limited():
        async with Edge(**options) as edge:
            await scenario(edge)

    run_virtual(limited)


def test_a_reply_reaches_its_caller_and_a_second_one_nobody():
    async def scenario(edge):
        asking = edge.ask()
        await settle()
        (request,) = edge.cloud.requests
        edge.cloud.reply(request, b"first")
        edge.cloud.reply(request, b"second")
        assert (await asking).outputs[0].data == (b"first",)
        assert edge.uplink.counters["answered"] == edge.uplink.counters["unknown_reply"] == 1

    in_rig(scenario)


def test_a_reply_may_overtake_the_confirmation():
    async def scenario(edge):
        edge.server.confirms = False
        asking = edge.ask()
        await settle()
        edge.server.confirms = True
        edge.cloud.reply(edge.cloud.requests[0])
        await settle()
        client = edge.server.clients[1]
        for packet_id in list(client.withheld):
            client.confirm(packet_id)
        assert (await asking).outputs[0].data == (b"greeting",)

    in_rig(scenario)


def test_a_caller_waits_until_its_deadline_and_no_longer():
    async def scenario(edge):
        began_ns = now_ns()
        assert await edge.reason(2.0) is Reason.CLOUD_LATE
        assert now_ns() - began_ns == pytest.approx(2e9)
        edge.cloud.reply(edge.cloud.requests[0])
        await settle()
        assert edge.uplink.counters["unknown_reply"] == 1

    in_rig(scenario)


def test_the_worker_is_told_how_much_time_is_left():
    async def scenario(edge):
        asking = edge.ask(2.5)
        await settle()
        (request,) = edge.cloud.requests
        assert oip.decode_request(*unpack(request)).parameters["deadline_ms"] == 2500
        assert request.expiry_s == 3
        asking.cancel()

    in_rig(scenario)


def test_nobody_listening_is_told_at_once():
    async def scenario(edge):
        edge.cloud.client.filters = []
        began_ns = now_ns()
        assert await edge.reason() is Reason.CLOUD_ABSENT
        assert now_ns() - began_ns < 1e6
        assert edge.state is BreakerState.CLOSED

    in_rig(scenario)


def test_a_lost_connection_frees_every_caller_at_once():
    async def scenario(edge):
        askers = [edge.ask(100.0) for _ in range(5)]
        await settle()
        began_ns = now_ns()
        edge.server.lose()
        results = await asyncio.gather(*askers, return_exceptions=True)
        assert {result.reason for result in results} == {Reason.LINK_DOWN}
        assert now_ns() - began_ns < 1e6
        assert edge.state is BreakerState.CLOSED
        assert await edge.reason() is Reason.LINK_DOWN

    in_rig(scenario)


def test_cancelling_one_caller_leaves_the_others_and_nothing_behind():
    async def scenario(edge):
        askers = [edge.ask(text=b"%d" % i) for i in range(6)]
        await settle()
        for asker in askers[::2]:
            asker.cancel()
        for request in edge.cloud.requests:
            edge.cloud.reply(request, oip.decode_request(*unpack(request)).inputs[0].data[0])
        results = await asyncio.gather(*askers, return_exceptions=True)
        assert [r.outputs[0].data[0] for r in results[1::2]] == [b"1", b"3", b"5"]
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        await settle()
        assert edge.uplink.counters["unknown_reply"] == 3
        assert not edge.uplink._open

    in_rig(scenario)


def test_silence_opens_the_breaker_and_a_good_probe_closes_it():
    async def scenario(edge):
        for _ in range(3):
            assert await edge.reason() is Reason.CLOUD_LATE
        assert edge.uplink.link_state().is_breaker_open
        assert await edge.reason() is Reason.CLOUD_OPEN
        await asyncio.sleep(10)
        assert edge.state is BreakerState.HALF_OPEN
        edge.cloud.delay_s = 0.1
        await edge.ask()
        assert edge.state is BreakerState.CLOSED

    in_rig(scenario)


def test_a_probe_whose_caller_leaves_is_given_to_the_next():
    async def scenario(edge):
        for _ in range(3):
            await edge.reason()
        await asyncio.sleep(10)
        probe = edge.ask()
        await settle()
        assert await edge.reason() is Reason.CLOUD_OPEN
        probe.cancel()
        await settle()
        edge.cloud.delay_s = 0.1
        assert (await edge.ask()).model_name == "commands"

    in_rig(scenario)


@pytest.mark.parametrize(
    ("fields", "expected", "state"),
    [
        ({"reason": "full"}, Reason.CLOUD_REFUSED, BreakerState.CLOSED),
        ({"reason": "late"}, Reason.CLOUD_LATE, BreakerState.CLOSED),
        ({"reason": "invalid"}, Reason.CLOUD_FAILED, BreakerState.CLOSED),
        ({}, Reason.CLOUD_FAILED, BreakerState.OPEN),
    ],
)
def test_of_all_error_replies_only_failures_open_the_breaker(fields, expected, state):
    async def scenario(edge):
        for _ in range(3):
            asking = edge.ask()
            await settle()
            error = oip.encode_error("no", **fields)
            correlation = edge.cloud.requests.pop().correlation
            edge.cloud.client.publish(Message(RSP, error, correlation=correlation))
            with pytest.raises(CloudUnavailable) as failure:
                await asking
            assert failure.value.reason is expected
        assert edge.state is state

    in_rig(scenario)
