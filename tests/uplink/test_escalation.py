"""Edge, broker and cloud worker together; each link broken in turn. The cloud's engine is a fake one."""

import asyncio
import shutil
import subprocess
import time

import msgspec
import numpy as np
import pytest

from cloud_fallback.config import CloudConfig
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.bundles.folder import find_bundle, load_bundle, write_bundle
from edge_runtime.config import CloudSettings, Config, ServerSettings, TrustSettings
from edge_runtime.core.messages import InferReply, InferRequest, Origin, OutputRequest, Reason, Tensor
from edge_runtime.core.protocol import oip
from edge_runtime.engines.fake import FakeBatch
from edge_runtime.loading.model import load_model
from edge_runtime.mqtt.client import Broker
from edge_runtime.mqtt.connection import Connection
from edge_runtime.mqtt.envelope import Message, pack, unpack
from edge_runtime.runtime import Runtime
from edge_runtime.serving.model_runner import ModelRunner

HARD = "could you sort out that plastic for me"


class Oracle:
    """An engine that is always sure of label 0; can refuse to answer or raise."""

    name, is_batch_invariant, max_batch = "fake", True, 8

    def __init__(self, labels):
        self.labels, self.fails = labels, False

    def bind(self, shapes, rows):
        return FakeBatch(shapes, rows, [np.int32])

    def run(self, batch):
        if self.fails:
            raise ValueError("broken")
        logits = np.zeros((len(batch.inputs[0]), self.labels), np.float32)
        logits[:, 0] = 50.0
        return [logits]

    def close(self):
        pass


class Cloud:
    """A worker with the edge's own processor, so that signature and labels agree."""

    def __init__(self, broker):
        model = load_model("commands")
        self.label = model.processor.labels[0]
        self.engine = Oracle(len(model.processor.labels))
        self.lane = ModelRunner("commands", model.processor, self.engine, is_inline=True)
        config = CloudConfig(broker=broker.url, worker="w1", models=("commands",))
        self.worker = Worker(config, "", {"commands": Loaded(model, self.lane)})

    async def __aenter__(self):
        self.worker.connection.start()
        assert await self.worker.connection.wait_connected(10)
        return self

    async def __aexit__(self, *_):
        await self.worker.drain()
        await self.lane.close()


def edge(broker, **more):
    cloud = CloudSettings(broker=broker.url, tenant="home", device="d1", **more)
    return Runtime.open(Config(cloud=cloud, server=ServerSettings(tcp="off")))


def run(scenario):
    async def limited():
        async with asyncio.timeout(40):
            await scenario()

    asyncio.run(limited())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_sure_answers_stay_and_unsure_ones_come_from_the_cloud_then_from_the_cache(broker):
    async def scenario():
        async with Cloud(broker) as cloud, edge(broker, username="d1") as runtime:
            assert await runtime.uplink.wait_connected(10)
            sure = await runtime.ask("turn the lights off")
            assert (sure.origin, sure.reason) == (Origin.LOCAL, Reason.CONFIDENT)
            hard = await runtime.ask(HARD)
            assert (hard.origin, hard.reason) == (Origin.CLOUD, Reason.UNSURE)
            assert hard.answer.values[0] == cloud.label
            assert (await runtime.ask(HARD)).origin is Origin.CACHE
            private = await runtime.ask(HARD + " please", is_private=True)
            assert (private.origin, private.reason) == (Origin.LOCAL, Reason.PRIVATE)

    run(scenario)


def test_without_a_worker_the_answer_is_local_at_once_and_degraded_and_not_cached(broker):
    async def scenario():
        async with edge(broker) as runtime:
            assert await runtime.uplink.wait_connected(10)
            for _ in range(2):
                outcome = await runtime.ask(HARD)
                assert (outcome.origin, outcome.reason) == (Origin.LOCAL, Reason.CLOUD_ABSENT)
                assert outcome.is_degraded
                assert outcome.cloud_ns < 1_500_000_000  # told by the broker, not by the time limit of 2 s

    run(scenario)


