"""The edge's side of escalation in virtual time: time-outs, breaker, windows, orders of events. No socket, no waiting."""

import asyncio
from types import SimpleNamespace

import pytest

from edge_runtime.core.escalation.breaker import BreakerState
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
    broker="mqtt://nowhere", tenant="home", timeout_s=2.0, username="", password_file="", ca_file="", cert_file="", key_file=""
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
        options = ConnectOptions("w", 100, 30, 5.0)
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
    def __init__(self, draw=lambda: 0.99, **server):
        self.server = FakeBroker(**server)
        self.cloud = Cloud(self.server)
        self.uplink = Uplink(
            SETTINGS, device="d1", new_client=self.server.new_client, clock_ns=now_ns, draw=draw
        )

    @property
    def state(self):
        return self.uplink._health("commands").breaker.state

    @property
    def counters(self):
        return self.uplink.counters

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
        assert edge.counters["answered"] == edge.counters["unknown_reply"] == 1

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
        assert edge.counters["late_reply"] == 1
        assert edge.counters["unknown_reply"] == 0

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
        assert edge.counters["late_reply"] == 3
        assert not edge.uplink._waiting

    in_rig(scenario)


@pytest.mark.parametrize(
    ("fields", "expected", "state"),
    [
        ({"reason": "full"}, Reason.CLOUD_REFUSED, BreakerState.CLOSED),
        ({"reason": "draining"}, Reason.CLOUD_REFUSED, BreakerState.CLOSED),
        ({"reason": "late"}, Reason.CLOUD_LATE, BreakerState.CLOSED),
        ({"reason": "invalid"}, Reason.CLOUD_FAILED, BreakerState.CLOSED),
        ({}, Reason.CLOUD_FAILED, BreakerState.OPEN),
    ],
)
def test_of_all_error_replies_only_failures_open_the_breaker(fields, expected, state):
    async def scenario(edge):
        for _ in range(5):
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


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b'{"error": 5}',
        b'{"model_name": "other", "outputs": []}',
        b'{"model_name": "commands"}',
        b"[" * 60_000,
    ],
)
def test_what_is_no_reply_is_a_failure_of_the_cloud(payload):
    async def scenario(edge):
        asking = edge.ask()
        await settle()
        correlation = edge.cloud.requests.pop().correlation
        edge.cloud.client.publish(Message(RSP, payload, correlation=correlation))
        with pytest.raises(CloudUnavailable) as failure:
            await asking
        assert failure.value.reason is Reason.CLOUD_FAILED

    in_rig(scenario)


def test_callers_in_a_hurry_cannot_open_the_breaker_of_a_healthy_cloud():
    """The cloud takes 50 ms, and they give it 20: their replies come late and count as what they are."""

    async def scenario(edge):
        edge.cloud.delay_s = 0.05
        for _ in range(20):
            assert await edge.reason(0.02) is Reason.CLOUD_LATE
            await asyncio.sleep(0.1)
        assert edge.state is BreakerState.CLOSED
        assert edge.counters["late_reply"] == 20
        assert (await edge.ask()).model_name == "commands"
        assert 50 <= edge.uplink.status()["reply_p95_ms"] < 51

    in_rig(scenario)


def test_callers_in_a_hurry_learn_of_a_dead_cloud_all_the_same():
    """Nobody waits long enough to see it; the time that would have been fair passes all the same."""

    async def scenario(edge):
        for _ in range(2):
            assert await edge.reason(0.02) is Reason.CLOUD_LATE
        await asyncio.sleep(1)
        assert await edge.reason(0.02) is Reason.CLOUD_OPEN

    in_rig(scenario)


