"""The use case over a fake engine: equal questions in flight, cancelled callers, what may be kept."""

import asyncio
import copy
import random
import threading

import numpy as np
import pytest

from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.errors import EngineFailed, InvalidRequest, RefusalKind, Refused
from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.escalation.score_fusion import Pooling
from edge_runtime.core.messages import Answer, InferReply, InferRequest, Origin, Reason, Tensor
from edge_runtime.core.protocol.replies import build_reply
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.loading.model import load_model
from edge_runtime.processing.text_classification import Fusion
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.serving.service import ServedModel, Service


@pytest.fixture(scope="module")
def model():
    loaded = load_model("commands")
    yield loaded
    loaded.engine.close()


class Cloud:
    """Answers with label 1, when `gate` lets it."""

    is_authenticated = True

    def __init__(self, model):
        self.model, self.asked = model, 0
        self.gate = asyncio.Event()

    def link_state(self, model):
        return LinkState(True, False, 0)

    async def ask(self, model, request, *, deadline_ns):
        self.asked += 1
        await self.gate.wait()
        answer = Answer((self.model.processor.labels[1], np.float32(0.9)), 0.9)
        return build_reply(model, "1", self.model.info.signature, [answer], InferRequest(()), {})


def service(model, cloud=None, sure=False, engine=None, fusion=None):
    logits = np.zeros(len(model.processor.labels), np.float32)
    logits[0] = 50.0 if sure else 0.0
    engine = engine or FakeEngine(lambda row: (logits,), max_batch=8)
    processor = copy.copy(model.processor)
    processor._fusion = fusion
    lane = ModelRunner("commands", processor, engine, QueueLimits(8, 100), is_inline=True)
    served = ServedModel(model.info, processor, lane)
    made = Service(
        {"commands": served},
        cache=Cache(1 << 20, 10**12),
        cloud=cloud,
        device_secret=b"s" * 32,
        timeout_s=10,
        cloud_timeout_s=10,
    )
    return made, engine, lane