def test_a_failing_cloud_degrades_its_own_request_and_a_silent_one_opens_the_breaker(broker):
    async def scenario():
        async with Cloud(broker) as cloud, edge(broker, timeout_s=0.2) as runtime:
            assert await runtime.uplink.wait_connected(10)
            cloud.engine.fails = True
            assert (await runtime.ask(HARD)).reason is Reason.CLOUD_FAILED
            cloud.engine.fails = False
            assert (await runtime.ask(HARD)).origin is Origin.CLOUD
            cloud.worker.connection._on_message = lambda received: None
            assert (await runtime.ask(f"{HARD} 1")).reason is Reason.CLOUD_LATE
            silence = runtime.uplink._health("commands").breaker
            silence.silent(time.monotonic_ns(), time.monotonic_ns())  # a second caller in a row
            assert (await runtime.ask(f"{HARD} 2")).reason is Reason.CLOUD_OPEN

    run(scenario)


def test_a_stopped_broker_is_noticed_and_a_restarted_one_used_again(broker):
    async def scenario():
        async with Cloud(broker) as cloud, edge(broker) as runtime:
            assert await runtime.uplink.wait_connected(10)
            broker.stop()
            await until(lambda: not runtime.uplink.link_state().is_connected)
            assert (await runtime.ask(HARD)).reason is Reason.LINK_DOWN
            broker.start()
            assert await runtime.uplink.wait_connected(20)
            assert await cloud.worker.connection.wait_connected(20)
            assert (await runtime.ask(HARD)).origin is Origin.CLOUD

    run(scenario)


class Listener:
    """A plain client that sends as it likes and keeps what it hears."""

    def __init__(self, broker, *topics):
        self.heard = asyncio.Queue()
        self.connection = Connection(
            Broker(broker.url, "listener"),
            subscriptions=topics,
            state_topic="er/v1/home/listener/state",
            on_message=self._hear,
        )

    def _hear(self, received):
        self.connection.acknowledge(received)
        self.heard.put_nowait(received.message)

    async def __aenter__(self):
        self.connection.start()
        assert await self.connection.wait_connected(10)
        return self

    async def __aexit__(self, *_):
        await self.connection.close()


TOPIC = "er/v1/home/me/req/commands"
BODY = b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["hi"]}]}'


@pytest.mark.parametrize(
    "bad",
    [
        Message(TOPIC, b"{", correlation=b"c" * 16),
        Message(TOPIC, b"[" * 60_000, correlation=b"c" * 16),
        Message(TOPIC, BODY, correlation=b"short"),
        Message(TOPIC, BODY, correlation=b"c" * 16, user=(("Inference-Header-Content-Length", "99999"),)),
        Message(TOPIC, b"notzstd", correlation=b"c" * 16, user=(("Content-Encoding", "zstd"),)),
        Message(TOPIC, BODY, correlation=b"c" * 16, user=(("Content-Encoding", "br"),)),
        Message(TOPIC, BODY, correlation=b"c" * 16, user=(("Content-Digest", "00"),)),
        Message(TOPIC, BODY, correlation=b"c" * 16, user=tuple((f"k{i}", "v") for i in range(17))),
    ],
)
def test_what_cannot_be_read_is_answered_with_an_error_and_the_worker_goes_on(broker, bad):
    async def scenario():
        async with Cloud(broker), Listener(broker, "er/v1/home/me/rsp") as client:
            await client.connection.publish(bad)
            reply = await client.heard.get()
            assert b'"error"' in reply.payload
            await client.connection.publish(Message(TOPIC, BODY, correlation=b"d" * 16))
            good = await client.heard.get()
            assert good.correlation == b"d" * 16
            assert msgspec.json.decode(unpack(good)[0])["outputs"][0]["name"] == "intent"

    run(scenario)


