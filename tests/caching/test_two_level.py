"""Both levels of the cache: what it pins is what it counts, and nothing that it returns is older than it says."""

import asyncio
import dataclasses
import gc
import hashlib
import time
import tracemalloc

import msgspec
import numpy as np
import pytest

from edge_runtime.caching.answer_store import Found
from edge_runtime.caching.outcome_codec import decode_outcome, encode_outcome
from edge_runtime.caching.two_level import TwoLevelCache
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.messages import Answer, Origin, Reason
from edge_runtime.core.outcome import Outcome, pinned_bytes, with_own_values
from tests.serving import fakes

HOUR, DIGEST = 3600 * 10**9, "d" * 64


class Clock:
    def __init__(self):
        self.ns = 10**15

    def __call__(self):
        return self.ns


def key(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


def local(*values, extras=(), confidence=None):
    return Outcome(Answer(values, confidence, extras), Origin.LOCAL, Reason.CONFIDENT, 1000, 2000)


def put(cache, i, outcome, **options):
    cache.put(cache.now_ns(), key(i), DIGEST, 0, outcome, **({"is_private": False} | options))


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


# Bytes


class Traced:
    """Bytes that a block leaves allocated, by tracemalloc; numpy reports its arrays to it."""

    def __enter__(self):
        gc.collect()
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def bytes(self):
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self._before

    def __exit__(self, *_):
        tracemalloc.stop()


def view_of_a_batch(i):
    """As engines hand out rows: one of 64 rows of an array, whose others nobody keeps."""
    batch = np.full((64, 384), i, np.float32)
    return local(batch[i % 64])


def view_of_a_view(i):
    return local(np.full((16, 8, 4), i, np.float32)[3][1:5].T)


def view_in_extras(i):
    return local(b"label", np.float32(i), extras=(np.full((64, 100), i, np.float32)[1],), confidence=0.5)


def view_of_bytes(i):
    return local(np.frombuffer(bytes(8000), np.int8, 10, 50))


def command(i):
    return local(b"turn_on_the_lights_%08d" % i, np.float32(i), confidence=i / 7)


def many_small_arrays(i):
    return local(*[np.full((2, 1), i % 100, np.int8) for _ in range(10)])


def scalars(i):
    return local(*[np.float64(i) for _ in range(5)])


def empty(i):
    return local(np.zeros((0, 3), np.float32)[:])


@pytest.mark.parametrize(
    "make",
    [
        view_of_a_batch,
        view_of_a_view,
        view_in_extras,
        view_of_bytes,
        command,
        many_small_arrays,
        scalars,
        empty,
    ],
)
def test_what_the_cache_counts_is_what_it_pins(make):
    """Of each batch one row is kept. Four times as many are put as fit, so keys of evicted ones are counted, too."""
    room = 1 << 20
    with Traced() as traced:
        cache = TwoLevelCache(Cache(room, HOUR))
        i = 0
        while cache.memory.evictions < 3 * len(cache.memory) or i < 100:
            put(cache, i, make(i))
            if i % 3 == 0:
                cache.get(key(i))  # which makes the form of a hit
            i += 1
        counted, pinned = cache.memory.size_bytes, traced.bytes()
    assert 0.9 * room < counted <= room
    assert pinned <= counted + (16 << 10), (
        "the cache pins more than it counts"
    )  # its own tables, whatever it holds
    assert counted <= 1.6 * pinned, "the cache counts far more than it pins"


def test_a_model_that_is_dropped_leaves_nothing_behind():
    with Traced() as traced:
        cache = TwoLevelCache(Cache(1 << 20, HOUR))
        for i in range(5000):
            put(cache, i, command(i))
        assert traced.bytes() > 900_000
        cache.drop_model(DIGEST, [])
        assert cache.memory.size_bytes == 0
        assert traced.bytes() < 16 << 10, "keys of evicted answers outlive the answers"


def test_a_kept_array_is_nobody_elses():
    cache = TwoLevelCache(Cache(100_000, HOUR))
    batch = np.zeros((4, 2), np.float32)
    own = np.zeros(3, np.float32)
    put(cache, 0, local(batch[1], own))
    batch[1] = own[:] = 7
    kept = cache.get(key(0)).answer
    assert [value.tolist() for value in kept.values] == [[0, 0], [0, 0, 0]]
    for value in kept.values:
        assert value.base is None
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 1
    assert own.flags.writeable


def test_an_answer_without_arrays_is_kept_as_it_is():
    answer = Answer((b"label", np.float32(1)), 0.5)
    assert with_own_values(answer) is answer


def test_a_view_counts_its_base():
    batch = np.zeros((64, 384), np.float32)
    assert pinned_bytes(Answer((batch[0],), None)) >= batch.nbytes
    assert pinned_bytes(Answer((batch[0].copy(),), None)) < 2000
    assert pinned_bytes(Answer((np.frombuffer(bytes(9000), np.int8, 1),), None)) >= 9000
    assert pinned_bytes(Answer((np.frombuffer(bytearray(9000), np.int8, 1),), None)) >= 9000


def test_what_comes_from_disk_is_counted_and_owned_like_the_rest():
    async def scenario():
        cache = TwoLevelCache(Cache(100_000, HOUR), fakes.Disk())
        cache.disk.kept[key(0)] = encode_outcome(view_of_a_batch(3))
        hit = await cache.read_disk(key(0), DIGEST)
        (kept,) = cache.get(key(0)).answer.values
        assert (kept.base, kept.flags.writeable) == (None, False)
        assert kept.tobytes() == hit.outcome.answer.values[0].tobytes()

    run(scenario)


# Uses


def uses(cache, i):
    return cache.memory._eviction.peek(key(i)).uses


def test_a_hit_counts_once_the_first_one_too():
    cache = TwoLevelCache(Cache(100_000, HOUR))
    put(cache, 0, command(0))
    assert uses(cache, 0) == 0
    for count in (1, 2, 3):
        assert cache.get(key(0)).origin is Origin.CACHE
        assert uses(cache, 0) == count


def test_one_request_after_the_first_does_not_make_an_answer_stay():
    """As the paper and the simulation have it: two requests while it waits in the small queue, or it goes."""
    clock = Clock()
    cache = TwoLevelCache(Cache(100 * 1000, HOUR), now_ns=clock)
    for i in range(2):
        put(cache, i, command(i))
    cache.get(key(0))
    for _ in range(2):
        cache.get(key(1))
    for i in range(2, 1000):
        put(cache, i, command(i))
    assert cache.get(key(0)) is None
    assert cache.get(key(1)) is not None


def test_an_expired_answer_that_serves_in_need_counts_once():
    clock = Clock()
    cache = TwoLevelCache(Cache(100_000, HOUR, HOUR), now_ns=clock)
    put(cache, 0, Outcome(Answer((b"v",), 0.5), Origin.CLOUD, Reason.UNSURE))
    clock.ns += HOUR
    assert cache.get(key(0)) is None
    assert cache.stale_answer(key(0), None) is not None
    assert uses(cache, 0) == 1


def test_a_cached_answer_that_is_escalated_counts_its_request_once():
    async def scenario():
        one, cloud = fakes.named(threshold=0.1), fakes.NamedCloud()
        service = fakes.service_of(one, cloud)
        await service.infer("named", None, fakes.rows_of(b"a@0.5"))
        (entry,) = service.cache.memory._eviction._entries.values()
        assert entry.uses == 0
        service.replace_model(
            dataclasses.replace(one, info=dataclasses.replace(one.info, accept_threshold=0.9))
        )
        reply = await service.infer("named", None, fakes.rows_of(b"a@0.5"))
        assert reply.parameters["origin"] == "cloud"
        assert entry.uses == 1

    fakes.run(scenario)


def test_peeking_sees_what_is_fresh_and_counts_nothing():
    clock = Clock()
    cache = TwoLevelCache(Cache(100_000, HOUR, HOUR), now_ns=clock)
    put(cache, 0, command(0))
    assert cache.peek(key(0)).origin is Origin.CACHE
    assert cache.peek(key(1)) is None
    assert uses(cache, 0) == 0
    clock.ns += HOUR
    assert cache.peek(key(0)) is None


# Ages


def test_suspended_time_makes_no_answer_younger(monkeypatch):
    """In suspend `time.monotonic` stands still; the clock of the cache does not."""
    suspended = [0]
    real = time.clock_gettime_ns
    frozen = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: frozen)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda which: real(which) + suspended[0])
    cache = TwoLevelCache(Cache(100_000, HOUR, HOUR))
    put(cache, 0, Outcome(Answer((b"v",), 0.5), Origin.CLOUD, Reason.UNSURE))
    assert cache.get(key(0)) is not None
    suspended[0] = HOUR
    assert cache.get(key(0)) is None
    assert cache.stale_answer(key(0), None) is not None
    suspended[0] = 2 * HOUR
    assert cache.stale_answer(key(0), None) is None