def test_a_frozen_worker_costs_two_callers_their_patience_and_no_more():
    """One request every 7 s: silence is remembered, and probed without a caller."""

    async def scenario(edge):
        waited = []
        for _ in range(8):
            began_ns = now_ns()
            await edge.reason()
            waited.append(round((now_ns() - began_ns) / 1e9))
            await asyncio.sleep(7)
        assert waited == [2, 2, 0, 0, 0, 0, 0, 0]
        assert edge.counters["probes"] >= 3
        assert edge.uplink.link_state("commands").is_breaker_open

        edge.cloud.delay_s = 0.01  # it is thawed
        await asyncio.sleep(10)
        assert not edge.uplink.link_state("commands").is_breaker_open
        assert (await edge.ask()).model_name == "commands"
        assert edge.state is BreakerState.CLOSED

    in_rig(scenario)


def test_a_thawed_worker_closes_the_breaker_by_its_late_replies():
    async def scenario(edge):
        for _ in range(2):
            await edge.reason()
        late = list(edge.cloud.requests)
        assert edge.state is BreakerState.OPEN
        edge.cloud.reply(late[0])
        await settle()
        assert edge.state is BreakerState.CLOSED

    in_rig(scenario)


def test_a_probe_asks_for_nothing_and_none_goes_out_for_nobody():
    async def scenario(edge):
        for _ in range(2):
            await edge.reason()
        edge.cloud.requests.clear()
        await asyncio.sleep(3600)
        probes = [oip.decode_request(*unpack(request)) for request in edge.cloud.requests]
        assert {probe.inputs for probe in probes} == {()}
        assert len(probes) <= 1 + 3600 // 300
        edge.uplink.link_state("commands")  # a caller is turned away: it is worth while again
        await settle()
        assert len(edge.cloud.requests) == len(probes) + 1

    in_rig(scenario)


def test_on_a_new_connection_the_cloud_is_probed_at_once():
    """A broker was away for a minute: what was found on the old connection is no reason to wait for the next probe."""

    async def scenario(edge):
        for _ in range(2):
            await edge.reason()
        await asyncio.sleep(60)
        edge.uplink.link_state("commands")
        edge.cloud.delay_s = 0.01
        edge.server.clients[1].lose()
        await settle()
        assert edge.uplink.link_state("commands").is_breaker_open
        assert await edge.uplink.wait_connected(60)
        await asyncio.sleep(0.02)
        assert (await edge.ask()).model_name == "commands"

    in_rig(scenario)


def test_time_in_our_own_window_is_not_the_clouds():
    """The broker confirms nothing for a while: requests that never left say nothing about the workers."""

    async def scenario(edge):
        edge.cloud.delay_s = 0.01
        await edge.ask()
        edge.server.confirms = False
        first = edge.ask(0.5)
        await settle()
        assert (await first).model_name == "commands"  # the reply came, its confirmation did not
        for _ in range(6):
            assert await edge.reason(0.5) is Reason.CLOUD_LATE
        assert edge.state is BreakerState.CLOSED
        assert edge.uplink._health("commands").silent_since_ns is None

    in_rig(scenario, receive_maximum=2)


def test_a_reply_is_taken_without_its_confirmation():
    async def scenario(edge):
        edge.server.confirms = False
        asking = edge.ask()
        await settle()
        edge.server.confirms = True
        edge.cloud.reply(edge.cloud.requests[0])
        assert (await asking).model_name == "commands"

    in_rig(scenario)


def test_after_a_stall_of_the_broker_the_cloud_is_asked_again_within_seconds():
    """It confirms nothing for 8 s under 30 requests; 19 confirmations are lost for good."""

    async def scenario(edge):
        edge.cloud.delay_s = 0.02
        await edge.ask()
        edge.server.confirms = False
        edge.cloud.delay_s = None
        stalled = [edge.ask() for _ in range(30)]
        await asyncio.sleep(8)
        edge.server.confirms, edge.cloud.delay_s = True, 0.02
        await asyncio.gather(*stalled, return_exceptions=True)
        began_ns = now_ns()
        while True:
            try:
                await edge.ask()
                break
            except CloudUnavailable:
                await asyncio.sleep(0.2)
        assert (now_ns() - began_ns) / 1e9 < 5

    in_rig(scenario, receive_maximum=20)


