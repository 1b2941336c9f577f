"""The disk level of the cache: real files, real faults, and never a wrong answer."""

import asyncio
import gc
import hashlib
import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.caching.answer_store import AnswerStore, Moment
from edge_runtime.caching.outcome_codec import decode_outcome, encode_outcome
from edge_runtime.core.messages import Answer, Origin, Reason
from edge_runtime.core.outcome import Outcome

LIMIT = 8 << 20


def name(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


def value(i):
    return b"answer %d " % i * 20


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


class Opened:
    """A store inside `async with`, its file opened before and closed after."""

    def __init__(self, path, limit=LIMIT, **options):
        self.store = AnswerStore(path, limit, **options)

    async def __aenter__(self):
        await self.store.start()
        return self.store

    async def __aexit__(self, *_):
        await self.store.close()


async def fill(path, count, model="m", limit=LIMIT):
    async with Opened(path, limit) as store:
        for i in range(count):
            store.keep(name(i), model, value(i))
            if i % 256 == 255:  # faster than the disk is dropped: let it catch up
                while store.counters["kept"] + store.counters["dropped"] < i + 1 and store.is_on:
                    await store.find(name(0), limit_s=1)
    return store


async def found(store, count):
    hits = {}
    for i in range(count):
        kept = await store.find(name(i), limit_s=10)
        if kept is not None:
            hits[i] = kept.value
    return hits


def test_answers_outlive_the_process_and_are_for_this_user_alone(tmp_path):
    path = tmp_path / "state" / "answers.db"

    async def scenario():
        await fill(path, 50)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
        assert modes == {"answers.db": 0o600, "answers.db.secret": 0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        async with Opened(path) as store:
            assert stat.S_IMODE(path.with_name("answers.db-wal").stat().st_mode) == 0o600
            assert await found(store, 51) == {i: value(i) for i in range(50)}
            assert store.lookup_ns > 0

    run(scenario)


def test_models_that_are_not_loaded_any_more_are_dropped(tmp_path):
    path = tmp_path / "answers.db"

    async def scenario():
        await fill(path, 10, "old")
        async with Opened(path) as store:
            store.keep(name(20), "new", b"n")
        async with Opened(path) as store:
            store.retain_models(["new"])
            assert await found(store, 21) == {20: b"n"}

    run(scenario)


def test_age_is_exact_within_a_boot_and_by_the_wall_clock_across():
    then = Moment("boot 1", 100, 1_000)
    assert Moment("boot 1", 400, 99_999).age_ns(then) == 300
    assert Moment("boot 2", 5, 1_060).age_ns(then) == 60 * 10**9
    assert Moment("boot 2", 5, 10).age_ns(then) is None  # no clock after a power cut: nobody can tell


def test_what_the_clock_cannot_date_is_not_found(tmp_path):
    path = tmp_path / "answers.db"
    moments = [Moment("a", 1000, 5000)]

    async def scenario():
        async with Opened(path, now=lambda: moments[-1]) as store:
            store.keep(name(1), "m", b"v")
        async with Opened(path, now=lambda: moments[-1]) as store:
            assert (await store.find(name(1))).age_ns == 0
            moments.append(Moment("a", 1500, 1))
            assert (await store.find(name(1))).age_ns == 500
            moments.append(Moment("b", 10, 5010))
            assert (await store.find(name(1))).age_ns == 10 * 10**9
            moments.append(Moment("b", 10, 4999))
            assert await store.find(name(1)) is None

    run(scenario)


def test_an_answer_ages_from_its_request_and_not_from_its_write(tmp_path):
    """A write waits for its batch, and the device may be suspended meanwhile."""
    path = tmp_path / "answers.db"
    moments = [Moment("a", 10**12, 5000)]

    async def scenario():
        async with Opened(path, now=lambda: moments[-1]) as store:
            store.keep(name(1), "m", b"v", 7_000_000_001)
            moments.append(Moment("a", 10**12 + 100, 5000))
        async with Opened(path, now=lambda: moments[-1]) as store:
            assert (await store.find(name(1))).age_ns == 7_000_000_101
            moments.append(Moment("b", 1, 5001))
            assert (await store.find(name(1))).age_ns == 9 * 10**9  # whole seconds, rounded up

    run(scenario)


def test_suspended_time_counts_on_disk(tmp_path, monkeypatch):
    suspended = [0]
    real = time.clock_gettime_ns
    monkeypatch.setattr(time, "clock_gettime_ns", lambda which: real(which) + suspended[0])

    async def scenario():
        async with Opened(tmp_path / "answers.db") as store:
            store.keep(name(1), "m", b"v")
        suspended[0] = 3600 * 10**9
        async with Opened(tmp_path / "answers.db") as store:
            assert (await store.find(name(1))).age_ns >= 3600 * 10**9

    run(scenario)


def test_the_file_and_its_log_stay_within_the_limit_and_the_oldest_go(tmp_path):
    path = tmp_path / "answers.db"

    async def scenario():
        async with Opened(path, 4 << 20) as store:
            for i in range(1500):
                store.keep(name(i), "m", random.Random(i).randbytes(4000))
                if i % 32 == 31:
                    while store.counters["kept"] < i + 1:
                        assert store.is_on, store.why_off
                        await store.find(name(0), limit_s=5)
                    total = sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".db-shm")
                    assert total <= 4 << 20
        async with Opened(path, 4 << 20) as store:
            hits = await found(store, 1500)
            assert min(hits) > 0
            assert sorted(hits) == list(range(min(hits), 1500))

    run(scenario)


def test_a_lowered_limit_empties_a_file_that_is_beyond_it(tmp_path):
    path = tmp_path / "answers.db"

    async def scenario():
        await fill(path, 12_000, limit=16 << 20)
        assert path.stat().st_size > 2 << 20
        async with Opened(path, 4 << 20) as store:
            assert store.is_on
            assert await found(store, 100) == {}
        assert path.stat().st_size < 1 << 20

    run(scenario)


def test_what_is_too_large_or_too_fast_is_dropped_and_counted(tmp_path):
    async def scenario():
        async with Opened(tmp_path / "answers.db") as store:
            store.keep(name(0), "m", bytes(1 << 20))
            for i in range(60):
                store.keep(name(i), "m", bytes(10_000))
            assert store.counters["dropped"] > 30

    run(scenario)


PROGRAM = """
import asyncio, concurrent.futures.thread, os, resource, signal, sys
from pathlib import Path
from tests.caching.test_answer_store import name, value
from edge_runtime.caching.answer_store import AnswerStore
async def main():
    if user := int(sys.argv[3]):
        os.seteuid(user)
    store = AnswerStore(Path(sys.argv[1]), 8 << 20)
    await store.start()
    limit = int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    i = 0
    while store.is_on:
        for _ in range(64):
            store.keep(name(i), "m", value(i)); i += 1
        await store.find(name(0), limit_s=5)
        print(store.counters["kept"], flush=True)
    await store.close()
    print("off", store.why_off, flush=True)
asyncio.run(main())
"""


def writer(path, limit=0, user=0, **options):
    command = [sys.executable, "-c", PROGRAM, path, str(limit), str(user)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here, **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_in_mid_write_leaves_whole_answers(tmp_path, seed):
    path = tmp_path / "answers.db"
    process = writer(path)
    written = 0
    while written < 200 + 150 * seed:
        written = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    async def scenario():
        async with Opened(path) as store:
            hits = await found(store, 3000)
            assert len(hits) >= written  # what was committed is there: only power cuts lose it
            assert all(kept == value(i) for i, kept in hits.items())
            store.keep(name(9999), "m", b"more")
        async with Opened(path) as store:
            assert (await store.find(name(9999))).value == b"more"

    run(scenario)


def test_a_full_disk_turns_it_off_with_one_line_and_what_is_there_stays_true(tmp_path):
    path = tmp_path / "answers.db"
    process = writer(path, 300_000, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[-1].startswith("off ")
    assert errors.count("answer_store_off") == 1

    async def scenario():
        async with Opened(path) as store:
            hits = await found(store, 500)
            assert hits
            assert all(kept == value(i) for i, kept in hits.items())

    run(scenario)


def test_two_daemons_share_one_file(tmp_path):
    """Both start at once, on no file at all."""
    path = tmp_path / "answers.db"
    processes = [writer(path) for _ in range(2)]
    for process in processes:
        while int(process.stdout.readline()) < 300:
            pass
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()

    async def scenario():
        async with Opened(path) as store:
            hits = await found(store, 300)
            assert hits == {i: value(i) for i in range(300)}

    run(scenario)


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_byte_is_a_miss_or_an_end_and_never_another_answer(tmp_path, seed):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 120))
    raw = bytearray(path.read_bytes())
    rng = random.Random(seed)
    for _ in range(1 + seed % 5):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)

    async def scenario():
        async with Opened(path) as store:
            hits = await found(store, 120)
            assert all(kept == value(i) for i, kept in hits.items())
            store.keep(name(500), "m", b"new")
        assert store.is_on or store.why_off

    run(scenario)


