"""The cache as callers meet it: who may share an answer, how long it lasts, and what happens in flight."""

import asyncio
import copy
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.caching.answer_store import AnswerStore, Found
from edge_runtime.caching.outcome_codec import encode_outcome
from edge_runtime.caching.two_level import TwoLevelCache
from edge_runtime.config import CacheSettings, Config
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.messages import (
    Answer,
    InferRequest,
    ModelInfo,
    Origin,
    OutputRequest,
    Reason,
    Signature,
    Tensor,
    TensorSpec,
)
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.protocol.replies import build_reply
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.loading.model import load_model
from edge_runtime.processing.tensors import Tensors
from edge_runtime.runtime import Runtime
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.serving.service import ServedModel, Service

HOUR, DAY = 3600 * 10**9, 86_400 * 10**9


@pytest.fixture(scope="module")
def model():
    loaded = load_model("commands")
    yield loaded
    loaded.engine.close()


class Cloud:
    """Answers with label `says` while `reason` is None; refuses with it otherwise. `gate` holds it."""

    is_authenticated = True

    def __init__(self, model):
        self.model, self.says, self.version, self.asked = model, 1, "1", 0
        self.reason, self.is_connected = None, True
        self.gate = asyncio.Event()
        self.gate.set()

    def link_state(self, model):
        return LinkState(self.is_connected, False, 0)

    async def ask(self, model, request, *, deadline_ns):
        self.asked += 1
        await self.gate.wait()
        if self.reason is not None:
            raise CloudUnavailable(self.reason, "told so")
        answer = Answer((self.model.processor.labels[self.says], np.float32(0.9)), 0.9)
        return build_reply(model, self.version, self.model.info.signature, [answer], InferRequest(()), {})


class Memory:
    """A second level in memory: what the service does with one, apart from any file."""

    def __init__(self, lookup_ns=0):
        self.lookup_ns, self.kept, self.asked, self.age_ns, self.retained = lookup_ns, {}, 0, 0, None
        self.is_on, self.size_bytes, self.counters = True, 0, {}

    async def find(self, key):
        self.asked += 1
        await asyncio.sleep(0)
        return Found(self.kept[key][1], self.age_ns) if key in self.kept else None

    def keep(self, key, model, value, age_ns=0):
        self.kept[key] = (model, value)

    def retain_models(self, models):
        self.retained = models

    def status(self):
        return {}


def served(model, sure=False, engine=None, info=None, **options):
    logits = np.zeros(len(model.processor.labels), np.float32)
    logits[0] = 50.0 if sure else 0.0
    engine = engine or FakeEngine(lambda row: (logits,), max_batch=8)
    processor = copy.copy(model.processor)
    processor._fusion = None
    lane = ModelRunner("commands", processor, engine, is_inline=engine.gate is None)
    return ServedModel(info or model.info, processor, lane, **options)


def service_of(one, cloud=None, store=None, ttl_ns=HOUR, stale_ns=DAY, secret=b"s" * 32, cache=None):
    return Service(
        {one.info.name: one},
        cache=Cache(1 << 20, ttl_ns, stale_ns) if cache is None else cache,
        cloud=cloud,
        device_secret=secret,
        timeout_s=10,
        cloud_timeout_s=10,
        store=store,
    )


def text(question=b"x", outputs=(), **parameters):
    return InferRequest((Tensor("text", "BYTES", (1,), (question,)),), parameters=parameters, outputs=outputs)


def run(scenario):
    async def limited():
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(limited())


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def rows(one):
    return sum(count * often for count, often in one.runner.statistics.batch_sizes.items())


# The key law


@pytest.mark.parametrize(
    ("first", "second", "tenants"),
    [
        (text(), text(), ("a", "b")),
        (text(), text(b"X"), ("a", "a")),
        (text(), text(b"x "), ("a", "a")),
        (text(), text(private=True), ("a", "a")),
        (text(top=1), text(top=2), ("a", "a")),
        (text(top=1), text(top="1"), ("a", "a")),
        (text(top=1), text(top=True), ("a", "a")),
        (text(top=0.0), text(top=-0.0), ("a", "a")),
        (text(), text(outputs=(OutputRequest("intent"),)), ("a", "a")),
        (text(outputs=(OutputRequest("intent"),)), text(outputs=(OutputRequest("scores"),)), ("a", "a")),
        (
            text(b"\x0a" + bytes(7) + b"confidence" + b"x", outputs=(OutputRequest("intent"),)),
            text(b"x", outputs=(OutputRequest("intent"), OutputRequest("confidence"))),
            ("a", "a"),
        ),
    ],
    ids=range(11),
)
def test_whatever_part_differs_nobody_gets_the_others_answer(model, first, second, tenants):
    async def scenario():
        one = served(model, sure=True)
        service = service_of(one)
        for request, tenant in ((first, tenants[0]), (second, tenants[1])):
            reply = await service.infer("commands", None, request, tenant=tenant)
            assert reply.parameters["origin"] == "local"
        assert rows(one) == 2
        for request, tenant in ((first, tenants[0]), (second, tenants[1])):
            reply = await service.infer("commands", None, request, tenant=tenant)
            assert reply.parameters["origin"] == "cache"

    run(scenario)