def run(scenario):
    async def limited():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def test_equal_questions_in_flight_are_asked_once(model):
    async def scenario():
        cloud = Cloud(model)
        made, engine, lane = service(model, cloud)
        askers = [asyncio.create_task(made.ask("x")) for _ in range(5)]
        await turns()
        cloud.gate.set()
        outcomes = await asyncio.gather(*askers)
        assert {o.origin for o in outcomes} == {Origin.CLOUD}
        assert (cloud.asked, sum(engine.batch_sizes), made.counters.coalesced) == (1, 1, 4)
        assert (await made.ask("x")).origin is Origin.CACHE
        await lane.close()

    run(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_cancelled_everybody_else_gets_the_answer(model, seed):
    """Also the leader: one of its followers takes over. Nothing is left in flight."""

    async def scenario():
        rng = random.Random(seed)
        cloud = Cloud(model)
        made, _, lane = service(model, cloud)
        askers = [asyncio.create_task(made.ask(rng.choice("ab"))) for _ in range(12)]
        cancelled = set()
        for _ in range(rng.randrange(1, 9)):
            await turns(rng.randrange(3))
            victim = rng.randrange(len(askers))
            cancelled.add(victim)
            askers[victim].cancel()
        cloud.gate.set()
        results = await asyncio.gather(*askers, return_exceptions=True)
        for i, result in enumerate(results):
            if i in cancelled:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result.answer.values[0] == model.processor.labels[1]
        assert not made._flights
        await lane.close()

    run(scenario)


def test_a_failing_engine_fails_every_follower_once_and_is_not_remembered(model):
    async def scenario():
        logits = np.zeros(len(model.processor.labels), np.float32)
        engine = FakeEngine(lambda row: (logits,), fail_on=(1,))
        made, _, lane = service(model, engine=engine)
        results = await asyncio.gather(*(made.ask("x") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        assert (await made.ask("x")).origin is Origin.LOCAL
        await lane.close()

    run(scenario)


def test_a_private_question_is_never_answered_for_others_and_never_leaves(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.set()
        made, _, lane = service(model, cloud)
        private = await made.ask("secret", is_private=True)
        assert (private.origin, private.reason, cloud.asked) == (Origin.LOCAL, Reason.PRIVATE, 0)
        open_one = await made.ask("secret")
        assert (open_one.origin, cloud.asked) == (Origin.CLOUD, 1)
        await lane.close()

    run(scenario)


def test_private_and_open_equal_questions_at_once_keep_apart(model):
    async def scenario():
        cloud = Cloud(model)
        made, _, lane = service(model, cloud)
        askers = [asyncio.create_task(made.ask("x", is_private=i % 2 == 0)) for i in range(4)]
        await turns()
        cloud.gate.set()
        outcomes = await asyncio.gather(*askers)
        assert [o.origin for o in outcomes[1::2]] == [Origin.CLOUD] * 2
        assert cloud.asked == 1
        await lane.close()

    run(scenario)


def test_an_unknown_label_from_the_cloud_is_not_believed(model):
    async def scenario():
        class Liar(Cloud):
            async def ask(self, model, request, *, deadline_ns):
                tensors = (
                    Tensor("intent", "BYTES", (1,), (b"format the disk",)),
                    Tensor("confidence", "FP32", (1,), np.array([1.0], np.float32)),
                )
                return InferReply(model, "1", tensors)

        made, _, lane = service(model, Liar(model))
        outcome = await made.ask("x")
        assert (outcome.origin, outcome.reason, outcome.is_degraded) == (
            Origin.LOCAL,
            Reason.CLOUD_FAILED,
            True,
        )
        assert (await made.ask("x")).origin is Origin.LOCAL  # degraded answers are not kept
        await lane.close()

    run(scenario)


def scored(model, version, scores):
    """A cloud that is asked for its scores and gives `scores`, whatever the labels."""

    class Scoring(Cloud):
        async def ask(self, model, request, *, deadline_ns):
            assert "scores" in {output.name for output in request.outputs}
            tensors = (
                Tensor("intent", "BYTES", (1,), (self.model.processor.labels[1],)),
                Tensor("confidence", "FP32", (1,), np.array([0.9], np.float32)),
                Tensor("scores", "FP32", (1, len(scores)), np.array([scores], np.float32)),
            )
            return InferReply(model, version, tensors)

    return Scoring(model)


@pytest.mark.parametrize(
    ("version", "width", "bad", "reason"),
    [
        ("7", 151, 0.0, Reason.UNSURE),  # fitted for it
        ("8", 3, 0.0, Reason.UNSURE),  # another cloud with other labels: its answer alone
        ("7", 3, 0.0, Reason.CLOUD_FAILED),
        ("7", 151, np.nan, Reason.CLOUD_FAILED),
        ("7", 151, -np.inf, Reason.CLOUD_FAILED),
    ],
)
def test_scores_are_read_only_of_the_cloud_they_were_fitted_for(model, version, width, bad, reason):
    async def scenario():
        scores = np.full(width, -9.0)
        scores[1], scores[2] = -0.01, scores[2] + bad
        fusion = Fusion("7", Pooling(1.0, 1.0, (0.0, 1.0), (0.2, 0.4)))
        made, _, lane = service(model, scored(model, version, scores), fusion=fusion)
        outcome = await made.ask("x")
        assert outcome.reason is reason
        if reason is Reason.UNSURE:
            assert outcome.answer.values[0] == model.processor.labels[1]
            assert (outcome.answer.confidence <= 0.4) == (version == "7")
            assert outcome.answer.extras == ()
        await lane.close()

    run(scenario)


def test_a_follower_out_of_time_is_refused_and_the_leader_is_not(model):
    async def scenario():
        cloud = Cloud(model)
        made, _, lane = service(model, cloud)
        leader = asyncio.create_task(made.ask("x"))
        await turns()
        request = InferRequest((Tensor("text", "BYTES", (1,), (b"x",)),))
        with pytest.raises(Refused):
            await made.infer("commands", None, request, deadline_ns=1)
        cloud.gate.set()
        assert (await leader).origin is Origin.CLOUD
        await lane.close()

    run(scenario)


def crowded(model, cloud, limits=None):
    """A service whose engine runs one row until its gate opens, and whose queue is as `limits` say."""
    gate = threading.Event()
    engine = FakeEngine(lambda row: (np.zeros(len(model.processor.labels), np.float32),), gate=gate)
    lane = ModelRunner("commands", model.processor, engine, limits or QueueLimits(8, 1))
    served = ServedModel(model.info, model.processor, lane)
    made = Service(
        {"commands": served}, cache=None, cloud=cloud, device_secret=b"s" * 32, timeout_s=10, cloud_timeout_s=10
    )  # fmt: skip
    return made, lane, engine, gate


async def fill(made, engine, rows=1):
    """One row runs, and `rows` wait."""
    running = asyncio.create_task(made.ask("running"))
    while not engine.entered.is_set():
        await asyncio.sleep(0.001)
    waiting = [asyncio.create_task(made.ask(f"waiting {i}")) for i in range(rows)]
    await turns()
    return [running, *waiting]


def test_what_the_edge_has_no_room_for_is_answered_by_the_cloud(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.set()
        made, lane, engine, gate = crowded(model, cloud)
        others = await fill(made, engine)
        outcome = await made.ask("x")
        assert (outcome.origin, outcome.reason) == (Origin.CLOUD, Reason.OVERLOADED)
        assert outcome.answer.values[0] == model.processor.labels[1]
        assert not outcome.is_degraded
        with pytest.raises(Refused) as refused:
            await made.ask("x", is_private=True)
        assert refused.value.kind is RefusalKind.FULL
        assert refused.value.retry_after_s > 0
        gate.set()
        await asyncio.gather(*others)
        await lane.close()

    run(scenario)


class Broken(Cloud):
    async def ask(self, model, request, *, deadline_ns):
        raise CloudUnavailable(Reason.CLOUD_LATE, "no answer")


def test_where_the_cloud_cannot_help_the_refusal_itself_is_told(model):
    async def scenario():
        made, lane, engine, gate = crowded(model, Broken(model))
        others = await fill(made, engine)
        with pytest.raises(Refused) as refused:
            await made.ask("x")
        assert refused.value.kind is RefusalKind.FULL
        gate.set()
        await asyncio.gather(*others)
        await lane.close()

    run(scenario)


def test_a_quota_is_not_got_round_by_the_cloud(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.set()
        made, lane, engine, gate = crowded(model, cloud, QueueLimits(8, 9, tenant_max_waiting=1))
        others = await fill(made, engine)
        with pytest.raises(Refused) as refused:
            await made.ask("x")
        assert refused.value.kind is RefusalKind.QUOTA
        assert lane.statistics.refused == {"quota": 1}
        gate.set()
        await asyncio.gather(*others)
        assert cloud.asked == len(others), "their own unsure answers, and nothing else"
        await lane.close()

    run(scenario)


def test_a_priority_is_read_and_travels_without_another_cache_entry(model):
    async def scenario():
        made, _engine, lane = service(model, sure=True)
        for word, origin in (("high", "local"), (3, "cache"), (0, "cache")):
            request = InferRequest((Tensor("text", "BYTES", (1,), (b"x",)),), parameters={"priority": word})
            reply = await made.infer("commands", None, request)
            assert reply.parameters["origin"] == origin
        for word in ("urgent", 4, True):
            request = InferRequest((Tensor("text", "BYTES", (1,), (b"x",)),), parameters={"priority": word})
            with pytest.raises(InvalidRequest, match="priority"):
                await made.infer("commands", None, request)
        await lane.close()

    run(scenario)
