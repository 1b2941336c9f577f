"""The edge's side of escalation against a cloud that this file plays: silent, absent, hostile or gone."""

import asyncio
import random
import time
from types import SimpleNamespace

import pytest

from edge_runtime.core.escalation.breaker import BreakerLimits, BreakerState
from edge_runtime.core.escalation.decision import CloudUnavailable
from edge_runtime.core.messages import InferReply, InferRequest, Reason, Tensor
from edge_runtime.core.protocol import oip
from edge_runtime.mqtt.envelope import Message, pack, unpack
from edge_runtime.uplink.uplink import Uplink
from tests.uplink.test_escalation import Listener, run, until

REQUESTS = "$share/workers/er/v1/+/+/req/commands"
REPLY_TO = "er/v1/home/d1/rsp"


def question(text=b"hi"):
    return InferRequest((Tensor("text", "BYTES", (1,), (text,)),))


def answer(request, model="commands", text=b"greeting"):
    reply = InferReply(model, "1", (Tensor("intent", "BYTES", (1,), (text,)),))
    return pack(REPLY_TO, *oip.encode_reply(reply), correlation=request.correlation, expiry_s=5)


def soon(seconds=10.0):
    return time.monotonic_ns() + int(seconds * 1e9)


class Edge:
    def __init__(self, broker, **more):
        settings = SimpleNamespace(
            broker=broker.url, tenant="home", timeout_s=2.0, username="", password_file="", ca_file="", cert_file="", key_file=""
        )  # fmt: skip
        self.uplink = Uplink(settings, device="d1", **more)

    async def __aenter__(self):
        await self.uplink.start()
        assert await self.uplink.wait_connected(10)
        return self.uplink

    async def __aexit__(self, *_):
        await self.uplink.close()


async def reason_of(asking):
    with pytest.raises(CloudUnavailable) as failure:
        await asking
    return failure.value.reason


def test_a_question_travels_with_its_time_and_comes_back_once(broker):
    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:
            asking = asyncio.create_task(uplink.ask("commands", question(), deadline_ns=soon(2.5)))
            request = await cloud.heard.get()
            assert request.topic == "er/v1/home/d1/req/commands"
            assert len(request.correlation) == 16
            assert request.expiry_s in (2, 3)
            assert 2000 < oip.decode_request(*unpack(request)).parameters["deadline_ms"] <= 2500
            await cloud.connection.publish(answer(request))
            reply = await asking
            assert reply.outputs[0].data == (b"greeting",)
            await cloud.connection.publish(answer(request))
            await until(lambda: uplink.counters["unknown_reply"] == 1)
            assert uplink.counters["answered"] == 1

    run(scenario)


def test_large_questions_are_compressed_with_a_digest(broker):
    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:
            asking = asyncio.create_task(uplink.ask("commands", question(b"a" * 4000), deadline_ns=soon()))
            request = await cloud.heard.get()
            assert dict(request.user)["Content-Encoding"] == "zstd"
            assert dict(request.user)["Content-Digest"]
            assert len(request.payload) < 1000
            assert oip.decode_request(*unpack(request)).inputs[0].data == (b"a" * 4000,)
            await cloud.connection.publish(answer(request))
            await asking

    run(scenario)


def test_a_broker_that_dies_frees_its_callers_at_once(broker):
    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:
            asking = asyncio.create_task(uplink.ask("commands", question(), deadline_ns=soon(30)))
            await cloud.heard.get()
            broker.stop()
            began = time.monotonic()
            assert await reason_of(asking) is Reason.LINK_DOWN
            assert time.monotonic() - began < 5
            assert await reason_of(uplink.ask("commands", question(), deadline_ns=soon())) is Reason.LINK_DOWN

    run(scenario)


def test_cancelling_one_caller_leaves_the_others(broker):
    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:
            askers = [
                asyncio.create_task(uplink.ask("commands", question(b"%d" % i), deadline_ns=soon()))
                for i in range(8)
            ]
            requests = [await cloud.heard.get() for _ in askers]
            for asker in askers[::2]:
                asker.cancel()
            for request in requests:
                text = oip.decode_request(*unpack(request)).inputs[0].data[0]
                await cloud.connection.publish(answer(request, text=text))
            results = await asyncio.gather(*askers, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
            assert [r.outputs[0].data[0] for r in results[1::2]] == [b"1", b"3", b"5", b"7"]
            await until(lambda: uplink.counters["late_reply"] == 4)
            assert uplink.counters["unknown_reply"] == 0
            assert not uplink._waiting

    run(scenario)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda request: answer(request, model="other"), Reason.CLOUD_FAILED),
        (lambda request: Message(REPLY_TO, b"{", correlation=request.correlation), Reason.CLOUD_FAILED),
        (
            lambda request: Message(
                REPLY_TO, b"\x28\xb5\x2f\xfd", correlation=request.correlation, user=(("Content-Encoding", "zstd"),)
            ),
            Reason.CLOUD_FAILED,
        ),
        (
            lambda request: Message(
                REPLY_TO, oip.encode_error("full", reason="full", retry_after_ms=5), correlation=request.correlation
            ),
            Reason.CLOUD_REFUSED,
        ),
        (
            lambda request: Message(
                REPLY_TO, oip.encode_error("late", reason="late"), correlation=request.correlation
            ),
            Reason.CLOUD_LATE,
        ),
        (
            lambda request: Message(REPLY_TO, oip.encode_error("broken"), correlation=request.correlation),
            Reason.CLOUD_FAILED,
        ),
    ],
)  # fmt: skip
def test_replies_that_are_no_answers_have_their_reason(broker, spoil, reason):
    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:
            asking = asyncio.create_task(uplink.ask("commands", question(), deadline_ns=soon()))
            await cloud.connection.publish(spoil(await cloud.heard.get()))
            assert await reason_of(asking) is reason

    run(scenario)


