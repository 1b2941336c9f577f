"""Answers on disk, for after a restart: one SQLite file, one thread that owns it; the only module that imports sqlite3.

It is a cache. Whatever goes wrong with the file (full, locked, corrupt, foreign, read-only) turns the store off
with one log line, and every question is answered without it. Each row carries a keyed digest of all it says,
so that a changed bit is a miss and never a wrong answer.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import sqlite3
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.core.errors import EdgeRuntimeError

_log = logging.getLogger(__name__)

_APPLICATION_ID = 0x45524143  # says in the file's header that it is ours
_SCHEMA = 2  # another one is emptied: it is a cache
_PAGE_BYTES = 4096
_LOG_BYTES = 2 << 20  # of disk_max_bytes, set aside for the write-ahead log
_CHECKPOINT_PAGES = 128  # 512 KiB: the log is folded into the file each time it is that long
_MAX_VALUE_BYTES = 64 << 10
_MAX_PENDING_BYTES = 256 << 10
_BATCH_ROWS = 64  # written at once when so many wait,
_WRITE_DELAY_S = 1.0  # or when the first has waited so long: one flash page then carries many answers
_BUSY_S = 1.0  # another process may hold the file so long
#: A look-up on the way to the cloud waits at most so long; a sound card reads a page in a few milliseconds.
LOOKUP_LIMIT_S = 0.05

_CREATE = """CREATE TABLE answers (
  key BLOB PRIMARY KEY, model TEXT NOT NULL, boot TEXT NOT NULL, since_boot_ns INTEGER NOT NULL,
  unix_s INTEGER NOT NULL, value BLOB NOT NULL, tag BLOB NOT NULL)"""
_INSERT = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT model, boot, since_boot_ns, unix_s, value, tag FROM answers WHERE key = ?"
_TRIM = "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers ORDER BY rowid LIMIT 64)"


class StoreUnfit(EdgeRuntimeError):  # noqa: N818 - the fact it states
    """The file cannot serve; the message says why and how to mend it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A time that can be compared with one before a restart: exact within a boot, by the wall clock across boots."""

    boot: str
    since_boot_ns: int
    unix_s: int

    def age_ns(self, then: "Moment") -> int | None:
        """How long ago `then` was; None where the clock runs before it, so that nobody can tell."""
        if self.boot == then.boot:
            age = self.since_boot_ns - then.since_boot_ns
        else:
            age = (self.unix_s - then.unix_s) * 1_000_000_000
        return age if age >= 0 else None


@dataclass(frozen=True, slots=True)
class Found:
    """A kept value and how old it is."""

    value: bytes
    age_ns: int


@dataclass(slots=True)
class _Lookup:
    key: bytes
    answer: "Callable[[Found | None], None]"


@dataclass(slots=True)
class _Write:
    key: bytes
    model: str
    value: bytes


class AnswerStore:
    """Values by key in a file of at most `max_bytes`; the oldest go first. Create inside the running loop."""

    def __init__(self, path: Path, max_bytes: int, *, now: Callable[[], Moment] | None = None) -> None:
        """`path` gets a neighbour `.secret` that keys everything in it; `now` is for tests."""
        self._path = path
        self._max_bytes = max_bytes - _LOG_BYTES
        self._boot = _boot_id()
        self._now = now or self._moment
        self._wake = threading.Condition()
        self._lookups: deque[_Lookup] = deque()
        self._writes: list[_Write] = []
        self._pending_bytes = 0
        self._oldest_write_s = 0.0
        self._models: frozenset[str] | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self.why_off = ""
        self.size_bytes = 0
        self.lookup_ns = 0
        self.counters = dict.fromkeys(("found", "absent", "late", "kept", "dropped", "damaged"), 0)
        self.secret = secrets.token_bytes(32)
        try:
            self.secret = read_or_make_secret(path.with_name(path.name + ".secret"))
        except (OSError, StoreUnfit) as error:
            self._turn_off(error)

    @property
    def is_on(self) -> bool:
        """Whether look-ups can find anything."""
        return not self.why_off

    async def start(self) -> None:
        """Open the file, and measure what a look-up costs: `lookup_ns`, there and back again."""
        if not self.is_on:
            return
        self._thread = threading.Thread(target=self._run, name="answer-store", daemon=True)
        self._thread.start()
        await self.find(secrets.token_bytes(16), limit_s=30.0)  # opening is not looking up
        times = []
        for _ in range(9):
            started_ns = time.perf_counter_ns()
            await self.find(secrets.token_bytes(16), limit_s=1.0)
            times.append(time.perf_counter_ns() - started_ns)
        self.lookup_ns = int(statistics.median(times))
        self.counters["absent"] = self.counters["late"] = 0

    async def find(self, key: bytes, *, limit_s: float = LOOKUP_LIMIT_S) -> Found | None:
        """The value of `key`, or None: absent, damaged, or not read within `limit_s`."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Found | None] = loop.create_future()

        def answer(found: Found | None) -> None:
            if not waiting.done():
                waiting.set_result(found)

        def answer_on_loop(found: Found | None) -> None:
            with suppress(RuntimeError):  # the loop may have ended while the file was read
                loop.call_soon_threadsafe(answer, found)

        with self._wake:
            if not self.is_on or self._is_closing:
                return None
            self._lookups.append(_Lookup(key, answer_on_loop))
            self._wake.notify()
        try:
            async with asyncio.timeout(limit_s):
                found = await waiting
        except TimeoutError:
            self.counters["late"] += 1
            return None
        self.counters["found" if found is not None else "absent"] += 1
        return found

    def keep(self, key: bytes, model: str, value: bytes) -> None:
        """Write soon. What comes faster than the disk takes it, or is too large, is dropped."""
        size = len(value) + 200
        with self._wake:
            is_room = self._pending_bytes + size <= _MAX_PENDING_BYTES and len(value) <= _MAX_VALUE_BYTES
            if not self.is_on or not is_room:
                self.counters["dropped"] += 1
                return
            if not self._writes:
                self._oldest_write_s = time.monotonic()
            self._writes.append(_Write(key, model, value))
            self._pending_bytes += size
            if len(self._writes) == 1 or self._is_full():
                self._wake.notify()

    def retain_models(self, models: Collection[str]) -> None:
        """Drop what belongs to other models than these."""
        with self._wake:
            self._models = frozenset(models)
            self._wake.notify()

    async def close(self) -> None:
        """Write what waits, and let go of the file."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10.0)

    def status(self) -> dict[str, object]:
        """For `edge-runtime status`."""
        return {
            "state": "on" if self.is_on else "off",
            "why_off": self.why_off or None,
            "bytes": self.size_bytes,
            "lookup_us": round(self.lookup_ns / 1e3, 1),
            **self.counters,
        }

    def _moment(self) -> Moment:
        return Moment(self._boot, time.monotonic_ns(), int(time.time()))

    def _turn_off(self, error: Exception) -> None:
        """For good: a cache that comes and goes helps nobody. Whoever waits is answered with nothing."""
        with self._wake:
            if self.why_off:
                return
            self.why_off = str(error) or type(error).__name__
            lookups, self._lookups = self._lookups, deque()
            self._writes.clear()
        _log.warning("event=answer_store_off path=%s why=%s", self._path, self.why_off)
        for lookup in lookups:
            lookup.answer(None)

    # What follows runs in the owning thread.

    def _run(self) -> None:
        try:
            with closing(_open(self._path, self._max_bytes)) as database:
                while self._serve_once(database):
                    pass
        except (sqlite3.OperationalError, OSError, StoreUnfit) as error:
            self._turn_off(error)
        except sqlite3.Error as error:
            self._turn_off(StoreUnfit(f"{error}; remove the file to begin anew"))

    def _serve_once(self, database: sqlite3.Connection) -> bool:
        """Wait for work and do it, look-ups first; False at the end."""
        with self._wake:
            while not (self._lookups or self._models is not None or self._is_closing or self._is_due()):
                self._wake.wait(self._patience_s())
            lookups, self._lookups = self._lookups, deque()
            models, self._models = self._models, None
            writes: list[_Write] = []
            is_closing = self._is_closing
            if self._is_due() or is_closing:
                writes, self._writes = self._writes, []
                self._pending_bytes = 0
        try:
            if models is not None:
                marks = ", ".join("?" * len(models))
                database.execute(f"DELETE FROM answers WHERE model NOT IN ({marks})", tuple(models))  # noqa: S608
            while lookups:
                lookups[0].answer(self._look_up(database, lookups[0].key))
                lookups.popleft()
        finally:
            for lookup in lookups:
                lookup.answer(None)
        if writes:
            self._write(database, writes)
        return not is_closing

    def _is_due(self) -> bool:
        return bool(self._writes) and (self._is_full() or self._patience_s() == 0)

    def _is_full(self) -> bool:
        return len(self._writes) >= _BATCH_ROWS or self._pending_bytes >= _MAX_PENDING_BYTES // 2

    def _patience_s(self) -> float | None:
        if not self._writes:
            return None
        return max(0.0, self._oldest_write_s + _WRITE_DELAY_S - time.monotonic())

    def _look_up(self, database: sqlite3.Connection, key: bytes) -> Found | None:
        row = database.execute(_SELECT, (key,)).fetchone()
        if row is None:
            return None
        tag = row[-1]
        if tag != self._tag(key, *row[:-1]):
            self.counters["damaged"] += 1
            return None
        age_ns = self._now().age_ns(Moment(*row[1:4]))
        return None if age_ns is None else Found(row[4], age_ns)

    def _write(self, database: sqlite3.Connection, writes: list[_Write]) -> None:
        now = self._now()
        rows = []
        for write in writes:
            fields = (write.model, now.boot, now.since_boot_ns, now.unix_s, write.value)
            rows.append((write.key, *fields, self._tag(write.key, *fields)))
        database.execute("BEGIN IMMEDIATE")
        database.executemany(_INSERT, rows)
        # A tenth stays free: a batch fits without asking first.
        while _used_bytes(database) > self._max_bytes * 9 // 10:
            database.execute(_TRIM)
        database.execute("COMMIT")
        self.counters["kept"] += len(rows)
        self.size_bytes = _used_bytes(database)

    def _tag(self, *fields: object) -> bytes:
        """A keyed digest of a row's key and fields, whatever their types: what a flipped bit turns them into."""
        keyed = hashlib.blake2b(digest_size=16, key=self.secret, person=b"er-answer-v1")
        for field in fields:
            raw = field if isinstance(field, bytes) else repr(field).encode("utf-8", "backslashreplace")
            keyed.update(len(raw).to_bytes(8, "little") + raw)
        return keyed.digest()