def test_an_answer_is_as_old_as_its_request_in_memory_and_on_disk():
    """Time that its computation took, suspended or not, counts."""

    class Disk(fakes.Disk):
        def keep(self, key, model, value, age_ns):
            self.ages.append(age_ns)

    clock = Clock()
    disk = Disk()
    disk.ages = []
    cache = TwoLevelCache(Cache(100_000, HOUR), disk, now_ns=clock)
    asked_ns = clock.ns
    clock.ns += HOUR - 10
    cache.put(asked_ns, key(0), DIGEST, 0, command(0), is_private=False)
    assert disk.ages == [HOUR - 10]
    assert cache.get(key(0)) is not None
    clock.ns += 10
    assert cache.get(key(0)) is None


def test_an_answer_does_not_get_younger_on_its_way_from_disk():
    clock = Clock()

    class Slow(fakes.Disk):
        async def find(self, key):
            found = Found(encode_outcome(command(0)), HOUR - 100)
            clock.ns += 60  # the device slept before the answer was here
            return found

    async def scenario():
        cache = TwoLevelCache(Cache(100_000, HOUR), Slow(), now_ns=clock)
        assert (await cache.read_disk(key(0), DIGEST)).is_fresh
        assert cache.get(key(0)) is not None
        clock.ns += 40
        assert cache.get(key(0)) is None

    run(scenario)


