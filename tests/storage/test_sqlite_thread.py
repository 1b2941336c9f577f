"""The thread that owns a database: order, batches, errors, whose file it is; with a table of its own."""

import asyncio
import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from edge_runtime.core.errors import StorageError
from edge_runtime.storage.sqlite_thread import BatchRule, DatabaseFile, SqliteThread

AT_ONCE = BatchRule(max_rows=1000, max_bytes=1 << 20, max_wait_s=0.0)
NEVER = BatchRule(max_rows=1000, max_bytes=1 << 20, max_wait_s=3600.0)


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


class Numbers:
    """A table of numbers in a file, and what happened to it."""

    def __init__(self, path, batch=AT_ONCE, **options):
        self.failures, self.upgrades, self.committed, self.batches = [], [], 0, 0
        file = DatabaseFile(path, 0x1234, 7, self._upgrade, "move it", **options)
        self.thread = SqliteThread(
            "numbers",
            file,
            batch,
            on_open=lambda _: None,
            before_commit=self._count_batch,
            on_failure=self.failures.append,
        )

    def _upgrade(self, database, version):
        self.upgrades.append(version)
        database.run("CREATE TABLE IF NOT EXISTS numbers (n INTEGER UNIQUE)")

    def _count_batch(self, _):
        self.batches += 1

    def _count_commit(self):
        self.committed += 1

    def add(self, n, size=10):
        self.thread.write(
            lambda database: database.run("INSERT INTO numbers VALUES (?)", n), size, self._count_commit
        )

    async def all(self):
        rows = await self.thread.submit(lambda database: database.rows("SELECT n FROM numbers ORDER BY n"))
        return [n for (n,) in rows]


def stored(path):
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT n FROM numbers ORDER BY n").fetchall()
    database.close()
    return [n for (n,) in rows]


