"""One SQLite file and the thread that owns it; the only module that imports sqlite3.

The module knows nothing of tables. Its user describes the file (`DatabaseFile`) and submits work as functions of a
`Database`: `submit` for work with a result, `write` for work that may share a transaction with other
work. One thread per file, because an SQLite connection belongs to one thread and a look-up must never wait for the
flash memory on the event loop.

Order inside the thread: everything from `submit` comes first, in its order; then, when a batch is due, all
waiting writes in one transaction. A commit costs flash pages (about 29 kB for one row alone, 2 kB for one row of 64),
so `BatchRule` decides how long a write may wait for others. A rule with `max_wait_s` 0 commits whatever arrived while
the former commit ran, which is group commit.

The first error of the file ends the thread: the user's `on_failure` is called once, and then everything that waits
gets the error. Whether the user lives on without the file is the user's rule.
"""

import asyncio
import os
import sqlite3
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from edge_runtime.core.errors import StorageError
from edge_runtime.storage.files import check_owner, check_state

T = TypeVar("T")
#: A file may have been changed by hand or by a fault: its schema may call no function with side effects, and a damaged
#: page is found when it is read.
_DISTRUST = ("trusted_schema = OFF", "cell_size_check = ON")


@dataclass(frozen=True, slots=True)
class DatabaseFile:
    """What an SQLite file must be, and how it is opened.

    `application_id` stands in the file's header and says whose file it is: a file with another one, or with none and
    with tables, is left alone. `foreign_advice` completes the refusal's sentence. `upgrade` gets the file's schema
    version (0: a new file) inside a transaction and brings it to `schema_version`. `connection_pragmas` are set before
    the file is looked at and write nothing; `file_pragmas` only to a file that is ours.
    """

    path: Path
    application_id: int
    schema_version: int
    upgrade: "Callable[[Database, int], None]"
    foreign_advice: str
    connection_pragmas: tuple[str, ...] = ()
    file_pragmas: tuple[str, ...] = ()
    busy_s: float = 1.0  # how long another process may hold the file


@dataclass(frozen=True, slots=True)
class BatchRule:
    """When waiting writes are committed: this many rows, this many bytes, or the first has waited this long."""

    max_rows: int
    max_bytes: int
    max_wait_s: float