def test_how_a_request_travels_does_not_keep_it_from_the_cache(model):
    async def scenario():
        one = served(model, sure=True)
        service = service_of(one)
        for request in (text(), text(timeout=5_000_000), text(deadline_ms=900), replace(text(), id="7")):
            await service.infer("commands", None, request)
        assert rows(one) == 1
        assert len(service._prefixes) == 1
        await service.infer("commands", None, text(cache=False))
        assert rows(one) == 2

    run(scenario)


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "0" * 64},
        {"is_batch_invariant": False},
        {"engine": "runner 2"},
        {"processing": "2"},
    ],
    ids=str,
)
def test_after_a_restart_only_what_would_be_computed_alike_is_found_on_disk(model, other):
    """Same secret, same store, same question; one thing about the process differs."""

    async def scenario():
        info = replace(model.info, latency_profile=((1, 10**9),))
        store = Memory()
        await service_of(served(model, sure=True, info=info, engine=None), store=store).infer(
            "commands", None, text()
        )
        assert len(store.kept) == 1
        changes = {k: v for k, v in other.items() if k not in ("engine", "processing")}
        one = served(model, sure=True, info=replace(info, **changes))
        if "engine" in other:
            one = replace(one, engine=other["engine"])
        if "processing" in other:
            one = replace(one, processor=Processing(model.processor, other["processing"]))
        service = service_of(one, store=store)
        assert (await service.infer("commands", None, text())).parameters["origin"] == "local"
        same = service_of(served(model, sure=True, info=info), store=store)
        assert (await same.infer("commands", None, text())).parameters["origin"] == "cache"

    run(scenario)


@pytest.mark.parametrize(
    ("was_sure", "threshold", "with_cloud", "origin", "reason", "asked"),
    [
        (True, 0.1, False, "cache", "confident", 0),
        (True, None, True, "cache", "local_only", 0),
        (True, 0.9, True, "cache", "confident", 0),
        (False, 0.9, True, "cloud", "unsure", 1),  # there was no cloud to ask when it was kept
        (False, 0.9, False, "cache", "local_only", 0),
        (False, 0.0, True, "cache", "confident", 0),
    ],
)
def test_after_a_restart_a_kept_answer_of_the_edge_is_decided_again(
    model, was_sure, threshold, with_cloud, origin, reason, asked
):
    """Same secret, same store, same question, another threshold or a cloud: the model does not run again."""

    async def scenario():
        info = replace(model.info, latency_profile=((1, 10**9),))
        store, cloud = Memory(), Cloud(model)
        await service_of(served(model, sure=was_sure, info=info), store=store).ask("x")
        assert len(store.kept) == 1
        one = served(model, sure=was_sure, info=replace(info, accept_threshold=threshold))
        service = service_of(one, cloud if with_cloud else None, store)
        reply = await service.infer("commands", None, text())
        assert (reply.parameters["origin"], reply.parameters["reason"]) == (origin, reason)
        assert (rows(one), cloud.asked) == (0, asked)

    run(scenario)


class Processing:
    """A processor of another version."""

    def __init__(self, processor, version):
        self._processor, self.version = processor, version

    def __getattr__(self, name):
        return getattr(self._processor, name)


def numbers(dtype, width, engine=None):
    signature = Signature((TensorSpec("x", dtype, (-1, -1)),), (TensorSpec("y", "FP32", (-1, width)),))
    processor = Tensors(signature, version="1")
    engine = engine or FakeEngine(lambda row: (embedding(row[0], width),))
    info = ModelInfo(
        "numbers", "1", "fake", signature, 64, True, "d" * 64, None, latency_profile=((1, 10**9),)
    )
    return ServedModel(info, processor, ModelRunner("numbers", processor, engine, is_inline=True))