def test_silence_opens_the_breaker_and_an_answered_probe_lets_callers_through(broker):
    """The clock is set forward instead of waiting."""
    skipped_ns = [0]

    async def scenario():
        clock_ns = lambda: time.monotonic_ns() + skipped_ns[0]  # noqa: E731
        async with Listener(broker, REQUESTS) as cloud, Edge(broker, clock_ns=clock_ns) as uplink:
            for _ in range(2):
                asking = asyncio.create_task(
                    uplink.ask("commands", question(), deadline_ns=clock_ns() + 50_000_000)
                )
                await cloud.heard.get()
                assert await reason_of(asking) is Reason.CLOUD_LATE
            health = uplink._health("commands")
            health.tick(clock_ns() + 1_000_000_000)  # the time that is fair to the cloud is over
            assert uplink.link_state("commands").is_breaker_open
            asking = uplink.ask("commands", question(), deadline_ns=clock_ns() + 2_000_000_000)
            assert await reason_of(asking) is Reason.CLOUD_OPEN
            skipped_ns[0] += 2_000_000_000
            uplink.link_state("commands")  # somebody wants to ask: the probe that is due goes out
            probe = await cloud.heard.get()
            assert oip.decode_request(*unpack(probe)).inputs == ()
            refusal = oip.encode_error("no inputs", reason="invalid")
            await cloud.connection.publish(Message(REPLY_TO, refusal, correlation=probe.correlation))
            await until(lambda: health.breaker.state is BreakerState.HALF_OPEN)
            asking = asyncio.create_task(
                uplink.ask("commands", question(), deadline_ns=clock_ns() + 9_000_000_000)
            )
            await cloud.connection.publish(answer(await cloud.heard.get()))
            await asking
            assert health.breaker.state is BreakerState.CLOSED

    run(scenario)


def test_what_is_too_large_to_send_says_nothing_about_the_cloud(broker):
    """Noise does not compress: 3 x 60 kB pass the packet limit. An open breaker must not close by it."""

    async def scenario():
        async with Edge(broker, limits=BreakerLimits(silences=1)) as uplink:
            breaker = uplink._health("commands").breaker
            breaker.silent(0, 1)
            breaker.probe_answered(2)  # it would close at the next answer, and open at the next fault
            noise = random.Random(1)
            texts = tuple(
                "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(20_000)).encode()
                for _ in range(3)
            )
            large = InferRequest((Tensor("text", "BYTES", (3,), texts),))
            reason = await reason_of(uplink.ask("commands", large, deadline_ns=soon()))
            assert reason is Reason.CLOUD_REFUSED
            assert breaker.state is BreakerState.HALF_OPEN
            assert uplink.link_state().is_connected

    run(scenario)


def test_a_request_the_worker_calls_invalid_is_no_fault_of_the_cloud(broker):
    async def scenario():
        limits = BreakerLimits(min_count=1)
        async with Listener(broker, REQUESTS) as cloud, Edge(broker, limits=limits) as uplink:
            asking = asyncio.create_task(uplink.ask("commands", question(), deadline_ns=soon()))
            request = await cloud.heard.get()
            refusal = oip.encode_error("unknown input", reason="invalid")
            await cloud.connection.publish(Message(REPLY_TO, refusal, correlation=request.correlation))
            assert await reason_of(asking) is Reason.CLOUD_FAILED
            assert uplink._health("commands").breaker.state is BreakerState.CLOSED

    run(scenario)


def test_cancelling_while_the_window_is_full_gives_the_place_back(broker):
    broker.restart("max_inflight_messages 2")

    async def scenario():
        async with Listener(broker, REQUESTS) as cloud, Edge(broker) as uplink:

            async def serve():
                while True:
                    await cloud.connection.publish(answer(await cloud.heard.get()))

            serving = asyncio.create_task(serve())
            crowd = [
                asyncio.create_task(uplink.ask("commands", question(b"%d" % i), deadline_ns=soon()))
                for i in range(20)
            ]
            await asyncio.sleep(0)
            for asker in crowd[:10]:
                asker.cancel()
            assert len(await asyncio.gather(*crowd[10:])) == 10
            serving.cancel()

    run(scenario)
