"""Waiting for the cloud ends with the daemon, and no other wait does."""

import asyncio

import pytest

from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.messages import InferReply, InferRequest, Reason
from edge_runtime.uplink.interruptible import InterruptibleCloud

REPLY = InferReply("m", "1", ())


class SlowCloud:
    def __init__(self):
        self.gate = asyncio.Event()
        self.asked = 0

    def link_state(self):
        return LinkState(is_connected=True, is_breaker_open=False, reply_p95_ns=0)

    async def ask(self, model, request, *, deadline_ns):
        self.asked += 1
        if deadline_ns == 0:
            raise TimeoutError
        await self.gate.wait()
        return REPLY


def run(scenario):
    async def limited():
        async with asyncio.timeout(30):
            await scenario(SlowCloud())

    asyncio.run(limited())


def test_an_answer_passes_through():
    async def scenario(cloud):
        interruptible = InterruptibleCloud(cloud)
        assert interruptible.link_state() == cloud.link_state()
        cloud.gate.set()
        assert await interruptible.ask("m", InferRequest(()), deadline_ns=1) is REPLY

    run(scenario)


def test_who_waits_is_told_at_once_that_there_will_be_no_answer():
    async def scenario(cloud):
        interruptible = InterruptibleCloud(cloud)
        asking = [
            asyncio.ensure_future(interruptible.ask("m", InferRequest(()), deadline_ns=1)) for _ in range(3)
        ]
        while cloud.asked < 3:
            await asyncio.sleep(0)
        asking[0].cancel()
        interruptible.interrupt()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert [error.reason for error in found[1:]] == [Reason.CLOUD_LATE] * 2
        with pytest.raises(CloudUnavailable):
            await interruptible.ask("m", InferRequest(()), deadline_ns=1)
        assert cloud.asked == 3

    run(scenario)


def test_a_time_out_of_the_cloud_itself_is_not_taken_for_ours():
    async def scenario(cloud):
        with pytest.raises(TimeoutError):
            await InterruptibleCloud(cloud).ask("m", InferRequest(()), deadline_ns=0)

    run(scenario)