def _open(path: Path, max_bytes: int) -> sqlite3.Connection:
    """Open or make the file, for this user alone. Raises StoreUnfit, OSError, sqlite3.Error."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    try:
        _prepare(database, path, max_bytes)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, max_bytes: int) -> None:
    """Make sure that the file is ours, of this schema and within its bounds."""
    database.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")  # as a flipped bit left it
    owner = _pragma(database, "application_id")
    is_empty = owner == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchone()
    if owner != _APPLICATION_ID and not is_empty:
        raise StoreUnfit("the file belongs to another program; give another path in [cache] path")
    path.chmod(0o600)  # its log takes the same mode
    database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    if _pragma(database, "journal_mode = WAL") != "wal":
        raise StoreUnfit("the file system has no shared memory for the log; give a path elsewhere")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    database.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    database.execute("PRAGMA cache_size = -256")  # KiB: the system caches the file already
    is_too_large = path.stat().st_size > max_bytes  # the limit was lowered
    database.execute("BEGIN IMMEDIATE")
    if is_too_large or _pragma(database, "user_version") != _SCHEMA:
        database.execute("DROP TABLE IF EXISTS answers")
        database.execute(_CREATE)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {_SCHEMA}")
    database.execute("COMMIT")
    if is_too_large:
        database.execute("VACUUM")
    database.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")


def _pragma(database: sqlite3.Connection, text: str) -> object:
    return database.execute(f"PRAGMA {text}").fetchone()[0]


def _used_bytes(database: sqlite3.Connection) -> int:
    pages: int = database.execute("PRAGMA page_count").fetchone()[0]
    free: int = database.execute("PRAGMA freelist_count").fetchone()[0]
    return (pages - free) * _PAGE_BYTES


def read_or_make_secret(path: Path) -> bytes:
    """The 32 bytes in `path`, made at first. Raises OSError, and StoreUnfit where others may read them."""
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, secrets.token_bytes(32))
                os.fsync(file)
                os.link(aside, path)  # whole or not at all, and only the first of two daemons
            finally:
                os.close(file)
                aside.unlink()
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise StoreUnfit(f"{path.name} may be read by others; run chmod 600 on it, or remove both files")
    secret = path.read_bytes()
    if len(secret) != 32:
        raise StoreUnfit(f"{path.name} does not hold 32 bytes; remove it and the file beside it")
    return secret


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return secrets.token_hex(8)  # no way to tell boots apart: across restarts the wall clock counts