def test_a_lost_request_is_asked_again_with_the_same_id_within_its_deadline():
    async def scenario(edge):
        edge.cloud.delay_s = 0.05
        await edge.ask()
        edge.cloud.delay_s = None
        began_ns = now_ns()
        asking = edge.ask()
        await settle()
        edge.cloud.delay_s = 0.05  # the first copy died with its worker
        assert (await asking).model_name == "commands"
        first, again = edge.cloud.requests[1:]
        assert (first.correlation, first.payload) == (again.correlation, again.payload)
        assert (now_ns() - began_ns) / 1e9 < 0.4
        assert edge.counters["resent"] == 1

    in_rig(scenario)


def test_half_of_a_group_that_is_silent_costs_a_resend_and_no_answer():
    """One of two workers was killed and its connection lives on: every other request goes there."""

    async def scenario(edge):
        dead = Cloud(edge.server)
        await dead.start()
        edge.cloud.delay_s = 0.05
        slowest_ns = 0
        for _ in range(60):  # ten seconds at six a second
            began_ns = now_ns()
            assert (await edge.ask()).model_name == "commands"
            slowest_ns = max(slowest_ns, now_ns() - began_ns)
            await asyncio.sleep(1 / 6)
        assert slowest_ns < 0.8e9
        assert len(dead.requests) >= 20
        assert edge.state is BreakerState.CLOSED

    in_rig(scenario)


def test_a_slow_cloud_is_not_asked_twice_as_often():
    async def scenario(edge):
        edge.cloud.delay_s = 1.9
        await asyncio.gather(*(edge.ask(2.5) for _ in range(60)))
        assert edge.counters["resent"] <= 20 + 6 + 25  # of 120 that are possible

    in_rig(scenario)


def test_one_slow_answer_does_not_keep_callers_from_asking():
    async def scenario(edge):
        edge.cloud.delay_s = 1.5
        await edge.ask(3.0)
        edge.cloud.delay_s = 0.05
        assert edge.uplink.link_state("commands").reply_p95_ns > 0.8e9
        await edge.ask()
        assert edge.uplink.link_state("commands").reply_p95_ns < 0.1e9

    in_rig(scenario)


def test_some_callers_try_against_the_estimate():
    draw = [0.99]

    async def scenario(edge):
        edge.cloud.delay_s = 1.5
        await edge.ask(3.0)
        assert edge.uplink.link_state("commands").reply_p95_ns > 0.8e9
        draw[0] = 0.4
        assert edge.uplink.link_state("commands").reply_p95_ns == 0
        assert edge.uplink.status()["reply_p95_ms"] > 800  # what is shown is not drawn

    in_rig(scenario, draw=lambda: draw[0])


def test_models_do_not_answer_for_each_other():
    async def scenario(edge):
        for _ in range(2):
            await edge.reason()
        assert edge.uplink.link_state("commands").is_breaker_open
        assert not edge.uplink.link_state("other").is_breaker_open
        assert edge.uplink.link_state().is_breaker_open  # of the link as a whole: something is wrong

    in_rig(scenario)


def test_status_names_since_when_no_worker_answers():
    async def scenario(edge):
        assert edge.uplink.status()["why_not"] is None
        for _ in range(2):
            await edge.reason()
        words = edge.uplink.status()["why_not"]
        assert words.startswith("no worker answers for commands since 20")
        assert f"keeps its replies on {RSP}" in words
        await asyncio.sleep(120)
        assert edge.uplink.status()["why_not"].startswith("no worker answers for commands since 20")
        edge.cloud.delay_s = 0.01
        edge.uplink.link_state("commands")
        await asyncio.sleep(11)
        assert edge.uplink.status()["why_not"] is None
        edge.cloud.client.filters = []
        assert await edge.reason() is Reason.CLOUD_ABSENT
        assert edge.uplink.status()["why_not"].startswith("no worker serves commands since 20")

    in_rig(scenario)