def test_an_answer_whose_bits_changed_is_not_given(tmp_path):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 3))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET value = 'other' WHERE key = ?", (name(0),))
        database.execute(
            "UPDATE answers SET unix_s = unix_s + 5, since_boot_ns = since_boot_ns + 5 WHERE key = ?",
            (name(1),),
        )
        database.execute("UPDATE answers SET key = ? WHERE key = ?", (name(7), name(2)))
    database.close()

    async def scenario():
        async with Opened(path) as store:
            assert await found(store, 10) == {}
            assert store.counters["damaged"] == 3

    run(scenario)


def foreign(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()


def no_database(path):
    path.write_bytes(b"a letter to my mother, which is longer than a header of a database is" * 100)


def a_folder(path):
    path.mkdir()


def a_link(path):
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [foreign, no_database, a_folder, a_link])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, caplog, spoil):
    path = tmp_path / "answers.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None

    async def scenario():
        with caplog.at_level(logging.WARNING):
            async with Opened(path) as store:
                assert await found(store, 3) == {}
                store.keep(name(0), "m", b"v")
        assert not store.is_on
        assert store.status()["why_off"]

    run(scenario)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "event=answer_store_off" in caplog.text
    assert before is None or path.read_bytes() == before


def test_a_file_of_another_schema_is_emptied(tmp_path):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 3))
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("ALTER TABLE answers ADD COLUMN more")
    database.close()

    async def scenario():
        async with Opened(path) as store:
            assert await found(store, 3) == {}
            store.keep(name(0), "m", b"v")
        async with Opened(path) as store:
            assert await found(store, 3) == {0: b"v"}

    run(scenario)