def embedding(row, width):
    return np.random.default_rng(abs(int(row.sum() * 1000))).normal(size=width).astype(np.float32)


def ask_numbers(array):
    return InferRequest((Tensor("x", "FP32", array.shape, array),))


def test_tensors_that_differ_in_a_bit_or_in_shape_are_other_questions():
    async def scenario():
        one = numbers("FP32", 8)
        service = service_of(one)
        base = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
        bit = base.copy()
        bit.view(np.uint32)[0, 0] ^= 1
        for array in (
            base,
            bit,
            base[:, :3],
            np.hstack([base, [[0.0]]]).astype(np.float32),
            -0.0 * base,
            0.0 * base,
        ):
            reply = await service.infer("numbers", None, ask_numbers(np.ascontiguousarray(array)))
            assert reply.parameters["origin"] == "local"
        assert rows(one) == 6

    run(scenario)


def test_an_embedding_is_kept_like_any_output_and_comes_back_bit_equal_also_from_disk(tmp_path):
    async def scenario():
        question = ask_numbers(np.array([[1.5, 2.5]], np.float32))
        store = AnswerStore(tmp_path / "answers.db", 8 << 20)
        await store.start()
        one = numbers("FP32", 384)
        service = service_of(one, store=store, secret=store.secret)
        first = await service.infer("numbers", None, question)
        again = await service.infer("numbers", None, question)
        await store.close()
        store = AnswerStore(tmp_path / "answers.db", 8 << 20)
        await store.start()
        other = numbers("FP32", 384)
        service = service_of(other, store=store, secret=store.secret)
        restarted = await service.infer("numbers", None, question)
        await store.close()
        assert [reply.parameters["origin"] for reply in (first, again, restarted)] == [
            "local",
            "cache",
            "cache",
        ]
        assert rows(one) == 1
        assert rows(other) == 0
        for reply in (again, restarted):
            (came,), (was,) = reply.outputs, first.outputs
            assert (came.datatype, came.shape) == ("FP32", (1, 384))
            assert came.data.tobytes() == was.data.tobytes()

    run(scenario)


# Versions


def test_a_new_version_answers_anew_and_the_old_ones_answers_are_gone(model):
    async def scenario():
        old, store = served(model, sure=True), Memory()
        service = service_of(old, store=store)
        await service.ask("x")
        assert len(service.cache.memory) == 1
        newer = served(model, sure=True, info=replace(model.info, version="9", digest="9" * 64))
        assert service.replace_model(newer) is old
        assert len(service.cache.memory) == 0
        assert list(store.retained) == ["9" * 64]
        assert (await service.ask("x")).origin is Origin.LOCAL
        assert rows(newer) == 1

    run(scenario)