def test_a_duplicate_is_answered_from_memory_and_a_retained_request_never_runs(broker):
    async def scenario():
        async with Listener(broker, "er/v1/home/me/rsp") as client:
            await client.connection.publish(Message(TOPIC, BODY, correlation=b"r" * 16, retain=True))
            async with Cloud(broker) as cloud:
                request = Message(TOPIC, BODY, correlation=b"d" * 16)
                await client.connection.publish(request)
                first = await client.heard.get()
                await client.connection.publish(request)
                again = await client.heard.get()
                assert first.correlation == again.correlation == b"d" * 16
                assert first.payload == again.payload
                assert cloud.lane.statistics.executions == 1

    run(scenario)


def test_a_forged_or_late_reply_is_counted_and_changes_nothing(broker):
    async def scenario():
        async with edge(broker) as runtime, Listener(broker, "er/v1/home/me/rsp") as client:
            assert await runtime.uplink.wait_connected(10)
            await client.connection.publish(Message("er/v1/home/d1/rsp", b"{}", correlation=b"f" * 16))
            await until(lambda: runtime.uplink.counters["unknown_reply"] == 1)
            assert (await runtime.ask("turn the lights off")).origin is Origin.LOCAL

    run(scenario)


@pytest.mark.parametrize(("username", "again"), [("", Origin.CLOUD), ("d1", Origin.CACHE)])
def test_what_anybody_could_have_answered_is_not_kept(broker, username, again):
    """A stranger reads a request, and answers on the device's reply topic with the id that it saw."""

    async def scenario():
        async with (
            edge(broker, username=username) as runtime,
            Listener(broker, "er/v1/home/d1/req/+") as stranger,
        ):
            assert await runtime.uplink.wait_connected(10)
            label = runtime.service.registry.find("commands", None).processor.labels[0]

            async def forge():
                request = await stranger.heard.get()
                outputs = (
                    Tensor("intent", "BYTES", (1,), (label,)),
                    Tensor("confidence", "FP32", (1,), np.float32([1.0])),
                )
                reply = InferReply("commands", "1", outputs)
                message = pack(
                    "er/v1/home/d1/rsp", *oip.encode_reply(reply), correlation=request.correlation, expiry_s=5
                )
                await stranger.connection.publish(message)

            asking = asyncio.create_task(runtime.ask(HARD))
            await forge()
            assert (await asking).origin is Origin.CLOUD  # the device cannot tell
            asking = asyncio.create_task(runtime.ask(HARD))
            if again is Origin.CLOUD:
                await forge()
            assert (await asking).origin is again

    run(scenario)


def test_a_worker_that_drains_answers_what_it_took(broker):
    async def scenario():
        async with Listener(broker, "er/v1/home/me/rsp") as client:
            async with Cloud(broker) as cloud:
                ids = [bytes([i]) * 16 for i in range(20)]
                await asyncio.gather(
                    *(client.connection.publish(Message(TOPIC, BODY, correlation=i)) for i in ids)
                )
                await until(lambda: len(cloud.worker._duplicates))
            answered = {(await client.heard.get()).correlation for _ in ids}
            assert answered == set(ids)

    run(scenario)


def test_a_person_with_mosquitto_pub_and_sub_gets_an_answer(broker):
    if shutil.which("mosquitto_pub") is None:
        pytest.skip("mosquitto-clients is not installed")

    async def scenario():
        async with Cloud(broker):
            subscriber = await asyncio.create_subprocess_exec(
                "mosquitto_rr", "-V", "5", "-p", str(broker.port), "-t", TOPIC, "-e", "er/v1/home/me/rsp",
                "-D", "PUBLISH", "correlation-data", "0123456789abcdef", "-m", BODY.decode(), "-q", "1", "-W", "10",
                stdout=subprocess.PIPE,
            )  # fmt: skip
            out, _ = await subscriber.communicate()
            assert subscriber.returncode == 0
            assert msgspec.json.decode(out)["outputs"][0]["name"] == "intent"

    run(scenario)


