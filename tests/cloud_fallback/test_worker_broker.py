"""The cloud worker with a real broker and a fake engine: duplicates, floods, hostile packets, draining."""

import asyncio
import json
import threading
from contextlib import AsyncExitStack

import numpy as np
import pytest

from cloud_fallback.config import CloudConfig, WorkerBatchSettings
from cloud_fallback.daemon import load_models
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines import run_rows
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.loading.model import load_model
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS
from edge_runtime.mqtt.envelope import Message, unpack
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.settings import TrustSettings
from tests.uplink.test_escalation import TOPIC, Listener, run, until

REPLIES = "er/v1/home/me/rsp"


def body(*texts, **parameters):
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


def ask(text, correlation=b"c" * 16, **more):
    return Message(TOPIC, body(text), correlation=correlation, **more)


def told(message):
    plain, _ = unpack(message)
    return json.loads(plain)


class Cloud:
    """A worker whose engine is the edge's own model, slowed by `gate` where a test wants it."""

    def __init__(self, broker, *, gate=None, queue=1024, **settings):
        self.model = load_model("commands")
        self.engine = FakeEngine(
            lambda row: run_rows(self.model.engine, [row])[0], gate=gate, max_batch=8, dtypes=[np.int32]
        )
        self.lane = ModelRunner(
            "commands", self.model.processor, self.engine, QueueLimits(8, queue), is_inline=gate is None
        )
        config = CloudConfig(broker=broker.url, worker="w1", models=("commands",), **settings)
        self.worker = Worker(config, "", {"commands": Loaded(self.model, self.lane)})

    async def __aenter__(self):
        self.worker.connection.start()
        assert await self.worker.connection.wait_connected(10)
        return self

    async def __aexit__(self, *_):
        await self.worker.drain()
        await self.lane.close()


def test_one_id_with_two_questions_gets_two_answers(broker):
    """A person repeats the example of the documentation with another text."""

    async def scenario():
        async with Cloud(broker), Listener(broker, REPLIES) as client:
            answers = []
            for text in ("turn the lights off", "what is the weather like"):
                await client.connection.publish(ask(text))
                answers.append(told(await client.heard.get())["outputs"][0]["data"][0])
            assert answers[0] != answers[1]

    run(scenario)


def test_a_refusal_is_not_remembered(broker):
    async def scenario():
        gate = threading.Event()
        async with Cloud(broker, gate=gate, queue=1) as cloud, Listener(broker, REPLIES) as client:
            await client.connection.publish(ask("one", b"1" * 16))  # runs, held by the gate
            await asyncio.to_thread(cloud.engine.entered.wait)
            await client.connection.publish(ask("two", b"2" * 16))  # waits: the queue is full
            await until(lambda: cloud.lane.waiting == 1)
            await client.connection.publish(ask("three", b"3" * 16))
            refused = await client.heard.get()
            assert refused.correlation == b"3" * 16
            assert told(refused)["reason"] == "full"
            assert told(refused)["retry_after_ms"] > 0
            gate.set()
            assert {(await client.heard.get()).correlation for _ in range(2)} == {b"1" * 16, b"2" * 16}
            await client.connection.publish(ask("three", b"3" * 16))
            assert "outputs" in told(await client.heard.get())

    run(scenario)


def test_draining_answers_also_what_the_broker_holds_back(broker):
    """mosquitto hands over 20 at a time; the rest of a burst follows while the worker drains."""

    async def scenario():
        gate = threading.Event()
        async with Listener(broker, REPLIES) as client:
            async with Cloud(broker, gate=gate) as cloud:
                ids = [i.to_bytes(16, "big") for i in range(1, 101)]
                await asyncio.gather(*(client.connection.publish(ask(f"text {i!r}", i)) for i in ids))
                await asyncio.to_thread(cloud.engine.entered.wait)
                drained = asyncio.create_task(cloud.worker.drain())
                gate.set()
                await drained
            answered = {(await client.heard.get()).correlation for _ in ids}
            assert answered == set(ids)

    run(scenario)


def test_after_a_drain_nobody_listens_any_more(broker):
    async def scenario():
        async with Listener(broker, REPLIES) as client:
            async with Cloud(broker):
                pass
            assert await client.connection.publish(ask("anyone?")) == NO_SUBSCRIBERS

    run(scenario)


@pytest.mark.parametrize("user", [(("\ufeff", "x"),), (("x", "\ufeff"),)])
def test_a_packet_the_codec_refuses_does_not_come_back_for_ever(broker, user):
    """The broker accepts U+FEFF in a property and paho does not: with a kept session each connection met it again."""

    async def scenario():
        async with Cloud(broker) as cloud, Listener(broker, REPLIES) as client:
            await client.connection.publish(ask("poison", b"p" * 16, user=user))
            connects = cloud.worker.connection.connects
            await until(lambda: cloud.worker.connection.connects > connects)
            await client.connection.publish(ask("turn the lights off", b"g" * 16))
            assert (await client.heard.get()).correlation == b"g" * 16
            assert cloud.worker.connection.connects == connects + 1

    run(scenario)