def test_a_request_that_the_broker_refuses_is_named_and_no_fault_of_the_cloud():
    async def scenario(edge):
        edge.server.publish_code = lambda message: 0x87 if "/req/" in message.topic else None
        for _ in range(6):
            assert await edge.reason() is Reason.CLOUD_REFUSED
        assert "refuses requests on er/v1/home/d1/req/+" in edge.uplink.status()["why_not"]
        assert "authorise" in edge.uplink.status()["why_not"]
        assert edge.state is BreakerState.CLOSED
        edge.server.publish_code = lambda message: None
        edge.cloud.delay_s = 0.01
        await edge.ask()
        assert edge.uplink.status()["why_not"] is None

    in_rig(scenario)


def test_a_subscription_that_is_refused_is_named():
    async def scenario():
        edge = Edge()
        edge.server.subscribe_code = lambda topic: 0x87
        await edge.uplink.start()
        assert not await edge.uplink.wait_connected(1)
        status = edge.uplink.status()
        assert not status["connected"]
        assert f"refused the subscription to {RSP}" in status["why_not"]
        await edge.uplink.close()

    run_virtual(scenario)


def test_a_broker_that_wrongly_says_nobody_listens_is_found_out():
    async def scenario(edge):
        route = edge.server.route
        edge.server.route = lambda message: (
            (route(message) and 0) or (0x10 if "/req/" in message.topic else 0)
        )
        edge.cloud.delay_s = 0.05
        assert await edge.reason() is Reason.CLOUD_ABSENT
        await asyncio.sleep(0.1)
        for _ in range(3):
            assert (await edge.ask()).model_name == "commands"

    in_rig(scenario)


def test_a_suspended_device_does_not_blame_the_cloud():
    async def scenario(edge):
        edge.cloud.delay_s = 0.05
        await edge.ask()
        edge.cloud.delay_s = None
        askers = [edge.ask() for _ in range(3)]
        await settle()
        asyncio.get_running_loop().now_s += 34  # the replies wait in the socket meanwhile
        await asyncio.gather(*askers, return_exceptions=True)
        await settle()
        assert edge.state is BreakerState.CLOSED
        assert edge.uplink._health("commands").silent_since_ns is None
        for request in edge.cloud.requests[1:]:
            edge.cloud.reply(request)
        await asyncio.sleep(10)
        assert edge.state is BreakerState.CLOSED
        assert edge.counters["probes"] == 0

    in_rig(scenario)


@pytest.mark.parametrize(
    ("settings", "is_authenticated"),
    [({}, False), ({"username": "d1"}, True), ({"cert_file": "c.pem"}, True)],
)
def test_it_says_whether_the_broker_knows_who_it_is(settings, is_authenticated):
    more = SimpleNamespace(**{**vars(SETTINGS), **settings})
    uplink = Uplink(more, device="d1")
    assert uplink.is_authenticated is is_authenticated
    assert uplink.status()["authenticated"] is is_authenticated


def test_devices_and_workers_never_share_a_client_id():
    def client_id(tenant, device):
        return Uplink(
            SimpleNamespace(**{**vars(SETTINGS), "tenant": tenant}), device=device
        )._broker.client_id

    assert client_id("a.b", "c") != client_id("a", "b.c")


@pytest.mark.parametrize("turns", range(1, 8))
def test_a_cancelled_close_leaves_nothing_running(turns):
    async def scenario():
        edge = Edge()
        await edge.__aenter__()
        waiting = edge.ask(100.0)
        await settle()
        edge.server.confirms = False
        closing = asyncio.create_task(edge.uplink.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await settle()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], CloudUnavailable)
        assert {t.get_name() for t in asyncio.all_tasks()} <= {asyncio.current_task().get_name()}
        await edge.uplink.close()

    run_virtual(scenario)