def test_a_person_asks_with_mosquitto_pub_and_reads_with_mosquitto_sub(broker):
    async def scenario():
        async with Cloud(broker) as cloud:
            port = ("-V", "5", "-p", str(broker.port))
            listening = await asyncio.create_subprocess_exec(
                *(
                    "stdbuf",
                    "-oL",
                    "mosquitto_sub",
                    *port,
                    "-t",
                    "er/v1/home/me/rsp",
                    "-C",
                    "1",
                    "-W",
                    "20",
                    "-d",
                ),
                stdout=asyncio.subprocess.PIPE,
            )
            seen = b""
            while b"SUBACK" not in seen:
                seen += await listening.stdout.readline()
            sending = await asyncio.create_subprocess_exec(
                *("mosquitto_pub", *port, "-q", "1", "-t", TOPIC, "-m", BODY.decode())
            )
            assert await sending.wait() == 0
            out, _ = await listening.communicate()
            assert cloud.label in out
            assert b'"origin":"cloud"' in out

    run(scenario)


def fused_bundle(tmp_path, cloud_version, edge_weight, cloud_weight):
    """The shipped bundle, told how to join its evidence with a cloud's."""
    shipped = load_bundle(find_bundle("commands"))
    fields = msgspec.to_builtins(shipped.manifest)
    fields["calibration"]["fusion"] = {
        "cloud_version": cloud_version,
        "edge_weight": edge_weight,
        "cloud_weight": cloud_weight,
        "knots": [[0.0, 0.25], [1.0, 0.75]],
    }
    write_bundle(
        tmp_path / "fused", {k: v for k, v in fields.items() if k not in ("format", "files")}, shipped.files
    )
    return str(tmp_path / "fused")


@pytest.mark.parametrize(
    ("version", "weights", "winner"),
    [("same", (9.0, 0.01), "edge"), ("same", (0.01, 9.0), "cloud"), ("another", (9.0, 0.01), "cloud")],
)
def test_an_escalated_answer_joins_both_tiers_where_the_bundle_was_fitted_for_that_cloud(
    broker, tmp_path, version, weights, winner
):
    served = load_bundle(find_bundle("commands")).manifest.version
    path = fused_bundle(tmp_path, served if version == "same" else "99", *weights)
    settings = CloudSettings(broker=broker.url, tenant="home", device="d1")
    trust = TrustSettings(unsigned=True)
    config = Config(models=(path,), cloud=settings, server=ServerSettings(tcp="off"), trust=trust)

    async def scenario():
        async with Cloud(broker) as cloud, Runtime.open(config) as runtime:
            assert await runtime.uplink.wait_connected(10)
            alone = await runtime.ask(HARD, is_private=True)
            hard = await runtime.ask(HARD)
            assert (hard.origin, hard.reason) == (Origin.CLOUD, Reason.UNSURE)
            wanted = {"edge": alone.answer.values[0], "cloud": cloud.label}
            assert wanted["edge"] != wanted["cloud"]
            assert hard.answer.values[0] == wanted[winner]
            if version == "same":
                assert 0.25 <= hard.answer.confidence <= 0.75  # through the knots of the joined score

    run(scenario)


def test_scores_come_only_to_those_who_name_them_from_either_tier(broker):
    question = (Tensor("text", "BYTES", (2,), (b"turn the lights off", HARD.encode())),)

    async def scenario():
        async with Cloud(broker), edge(broker) as runtime:
            assert await runtime.uplink.wait_connected(10)
            plain = await runtime.infer("commands", InferRequest(question))
            assert [t.name for t in plain.outputs] == ["intent", "confidence"]
            named = InferRequest(question, outputs=(OutputRequest("scores", binary=True),))
            for _ in range(2):  # computed, then from the cache
                (scores,) = (await runtime.infer("commands", named)).outputs
                assert scores.shape == (2, len(load_labels()))
                assert np.allclose(np.exp(scores.data).sum(1), 1.0, atol=1e-4)

    run(scenario)


def load_labels():
    bundle = load_bundle(find_bundle("commands"))
    return msgspec.json.decode(bundle.files[bundle.manifest.labels])