def test_a_retained_request_never_runs_not_even_live(broker):
    async def scenario():
        async with Cloud(broker) as cloud, Listener(broker, REPLIES) as client:
            await client.connection.publish(ask("planted", b"r" * 16, retain=True))
            await client.connection.publish(ask("turn the lights off", b"g" * 16))
            assert (await client.heard.get()).correlation == b"g" * 16
            assert cloud.lane.statistics.executions == 1

    run(scenario)


def test_replies_are_compressed_only_for_who_can_read_it(broker):
    async def scenario():
        async with Cloud(broker), Listener(broker, REPLIES) as client:
            many = Message(TOPIC, body(*["turn the lights off"] * 40))
            await client.connection.publish(many)
            plain = await client.heard.get()
            assert len(json.loads(plain.payload)["outputs"][0]["data"]) == 40
            accepting = Message(TOPIC, many.payload, user=(("Accept-Encoding", "zstd"),))
            await client.connection.publish(accepting)
            packed = await client.heard.get()
            assert ("Content-Encoding", "zstd") in packed.user
            assert len(packed.payload) < len(plain.payload)

    run(scenario)


def test_a_reply_above_the_brokers_limit_becomes_an_error(broker):
    broker.restart("max_packet_size 4096")

    async def scenario():
        async with Cloud(broker), Listener(broker, REPLIES) as client:
            await client.connection.publish(Message(TOPIC, body(*["a"] * 200), correlation=b"b" * 16))
            reply = await client.heard.get()
            assert reply.correlation == b"b" * 16
            assert "error" in told(reply)
            await client.connection.publish(ask("turn the lights off", b"g" * 16))
            assert "outputs" in told(await client.heard.get())

    run(scenario)


def test_what_came_too_late_is_refused_as_late(broker):
    async def scenario():
        async with Cloud(broker) as cloud, Listener(broker, REPLIES) as client:
            await client.connection.publish(Message(TOPIC, body("hi", deadline_ms=0)))
            assert told(await client.heard.get())["reason"] == "late"
            assert cloud.lane.statistics.executions == 0

    run(scenario)


def test_a_response_topic_changes_nothing(broker):
    """Answers go where the requester may read, whatever it asks for."""

    async def scenario():
        async with Cloud(broker), Listener(broker, REPLIES, "er/v1/home/victim/rsp") as client:
            process = await asyncio.create_subprocess_exec(
                *("mosquitto_pub", "-V", "5", "-p", str(broker.port), "-t", TOPIC, "-m", body("hi").decode()),
                *("-D", "PUBLISH", "response-topic", "er/v1/home/victim/rsp"),
            )
            assert await process.wait() == 0
            assert (await client.heard.get()).topic == REPLIES
            assert client.heard.empty()

    run(scenario)


def test_two_workers_with_one_id_are_told_so(broker):
    async def scenario():
        async with Cloud(broker) as first, Cloud(broker) as second:
            await until(
                lambda: any("same client id" in c.worker.connection.last_error for c in (first, second))
            )

    run(scenario)


def test_a_worker_with_two_instances_serves_tenants_and_priorities_on_both():
    async def scenario():
        async with AsyncExitStack() as stack:
            config = CloudConfig(
                models=("commands",),
                instances=2,
                depth=2,
                batch=WorkerBatchSettings(window="off"),
                trust=TrustSettings(record="off"),
            )
            lane = (await load_models(config, stack))["commands"].runner
            rows = [lane.run(b"turn the lights off", tenant="ab"[i % 2], priority=i % 3) for i in range(64)]
            answers = await asyncio.gather(*rows)
            assert {answer.values[0] for answer in answers} == {b"smart_home"}
            assert len(lane._supervisor._slots) == 2
            assert lane.statistics.executions >= 2

    run(scenario)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["topic write er/v1/#"], "does not deliver"),  # granted, and filtered at delivery
        (["topic read er/v1/#", "topic write er/v1/_worker/#"], "refuses replies on er/v1/home/me/rsp"),
        (["topic readwrite er/v1/#"], ""),
    ],
)
def test_access_rules_that_keep_a_worker_from_working_are_named(broker, tmp_path, rules, words):
    (tmp_path / "acl").write_text("".join(f"{rule}\n" for rule in rules))
    (tmp_path / "acl").chmod(0o700)
    broker.restart(f"acl_file {tmp_path}/acl")

    async def scenario():
        async with Cloud(broker) as cloud:
            cloud.worker._check.wait_s = 0.2
            if words != "does not deliver":
                assert await cloud.worker.wait_ready(10)
                cloud.worker._admit(ask("turn the lights off"))
                await until(lambda: cloud.worker.counters["answered"] == 1)
            await until(lambda: words in cloud.worker.problem)
            assert bool(words) == bool(cloud.worker.problem)

    run(scenario)