def test_a_locked_file_costs_a_bounded_wait_and_then_nothing(tmp_path):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 3))
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        holder.execute("DELETE FROM answers")

        async def scenario():
            async with Opened(path) as store:
                assert not store.is_on
                assert "locked" in store.why_off
                assert await found(store, 100) == {}

        run(scenario)
    holder.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_a_file_that_cannot_be_written_turns_it_off(tmp_path):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 3))
    tmp_path.chmod(0o755)
    path.chmod(0o444)
    os.chown(path.with_name("answers.db.secret"), 65534, 65534)
    before = path.read_bytes()
    process = writer("answers.db", user=65534, stderr=subprocess.PIPE, cwd=tmp_path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.startswith("off ")
    assert errors.count("answer_store_off") == 1
    assert path.read_bytes() == before


def test_a_look_up_waits_no_longer_than_it_may(tmp_path):
    async def scenario():
        started = []

        def slow():
            if started:
                time.sleep(0.3)  # a card that takes its time: the look-up below must not
            return Moment("a", 1, 1)

        async with Opened(tmp_path / "answers.db", now=slow) as store:
            store.keep(name(0), "m", b"v")
            for i in range(64):
                store.keep(name(i), "m", b"v")
            while not store.counters["kept"]:
                await store.find(name(99), limit_s=1)
            started.append(True)
            assert await store.find(name(0), limit_s=0.01) is None
            assert store.counters["late"] == 1
            started.clear()
            assert (await store.find(name(0), limit_s=30)).value == b"v"

    run(scenario)


def test_a_disk_that_stands_still_gathers_no_look_ups(tmp_path):
    async def scenario():
        store = AnswerStore(tmp_path / "answers.db", LIMIT)  # whose thread does not run yet
        waiting = [asyncio.create_task(store.find(name(i), limit_s=30)) for i in range(1000)]
        await asyncio.sleep(0)
        assert store._thread.pending_jobs == 256
        assert store.counters["late"] == 744
        await store.start()
        assert await asyncio.gather(*waiting) == [None] * 1000
        await store.close()

    run(scenario)


def test_what_waits_to_be_written_is_counted_with_its_objects(tmp_path):
    async def scenario():
        store = AnswerStore(tmp_path / "answers.db", LIMIT)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(250):
            store.keep(name(i), f"{i:064}", b"%d" % i, i)
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert store.counters["dropped"] == 0
        assert taken <= store._thread.pending_bytes <= 1.5 * taken
        await store.close()

    run(scenario)


def test_the_size_of_a_file_is_known_from_the_start(tmp_path):
    async def scenario():
        before = (await fill(tmp_path / "answers.db", 500)).size_bytes
        assert before > 100_000
        async with Opened(tmp_path / "answers.db") as store:
            assert store.size_bytes == before

    run(scenario)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("which", ["answers.db", "answers.db.secret", "."])
def test_what_another_user_owns_turns_it_off(tmp_path, which):
    path = tmp_path / "answers.db"
    run(lambda: fill(path, 3))
    os.chown(tmp_path / which, 65534, 65534)

    async def scenario():
        async with Opened(path) as store:
            assert await found(store, 3) == {}
        assert "belongs to user 65534" in store.why_off

    run(scenario)


def test_a_field_of_another_type_has_another_digest(tmp_path):
    """A flipped bit can make a text of bytes."""

    async def scenario():
        store = AnswerStore(tmp_path / "answers.db", LIMIT)
        parts = [(b"a",), ("a",), (b"'a'",), ("'a'",), (b"a", b""), (b"", b"a"), (1,), ("1",), (None,)]
        assert len({store._tag(*fields) for fields in parts}) == len(parts)
        await store.close()

    run(scenario)


ARRAYS = [
    np.random.default_rng(1).normal(size=384).astype(np.float32),
    np.arange(12, dtype=np.int8).reshape(3, 4),
    np.float32(0.1),
    np.array([np.nan, -0.0, np.inf], ">f8"),
    np.zeros((0, 3), np.float16),
    np.array(True),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back_bit_equal(array):
    outcome = Outcome(
        Answer((b"label", array), 0.25, (np.asarray(array),)), Origin.CLOUD, Reason.UNSURE, 1, 2, 3, "7"
    )
    back = decode_outcome(encode_outcome(outcome))
    assert (back.origin, back.reason, back.cloud_version) == (Origin.CACHE, Reason.UNSURE, "7")
    assert (back.queue_ns, back.infer_ns, back.cloud_ns) == (0, 0, 0)
    assert (back.answer.values[0], back.answer.confidence) == (b"label", 0.25)
    for came in (back.answer.values[1], back.answer.extras[0]):
        assert (came.dtype, came.shape, came.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_bytes_that_are_no_outcome_are_refused(cut):
    raw = encode_outcome(Outcome(Answer((ARRAYS[0],), None), Origin.LOCAL, Reason.CONFIDENT))
    for bad in (raw[:cut], raw + b"x", b"\x91" * 5000):
        with pytest.raises(ValueError):
            decode_outcome(bad)