class Database:
    """The open file, as work sees it. Lives in the owning thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of one statement."""
        return self._connection.execute(sql, values).fetchall()

    def run(self, sql: str, *values: object) -> None:
        """Run one statement."""
        self._connection.execute(sql, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit at the end of the block, roll back at an exception."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):  # the first error is the one to report
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def pragma(self, text: str) -> object:
        """The value of a pragma, or what setting it returns."""
        return self._connection.execute(f"PRAGMA {text}").fetchone()[0]

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use; free pages inside the file are left out."""
        pages, free = self.pragma("page_count"), self.pragma("freelist_count")
        size = self.pragma("page_size")
        assert isinstance(pages, int)
        assert isinstance(free, int)
        assert isinstance(size, int)
        return (pages - free) * size


@dataclass(slots=True)
class _Job(Generic[T]):
    """Work with a result, and the future of its caller on another loop."""

    work: Callable[[Database], T]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[T]"

    def finish(self, result: T | None, error: Exception | None) -> None:
        """Hand the outcome to the loop of the caller, from any thread."""
        with suppress(RuntimeError):  # the loop may have been closed while the file was read
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: T | None, error: Exception | None) -> None:
        if self.future.done():  # the caller was cancelled or timed out meanwhile
            return
        if error is not None:
            self.future.set_exception(error)
            self.future.exception()  # mark as retrieved: the caller may be gone
        else:
            self.future.set_result(result)  # type: ignore[arg-type] # None only where T is None


@dataclass(slots=True)
class _Waiting:
    """Writes that wait for their batch."""

    writes: list[tuple[Callable[[Database], None], Callable[[], None]]] = field(default_factory=list)
    size_bytes: int = 0
    oldest_s: float = 0.0


class SqliteThread:
    """Owns one database file from `start` to `close`. `submit` belongs to an event loop, the rest to any thread."""

    def __init__(
        self,
        name: str,
        file: DatabaseFile,
        batch: BatchRule,
        *,
        on_open: Callable[[Database], None],
        before_commit: Callable[[Database], None],
        on_failure: Callable[[StorageError], None],
    ) -> None:
        """`on_open` runs once the file is checked, `before_commit` at the end of each batch inside its transaction,
        `on_failure` at the first error: all of them in the thread.
        """
        self._name = name
        self._file = file
        self._batch = batch
        self._on_open = on_open
        self._before_commit = before_commit
        self._on_failure = on_failure
        self._wake = threading.Condition()
        self._jobs: deque[_Job[Any]] = deque()
        self._waiting = _Waiting()
        self._is_closing = False
        self._error: StorageError | None = None
        self._thread: threading.Thread | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of writes that wait, as their callers stated them."""
        return self._waiting.size_bytes

    @property
    def pending_jobs(self) -> int:
        """How many jobs wait for the thread, also those whose callers have gone."""
        return len(self._jobs)

    def start(self) -> None:
        """Open the file in the thread; an error is reported through `on_failure`."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Database], T]) -> "asyncio.Future[T]":
        """Run `work` before waiting writes; the future of the running loop gets its result, or a StorageError.

        Work submitted before `start` runs once the file is open. Raises StorageError where the file cannot serve.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._wake:
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise StorageError("the file is being closed")
            self._jobs.append(_Job(work, loop, future))
            self._wake.notify()
        return future

    def write(self, work: Callable[[Database], None], size_bytes: int, on_commit: Callable[[], None]) -> None:
        """Run `work` in the next batch, and `on_commit` in the thread once that is on disk.

        After a failure or `close` the write is dropped.
        """
        with self._wake:
            if self._error is not None or self._is_closing:
                return
            waiting = self._waiting
            if not waiting.writes:
                waiting.oldest_s = time.monotonic()
            waiting.writes.append((work, on_commit))
            waiting.size_bytes += size_bytes
            if len(waiting.writes) == 1 or self._is_full():
                self._wake.notify()

    async def close(self, limit_s: float = 10.0) -> None:
        """Commit what waits and close the file, within `limit_s`."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, limit_s)

    # What follows runs in the owning thread.

    def _run(self) -> None:
        try:
            with closing(_open(self._file)) as connection:
                database = Database(connection)
                self._on_open(database)
                while self._serve_once(database):
                    pass
        except StorageError as error:
            self._fail(error)
        except (sqlite3.OperationalError, OSError) as error:
            self._fail(StorageError(str(error) or type(error).__name__))
        except sqlite3.Error as error:
            self._fail(StorageError(f"{error}; remove the file to start with an empty one"))
        except Exception as error:
            # A fault of the work itself. Without this, callers that wait for a result would wait for ever.
            self._fail(StorageError(f"a fault in this program: {error!r}"))
            raise

    def _fail(self, error: StorageError) -> None:
        with self._wake:
            self._error = error
            jobs, self._jobs = self._jobs, deque()
            self._waiting = _Waiting()
        self._on_failure(error)
        for job in jobs:
            job.finish(None, error)

    def _serve_once(self, database: Database) -> bool:
        """Wait for work and do it; False when the thread is to end."""
        with self._wake:
            while not (self._jobs or self._is_closing or self._is_due()):
                self._wake.wait(self._patience_s())
            jobs, self._jobs = self._jobs, deque()
            is_closing = self._is_closing
            batch = _Waiting()
            if self._is_due() or is_closing:
                batch, self._waiting = self._waiting, batch
        try:
            while jobs:
                if not jobs[0].future.cancelled():  # a caller that timed out needs no answer
                    jobs[0].finish(jobs[0].work(database), None)
                jobs.popleft()
        finally:
            # At an error the rest goes back to the queue, where `_fail` answers it.
            with self._wake:
                self._jobs.extendleft(reversed(jobs))
        if batch.writes:
            with database.transaction():
                for work, _ in batch.writes:
                    work(database)
                self._before_commit(database)
            for _, on_commit in batch.writes:
                on_commit()
        return not is_closing

    def _is_due(self) -> bool:
        return bool(self._waiting.writes) and (self._is_full() or self._patience_s() == 0)

    def _is_full(self) -> bool:
        return len(self._waiting.writes) >= self._batch.max_rows or (
            self._waiting.size_bytes >= self._batch.max_bytes
        )

    def _patience_s(self) -> float | None:
        if not self._waiting.writes:
            return None
        return max(0.0, self._waiting.oldest_s + self._batch.max_wait_s - time.monotonic())


def _open(file: DatabaseFile) -> sqlite3.Connection:
    """Open or make the file, for this user alone. Raises StorageError, OSError, sqlite3.Error."""
    file.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(file.path.parent)
    # SQLite would make the file with the umask's mode; O_NOFOLLOW refuses a link that somebody placed here.
    handle = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        state = os.fstat(handle)
    finally:
        os.close(handle)
    check_state(file.path.name, state)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        raise StorageError(
            f"{file.path.name} is not a plain file of one name; remove it or give another path"
        )
    connection = sqlite3.connect(file.path, timeout=file.busy_s, isolation_level=None)
    try:
        _prepare(connection, file)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, file: DatabaseFile) -> None:
    """Check whose file it is, then set it up and bring it to its schema."""
    connection.text_factory = lambda raw: raw.decode(
        "utf-8", "backslashreplace"
    )  # a flipped bit must not raise
    database = Database(connection)
    for text in (*_DISTRUST, *file.connection_pragmas):
        database.run(f"PRAGMA {text}")
    owner = database.pragma("application_id")
    is_empty = owner == 0 and not database.rows("SELECT 1 FROM sqlite_master LIMIT 1")
    if owner != file.application_id and not is_empty:
        raise StorageError(f"the file belongs to another program; {file.foreign_advice}")
    # A write-ahead log takes the mode that the file had when it was first read, a few lines above.
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            file.path.with_name(file.path.name + suffix).chmod(0o600)
    for text in file.file_pragmas:
        database.run(f"PRAGMA {text}")
    if database.pragma("journal_mode = WAL") != "wal":
        raise StorageError(
            "the file system offers no shared memory for the write-ahead log; give a path elsewhere"
        )
    with database.transaction():
        version = database.pragma("user_version")
        if version != file.schema_version:
            assert isinstance(version, int)
            file.upgrade(database, version)
            database.run(f"PRAGMA application_id = {file.application_id}")
            database.run(f"PRAGMA user_version = {file.schema_version}")
