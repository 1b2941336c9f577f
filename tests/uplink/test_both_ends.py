"""Uplink and workers together over a scripted broker in virtual time: what one end promises the other relies on."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from cloud_fallback.config import CloudConfig, RequestSettings
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.core.escalation.breaker import BreakerState
from edge_runtime.core.escalation.decision import CloudUnavailable
from edge_runtime.core.messages import Answer, InferRequest, Reason, Signature, Tensor, TensorSpec
from edge_runtime.mqtt.fake import FakeBroker
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.model_runner import Served
from edge_runtime.uplink.uplink import Uplink
from tests.virtual_time import now_ns, run_virtual, settle

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
REQUEST = InferRequest((Tensor("x", "FP32", (1, 2), np.float32([[1, 2]])),))
SETTINGS = SimpleNamespace(
    broker="mqtt://nowhere", tenant="home", timeout_s=2.0, username="", password_file="", ca_file="", cert_file="",
    key_file="",
)  # fmt: skip


class Runner:
    """Answers when `gate` is open."""

    def __init__(self):
        self.gate, self.runs = asyncio.Event(), 0
        self.gate.set()

    async def run_rows(self, rows, **_):
        self.runs += 1
        await self.gate.wait()
        return [Served(Answer(row, None), 0, 0, 1) for row in rows]


class Member:
    """One worker of the group."""

    def __init__(self, server, name, **settings):
        self.runner = Runner()
        processor = Tensors(SIGNATURE, version="1")
        model = SimpleNamespace(
            name="echo", version="1", processor=processor, info=SimpleNamespace(signature=SIGNATURE)
        )
        config = CloudConfig(broker="mqtt://nowhere", worker=name, models=("echo",), **settings)
        self.worker = Worker(config, "", {"echo": Loaded(model, self.runner)}, new_client=server.new_client)

    async def kill(self):
        """Nothing of it goes on, and it says nothing: SIGKILL."""
        self.worker.connection._link.client.close()
        self.worker.connection._task.cancel()
        for task in [*self.worker._tasks, self.worker._checking]:
            task.cancel()
        await settle()


class Both:
    def __init__(self, workers=1, **settings):
        self.server = FakeBroker()
        self.uplink = Uplink(
            SETTINGS, device="d1", new_client=self.server.new_client, clock_ns=now_ns, draw=lambda: 0.5
        )
        self.members = [Member(self.server, f"w{number}", **settings) for number in range(workers)]

    def ask(self, seconds=2.0):
        return asyncio.create_task(
            self.uplink.ask("echo", REQUEST, deadline_ns=now_ns() + round(seconds * 1e9))
        )

    async def reason(self, asking):
        with pytest.raises(CloudUnavailable) as failure:
            await asking
        return failure.value.reason

    async def __aenter__(self):
        for member in self.members:
            member.worker.connection.start()
            assert await member.worker.wait_ready(5)
        await self.uplink.start()
        assert await self.uplink.wait_connected(1)
        return self

    async def __aexit__(self, *_):
        for member in self.members:
            member.runner.gate.set()
            await member.worker.drain()
        await self.uplink.close()


def together(scenario, **options):
    async def limited():
        async with Both(**options) as both:
            await scenario(both)

    run_virtual(limited)


def test_a_worker_that_dies_with_a_request_costs_its_caller_a_resend():
    """It has acknowledged the request, and no broker gives it to another: the edge's own timer does."""

    async def scenario(both):
        for member in both.members:
            member.runner.gate.clear()
        asking = both.ask()
        await settle()
        (holder,) = [m for m in both.members if m.runner.runs]
        await holder.kill()
        both.members.remove(holder)
        both.members[0].runner.gate.set()
        assert (await asking).model_name == "echo"
        assert both.members[0].runner.runs == 1
        assert both.uplink.counters["resent"] == 1

    together(scenario, workers=2)


def test_a_blip_of_the_workers_link_runs_nothing_twice():
    async def scenario(both):
        member = both.members[0]
        member.runner.gate.clear()
        asking = both.ask(10.0)
        await settle()
        member.worker.connection._link.on_lost("a blip")
        await settle()
        assert await member.worker.wait_ready(10)
        await asyncio.sleep(3)  # the edge asks again meanwhile
        assert member.worker.counters["duplicates"] >= 1
        member.runner.gate.set()
        assert (await asking).model_name == "echo"
        assert member.runner.runs == 1

    together(scenario)


def test_a_blip_and_then_the_death_of_the_worker_is_answered_by_the_next():
    """The acknowledged copy of a request that still ran was nobody's any more."""

    async def scenario(both):
        first, second = both.members
        first.runner.gate.clear()
        second.runner.gate.clear()
        asking = both.ask(10.0)
        await settle()
        holder, other = (first, second) if first.runner.runs else (second, first)
        holder.worker.connection._link.on_lost("a blip")
        await settle()
        assert await holder.worker.wait_ready(10)
        await holder.kill()
        both.members.remove(holder)
        other.runner.gate.set()
        assert (await asking).model_name == "echo"

    together(scenario, workers=2)


def test_a_busy_worker_says_so_and_the_caller_falls_back_at_once():
    async def scenario(both):
        both.members[0].runner.gate.clear()
        first = both.ask()
        await settle()
        began_ns = now_ns()
        assert await both.reason(both.ask()) is Reason.CLOUD_REFUSED
        assert now_ns() - began_ns < 1e6
        both.members[0].runner.gate.set()
        assert (await first).model_name == "echo"
        assert both.uplink._health("echo").breaker.state is BreakerState.CLOSED

    together(scenario, max_in_flight=1)


def test_what_a_drain_does_not_answer_falls_back_before_its_deadline():
    async def scenario(both):
        both.members[0].runner.gate.clear()
        asking = both.ask(60.0)
        await settle()
        began_ns = now_ns()
        await both.members[0].worker.drain()
        assert await both.reason(asking) is Reason.CLOUD_REFUSED
        assert (now_ns() - began_ns) / 1e9 == pytest.approx(4.0, abs=0.1)
        assert both.uplink._health("echo").breaker.state is BreakerState.CLOSED

    together(scenario, requests=RequestSettings(drain_s=4.0))


def test_a_probe_is_answered_without_the_model():
    async def scenario(both):
        health = both.uplink._health("echo")
        for asked_ns in (0, 1):
            health.breaker.silent(asked_ns, now_ns())
        assert health.is_open
        await asyncio.sleep(2)
        assert health.breaker.state is BreakerState.HALF_OPEN
        assert both.members[0].runner.runs == 0

    together(scenario)