def test_an_answer_of_a_version_that_was_replaced_meanwhile_is_not_kept(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.clear()
        service = service_of(served(model), cloud)
        asker = asyncio.create_task(service.ask("x"))
        await turns()
        service.replace_model(served(model, info=replace(model.info, digest="9" * 64)))
        cloud.gate.set()
        assert (await asker).origin is Origin.CLOUD
        assert len(service.cache.memory) == 0

    run(scenario)


def test_a_new_version_of_the_cloud_ends_what_the_former_said(model):
    async def scenario():
        cloud, store = Cloud(model), Memory()
        service = service_of(served(model), cloud, store)
        await service.ask("x")
        cloud.version, cloud.says = "2", 2
        await service.ask("y")
        assert len(service.cache.memory) == 1
        again = await service.ask("x")  # the disk still has what version 1 said: it is not believed
        assert (again.origin, again.answer.values[0]) == (Origin.CLOUD, model.processor.labels[2])

    run(scenario)


# Stale answers


@pytest.mark.parametrize(
    "how", [*(r for r in (Reason.CLOUD_ABSENT, Reason.CLOUD_LATE, Reason.LINK_DOWN)), "link"]
)
def test_past_its_time_the_clouds_answer_serves_only_while_the_cloud_is_out_of_reach(model, how):
    async def scenario():
        cloud = Cloud(model)
        service = service_of(served(model), cloud, ttl_ns=1)
        assert (await service.ask("x")).origin is Origin.CLOUD
        cloud.says = 2
        fresh = await service.ask("x")  # expired at once, and the cloud is there
        assert (fresh.origin, fresh.answer.values[0]) == (Origin.CLOUD, model.processor.labels[2])
        if how == "link":
            cloud.is_connected = False
        else:
            cloud.reason = how
        for _ in range(2):
            stale = await service.ask("x")
            assert (stale.origin, stale.reason, stale.is_degraded) == (Origin.CACHE, Reason.STALE, True)
            assert stale.answer.values[0] == model.processor.labels[2]
        reply = await service.infer("commands", None, text())
        assert reply.parameters["stale"] is True
        assert reply.parameters["degraded"] is True
        assert (reply.parameters["origin"], reply.parameters["reason"]) == ("cache", "stale")
        assert service.counters.outcomes[("commands", "cache", "stale")] == 3
        assert (await service.ask("other")).origin is Origin.LOCAL  # never asked before: the edge's own
        cloud.reason, cloud.is_connected, cloud.says = None, True, 3
        assert (await service.ask("x")).answer.values[0] == model.processor.labels[3]

    run(scenario)


def test_being_served_stale_prolongs_nothing(model):
    async def scenario():
        cloud = Cloud(model)
        cache = Cache(1 << 20, 1, 10**6)  # of use for a millisecond
        service = service_of(served(model), cloud, cache=cache)
        await service.ask("x")
        cloud.reason = Reason.CLOUD_LATE
        until_ns = time.monotonic_ns() + 2 * 10**6
        while time.monotonic_ns() < until_ns:
            await service.ask("x")
        assert (await service.ask("x")).origin is Origin.LOCAL

    run(scenario)


def test_a_local_answer_past_its_time_and_a_request_that_wants_no_cache_get_nothing_stale(model):
    async def scenario():
        cloud, cache = Cloud(model), Cache(1 << 20, 1, DAY)
        sure = service_of(served(model, sure=True), cloud, cache=cache)
        assert (await sure.ask("x")).origin is Origin.LOCAL
        cloud.reason = Reason.CLOUD_LATE
        unsure = service_of(served(model), cloud, cache=cache)  # the same key, now unsure
        assert (await unsure.ask("x")).reason is Reason.CLOUD_LATE
        cloud.reason = None
        await unsure.ask("y")
        cloud.reason = Reason.CLOUD_LATE
        assert (await unsure.ask("y")).reason is Reason.STALE
        reply = await unsure.infer("commands", None, text(b"y", cache=False))
        assert reply.parameters["reason"] == "cloud_late"
        assert "stale" not in reply.parameters
        private = await unsure.ask("y", is_private=True)
        assert (private.origin, private.reason) == (Origin.LOCAL, Reason.PRIVATE)

    run(scenario)


# In flight


def test_a_cancelled_leader_hands_over_and_the_others_never_notice(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.clear()
        one = served(model)
        service = service_of(one, cloud)
        askers = [asyncio.create_task(service.ask("x")) for _ in range(4)]
        await turns(10)
        for leader in (0, 1):  # whoever takes over is cancelled too
            askers[leader].cancel()
            await turns(10)
            assert cloud.asked == leader + 2
        cloud.gate.set()
        results = await asyncio.gather(*askers, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[:2])
        assert all(result.origin is Origin.CLOUD for result in results[2:])
        assert (cloud.asked, rows(one), len(service._flights)) == (3, 3, 0)

    run(scenario)


def test_a_cancelled_follower_takes_nobody_with_it(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.clear()
        service = service_of(served(model), cloud)
        askers = [asyncio.create_task(service.ask("x")) for _ in range(4)]
        await turns(10)
        for follower in (1, 2, 3):
            askers[follower].cancel()
        await turns()
        assert [asker.done() for asker in askers] == [False, True, True, True]
        cloud.gate.set()
        assert (await askers[0]).origin is Origin.CLOUD
        assert (cloud.asked, len(service._flights)) == (1, 0)

    run(scenario)


def test_a_leader_refused_for_its_own_deadline_leaves_the_others_theirs(model):
    async def scenario():
        one = served(model, sure=True)
        service = service_of(one)
        hurried = asyncio.create_task(service.infer("commands", None, text(), deadline_ns=1))
        patient = [asyncio.create_task(service.infer("commands", None, text())) for _ in range(3)]
        results = await asyncio.gather(hurried, *patient, return_exceptions=True)
        assert isinstance(results[0], Refused)
        assert results[0].kind is RefusalKind.LATE
        assert all(result.parameters["origin"] == "local" for result in results[1:])
        assert (rows(one), len(service._flights)) == (1, 0)

    run(scenario)


def test_a_leader_refused_while_it_waits_leaves_its_followers_theirs(model):
    async def scenario():
        logits = np.zeros(len(model.processor.labels), np.float32)
        gate = threading.Event()
        one = served(model, engine=FakeEngine(lambda row: (logits,), gate=gate))
        service = service_of(one)
        busy = asyncio.create_task(service.ask("busy"))
        await turns()
        soon = time.monotonic_ns() + 20 * 10**6
        leader = asyncio.create_task(service.infer("commands", None, text(), deadline_ns=soon))
        await turns()
        followers = [asyncio.create_task(service.infer("commands", None, text())) for _ in range(2)]
        with pytest.raises(Refused):
            await leader
        gate.set()
        for follower in followers:
            assert (await follower).parameters["origin"] == "local"
        await busy
        assert len(service._flights) == 0

    run(scenario)


def test_followers_with_shorter_deadlines_leave_in_their_own_time(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.clear()
        service = service_of(served(model), cloud)
        leader = asyncio.create_task(service.infer("commands", None, text()))
        await turns()
        soon = time.monotonic_ns() + 5 * 10**6
        short = asyncio.create_task(service.infer("commands", None, text(), deadline_ns=soon))
        long = asyncio.create_task(service.infer("commands", None, text()))
        with pytest.raises(Refused) as refused:
            await short
        assert refused.value.kind is RefusalKind.LATE
        assert not leader.done()
        assert not long.done()
        cloud.gate.set()
        for asker in (leader, long):
            assert (await asker).parameters["origin"] == "cloud"
        assert cloud.asked == 1

    run(scenario)


def test_an_error_is_everybodys_once_and_nobodys_after(model):
    async def scenario():
        logits = np.zeros(len(model.processor.labels), np.float32)
        engine = FakeEngine(lambda row: (logits,), fail_on=(1,))
        service = service_of(served(model, engine=engine))
        results = await asyncio.gather(*(service.ask("x") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        assert len(service.cache.memory) == 0
        assert (await service.ask("x")).origin is Origin.LOCAL
        assert len(engine.batch_sizes) == 2

    run(scenario)


def test_tenants_do_not_wait_for_each_other(model):
    async def scenario():
        cloud = Cloud(model)
        cloud.gate.clear()
        service = service_of(served(model), cloud)
        askers = [
            asyncio.create_task(service.infer("commands", None, text(), tenant=tenant)) for tenant in "aabb"
        ]
        await turns(10)
        assert (cloud.asked, service.counters.coalesced) == (2, 2)
        cloud.gate.set()
        assert {(await asker).parameters["origin"] for asker in askers} == {"cloud"}

    run(scenario)


# The second level


@pytest.mark.parametrize(
    ("row_ns", "lookup_ns", "is_asked"), [(10**6, 10**5, True), (10**6, 10**5 + 1, False)]
)
def test_the_disk_is_asked_before_a_model_only_if_that_costs_ten_look_ups(model, row_ns, lookup_ns, is_asked):
    async def scenario():
        store = Memory(lookup_ns)
        one = served(model, sure=True, info=replace(model.info, latency_profile=((1, row_ns),)))
        service = service_of(one, store=store)
        await service.ask("x")
        assert (store.asked, len(store.kept)) == ((1, 1) if is_asked else (0, 0))

    run(scenario)


def test_the_disk_is_always_asked_before_the_cloud_and_keeps_what_the_cloud_said(model):
    async def scenario():
        store, cloud = Memory(lookup_ns=10**9), Cloud(model)
        await service_of(served(model), cloud, store).ask("x")
        assert [digest for digest, _ in store.kept.values()] == [model.info.digest]
        again = service_of(served(model), cloud, store)  # after a restart
        kept = await again.ask("x")
        assert (kept.origin, kept.reason, cloud.asked) == (Origin.CACHE, Reason.UNSURE, 1)
        assert kept.answer.values[0] == model.processor.labels[1]
        await again.ask("x")
        assert store.asked == 2  # now it is in memory

    run(scenario)


def test_age_on_disk_counts_in_memory_and_past_its_time_it_serves_only_in_need(model):
    async def scenario():
        store, cloud = Memory(), Cloud(model)
        await service_of(served(model), cloud, store).ask("x")
        store.age_ns = HOUR  # just expired
        service = service_of(served(model), cloud, store)
        cloud.says = 2
        cloud.is_connected = False
        stale = await service.ask("x")
        assert (stale.reason, stale.answer.values[0]) == (Reason.STALE, model.processor.labels[1])
        assert len(service.cache.memory) == 0  # not admitted by that
        cloud.is_connected = True
        assert (await service.ask("x")).origin is Origin.CLOUD
        store.age_ns = HOUR + DAY
        cloud.is_connected = False
        late = service_of(served(model), cloud, store)
        assert (await late.ask("x")).reason is Reason.LINK_DOWN

    run(scenario)


def test_what_comes_from_disk_dies_in_memory_when_it_would_have_on_disk():
    async def scenario():
        memory, store = Cache(1 << 20, HOUR, 0), Memory()
        store.keep(b"k", "d", encode_outcome(Outcome(Answer((b"v",), 0.5), Origin.CLOUD, Reason.UNSURE)))
        store.age_ns = HOUR - 10**9
        recalled = await TwoLevelCache(memory, store).read_disk(b"k", "d")
        assert recalled.is_fresh
        assert memory.get(time.monotonic_ns(), b"k") is not None
        assert memory.get(time.monotonic_ns() + 10**9, b"k") is None

    run(scenario)


def test_a_find_on_disk_is_not_kept_anew(model):
    async def scenario():
        store, cloud = Memory(), Cloud(model)
        await service_of(served(model), cloud, store).ask("x")
        store.age_ns, store.kept = HOUR - 10**9, dict(store.kept)
        before = dict(store.kept)
        service = service_of(served(model), cloud, store)
        assert (await service.ask("x")).origin is Origin.CACHE
        (entry,) = service.cache.memory._eviction._entries.values()
        assert entry.expires_ns <= time.monotonic_ns() + 10**9
        assert store.kept == before

    run(scenario)


def test_private_answers_stay_off_the_disk(model):
    async def scenario():
        store = Memory()
        one = served(model, sure=True, info=replace(model.info, latency_profile=((1, 10**9),)))
        service = service_of(one, store=store)
        await service.ask("x", is_private=True)
        assert not store.kept
        assert (await service.ask("x", is_private=True)).origin is Origin.CACHE

    run(scenario)


def test_degraded_answers_are_kept_nowhere(model):
    async def scenario():
        store, cloud = Memory(), Cloud(model)
        cloud.reason = Reason.CLOUD_LATE
        service = service_of(served(model), cloud, store)
        await service.ask("x")
        assert not store.kept
        assert len(service.cache.memory) == 0

    run(scenario)


# What people see


def test_status_and_metrics_show_both_levels(tmp_path):
    async def scenario():
        config = Config(cache=CacheSettings(path=str(tmp_path / "answers.db"), max_bytes=2000))
        async with Runtime.open(config) as runtime:
            for question in ("turn the lights off", "turn the lights off", "play jazz", "book a flight"):
                await runtime.ask(question)
            seen = runtime.status()["cache"]
            assert (seen["hits"], seen["misses"], seen["stale"], seen["evictions"]) == (1, 3, 0, 1)
            assert (seen["entries"], seen["coalesced"]) == (2, 0)
            assert 1400 <= seen["bytes"] <= 2000
            disk = seen["disk"]
            assert (disk["state"], disk["why_off"]) == ("on", None)
            assert disk["lookup_us"] > 0
            text = runtime.metrics().decode()
            for line in (
                "edge_cache_evictions_total 1.0",
                "edge_cache_entries 2.0",
                "edge_disk_cache_up 1.0",
            ):
                assert line in text
            assert 'edge_disk_cache_events_total{event="found"} 0.0' in text
            from edge_runtime.cli.tables import print_status

            print_status(runtime.status())
        (tmp_path / "answers.db").write_bytes(b"no database at all" * 100)
        async with Runtime.open(config) as runtime:
            assert runtime.status()["cache"]["disk"]["state"] == "off"
            assert "edge_disk_cache_up 0.0" in runtime.metrics().decode()
            assert (await runtime.ask("play jazz")).origin is Origin.LOCAL
        async with Runtime.open(
            Config(cache=CacheSettings(enabled=False, path=str(tmp_path / "x")))
        ) as runtime:
            assert runtime.status()["cache"] is None
            assert "edge_cache_bytes" not in runtime.metrics().decode()
        assert not (tmp_path / "x").exists()

    run(scenario)