def test_writes_of_one_batch_share_a_transaction_and_reads_do_not_wait_for_it(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db", NEVER)
        numbers.thread.start()
        for n in range(10):
            numbers.add(n)
        assert await numbers.all() == []  # the batch is not due, and the read does not wait for it
        assert numbers.thread.pending_bytes == 100
        await numbers.thread.close()
        assert (numbers.batches, numbers.committed, numbers.thread.pending_bytes) == (1, 10, 0)

    run(scenario)
    assert stored(tmp_path / "db") == list(range(10))


@pytest.mark.parametrize("rule", [BatchRule(3, 1 << 20, 3600), BatchRule(1000, 30, 3600), AT_ONCE])
def test_a_batch_is_due_by_rows_or_bytes_or_time(tmp_path, rule):
    async def scenario():
        numbers = Numbers(tmp_path / "db", rule)
        numbers.thread.start()
        for n in range(3):
            numbers.add(n)
        while numbers.committed < 3:
            await numbers.all()
        await numbers.thread.close()

    run(scenario)


def test_work_submitted_before_the_start_runs_first(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db")
        first = numbers.thread.submit(lambda database: threading.current_thread().name)
        numbers.thread.start()
        assert await first == "numbers"
        await numbers.thread.close()
        with pytest.raises(StorageError, match="being closed"):
            numbers.thread.submit(lambda database: None)

    run(scenario)


def test_an_error_is_reported_once_and_reaches_everybody_that_waits(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db", NEVER)
        bad = numbers.thread.submit(lambda database: database.rows("SELECT x FROM absent"))
        waiting = [numbers.thread.submit(lambda database: 1) for _ in range(3)]
        numbers.add(1)
        numbers.thread.start()
        for future in (bad, *waiting):
            with pytest.raises(StorageError, match="no such table"):
                await future
        with pytest.raises(StorageError, match="no such table"):
            numbers.thread.submit(lambda database: 1)
        numbers.add(2)
        await numbers.thread.close()
        assert len(numbers.failures) == 1
        assert numbers.committed == 0

    run(scenario)
    assert stored(tmp_path / "db") == []


def test_a_batch_that_fails_leaves_nothing_of_itself(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db", NEVER)
        numbers.thread.start()
        for n in (1, 2, 1):
            numbers.add(n)
        await numbers.thread.close()
        assert len(numbers.failures) == 1
        assert numbers.committed == 0

    run(scenario)
    assert stored(tmp_path / "db") == []


def test_a_caller_that_is_cancelled_harms_no_other(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db")
        gate, unhandled = threading.Event(), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        began = threading.Event()
        first = numbers.thread.submit(lambda database: began.set() or gate.wait(30))
        second = numbers.thread.submit(lambda database: 2)
        numbers.thread.start()
        while not began.is_set():
            await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert await second == 2
        await numbers.thread.close()
        assert unhandled == []

    run(scenario)


def test_the_file_its_log_and_its_folder_are_for_this_user_alone(tmp_path, monkeypatch):
    path = tmp_path / "state" / "db"

    async def modes():
        numbers = Numbers(path)
        numbers.thread.start()
        await numbers.all()
        found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (path.parent, *path.parent.iterdir())}
        await numbers.thread.close()
        return found

    wanted = {"state": 0o700, "db": 0o600, "db-wal": 0o600, "db-shm": 0o600}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", lambda *_: None)  # the mode is right from the first moment
        assert run(modes) == wanted
    path.chmod(0o644)
    assert run(modes) == wanted


def test_the_schema_is_brought_up_once_from_the_version_found(tmp_path):
    async def opened():
        numbers = Numbers(tmp_path / "db")
        numbers.thread.start()
        numbers.add(len(await numbers.all()))
        await numbers.thread.close()
        return numbers.upgrades

    assert run(opened) == [0]
    assert run(opened) == []
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("PRAGMA user_version = 3")
    database.close()
    assert run(opened) == [3]
    assert stored(tmp_path / "db") == [0, 1, 2]


def test_a_file_of_another_program_is_refused_with_the_users_advice(tmp_path):
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("PRAGMA application_id = 99")
    database.close()
    before = (tmp_path / "db").read_bytes()

    async def scenario():
        numbers = Numbers(tmp_path / "db")
        numbers.thread.start()
        with pytest.raises(StorageError, match="another program; move it"):
            await numbers.all()
        await numbers.thread.close()

    run(scenario)
    assert (tmp_path / "db").read_bytes() == before


async def refused(path, words):
    numbers = Numbers(path)
    numbers.thread.start()
    with pytest.raises(StorageError, match=words):
        await numbers.all()
    await numbers.thread.close()


def test_a_file_with_a_second_name_is_refused(tmp_path):
    (tmp_path / "db").touch()
    (tmp_path / "other").hardlink_to(tmp_path / "db")
    run(lambda: refused(tmp_path / "db", "one name"))
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("which", ["db", "."])
def test_a_file_or_folder_of_another_user_is_refused(tmp_path, which):
    (tmp_path / "db").touch(0o600)
    os.chown(tmp_path / which, 65534, 65534)
    run(lambda: refused(tmp_path / "db", "belongs to user 65534"))


def test_a_folder_that_every_user_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    run(lambda: refused(tmp_path / "db", "chmod o-w"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_trusted_blindly(tmp_path):
    async def scenario():
        numbers = Numbers(tmp_path / "db")
        numbers.thread.start()

        def look(database):
            return [database.pragma(name) for name in ("trusted_schema", "cell_size_check")]

        assert await numbers.thread.submit(look) == [0, 1]
        await numbers.thread.close()

    run(scenario)


def test_work_whose_caller_has_gone_is_not_done(tmp_path):
    async def scenario():
        numbers, done = Numbers(tmp_path / "db"), []
        futures = [numbers.thread.submit(lambda database, n=n: done.append(n)) for n in range(5)]
        for future in futures[1:4]:
            future.cancel()
        assert numbers.thread.pending_jobs == 5
        numbers.thread.start()
        await futures[4]
        assert done == [0, 4]
        assert numbers.thread.pending_jobs == 0
        await numbers.thread.close()

    run(scenario)


def test_each_user_of_the_thread_sets_its_own_pragmas(tmp_path):
    """As an outbox would: no shared memory beside the log, every commit synced."""

    async def scenario():
        numbers = Numbers(
            tmp_path / "db",
            connection_pragmas=("locking_mode = EXCLUSIVE",),
            file_pragmas=("page_size = 8192", "synchronous = FULL"),
        )
        numbers.thread.start()

        def look(database):
            return [database.pragma(name) for name in ("page_size", "synchronous", "journal_mode")]

        assert await numbers.thread.submit(look) == [8192, 2, "wal"]
        assert {p.name for p in tmp_path.iterdir()} == {"db", "db-wal"}
        await numbers.thread.close()

    run(scenario)