def test_a_row_that_looks_again_makes_no_other_answer_of_its_request_younger():
    """Two rows: one follows a flight that is abandoned late and then looks again, the other ends after that."""

    async def scenario():
        clock, cloud = Clock(), fakes.NamedCloud()
        service = fakes.service_of(fakes.named(), cloud, ttl_ns=HOUR)
        service.cache.now_ns = clock
        cloud.gate.clear()
        leader = asyncio.create_task(service.infer("named", None, fakes.rows_of(b"led@0.1")))
        await fakes.turns()
        both = asyncio.create_task(service.infer("named", None, fakes.rows_of(b"own@0.1", b"led@0.1")))
        await fakes.turns()
        clock.ns += HOUR // 2
        leader.cancel()
        await fakes.turns()
        cloud.gate.set()
        await both
        assert (await service.infer("named", None, fakes.rows_of(b"own@0.1"))).parameters["origin"] == "cache"
        clock.ns += HOUR // 2  # an hour after the request
        assert (await service.infer("named", None, fakes.rows_of(b"own@0.1"))).parameters["origin"] == "cloud"

    fakes.run(scenario)


# The codec


@pytest.mark.parametrize(
    "dtype", ["O", "|O8", "|V8", "<M8[s]", "<U4", "|S16", "i4,i4", "=f4", "nonsense", "<f4\0", "<f3"]
)
def test_only_numbers_are_decoded(dtype):
    assert decode_outcome(encoded("<f4", 4)).answer.values[0].tolist() == [0.0] * 4
    for shape in (1, 2, 4, 16):
        with pytest.raises(ValueError):
            decode_outcome(encoded(dtype, shape))


@pytest.mark.parametrize("shape", [-1, 3, 5, 2**60])
def test_only_shapes_that_fit_are_decoded(shape):
    with pytest.raises(ValueError):
        decode_outcome(encoded("<f4", shape))


def encoded(dtype, length):
    return msgspec.msgpack.encode([Reason.CONFIDENT, None, [[dtype, [length], bytes(16)]], [], "", None])
