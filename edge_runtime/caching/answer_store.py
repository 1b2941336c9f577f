"""The answers that outlive the process: one table in an SQLite file, and the rules of that table.

The table is a cache, which decides its rules. Whatever goes wrong with the file (full, locked, corrupt, of another
program, read-only) turns the store off for the life of the process with one log line, and every request is answered
without it. What comes faster than the disk takes it is dropped. Each row carries a keyed digest of its key and all its
fields, so a changed bit is a miss and never a wrong answer. `storage.sqlite_thread` owns the file.
"""

import asyncio
import hashlib
import logging
import secrets
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.core.errors import StorageError
from edge_runtime.storage.clock import boot_id, since_boot_ns
from edge_runtime.storage.files import read_or_make_secret
from edge_runtime.storage.sqlite_thread import BatchRule, Database, DatabaseFile, SqliteThread

_log = logging.getLogger(__name__)

_APPLICATION_ID = 0x45524143  # "ERAC" in the header of the file says that it is an answer store
_SCHEMA = 3  # a file of another schema is emptied, since it is a cache
_PAGE_BYTES = 4096
_LOG_BYTES = 2 << 20  # of disk_max_bytes, set aside for the write-ahead log
_CHECKPOINT_PAGES = 128  # 512 KiB: the log is folded into the file each time it is that long
_MAX_VALUE_BYTES = 64 << 10
_ROW_BYTES = 950  # a waiting write beside its value: key, digest, moment and closures (tracemalloc: 890)
_MAX_PENDING_LOOKUPS = 256
_SECOND_NS = 1_000_000_000
_MAX_PENDING_BYTES = 256 << 10
#: A batch is written when 64 rows wait or the first has waited a second: one flash page then carries many answers.
_BATCH = BatchRule(max_rows=64, max_bytes=_MAX_PENDING_BYTES // 2, max_wait_s=1.0)
#: A look-up before the cloud is asked waits at most this long; an SD card reads a page in a few milliseconds.
LOOKUP_LIMIT_S = 0.05

_CREATE = """CREATE TABLE answers (
  key BLOB PRIMARY KEY, model TEXT NOT NULL, boot TEXT NOT NULL, since_boot_ns INTEGER NOT NULL,
  unix_s INTEGER NOT NULL, value BLOB NOT NULL, tag BLOB NOT NULL)"""
_INSERT = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT model, boot, since_boot_ns, unix_s, value, tag FROM answers WHERE key = ?"
_TRIM = "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers ORDER BY rowid LIMIT 64)"


@dataclass(frozen=True, slots=True)
class Moment:
    """A time that can be compared with one before a restart: exact within a boot, by the wall clock across boots."""

    boot: str
    since_boot_ns: int
    unix_s: int

    def earlier_by(self, age_ns: int) -> "Moment":
        """The moment `age_ns` before this one; whole seconds are rounded down, so that nothing gets younger."""
        unix_s = (self.unix_s * _SECOND_NS - age_ns) // _SECOND_NS
        return Moment(self.boot, self.since_boot_ns - age_ns, unix_s)

    def age_ns(self, then: "Moment") -> int | None:
        """How long ago `then` was; None where `then` is later by the clock, so that the age is unknown."""
        if self.boot == then.boot:
            age = self.since_boot_ns - then.since_boot_ns
        else:
            age = (self.unix_s - then.unix_s) * _SECOND_NS
        return age if age >= 0 else None


@dataclass(frozen=True, slots=True)
class Found:
    """A kept value and its age."""

    value: bytes
    age_ns: int


class AnswerStore:
    """Values by key in a file of at most `max_bytes`; the oldest are dropped first. Create inside the running loop."""

    def __init__(self, path: Path, max_bytes: int, *, now: Callable[[], Moment] | None = None) -> None:
        """The file `path` + ".secret" holds the key of all digests in the store; `now` is for tests."""
        self._path = path
        self._max_bytes = max_bytes - _LOG_BYTES
        self._boot = boot_id()
        self._now = now or self._moment
        self._thread = SqliteThread(
            "answer-store", self._file(), _BATCH,
            on_open=self._limit_size, before_commit=self._trim, on_failure=self._turn_off,
        )  # fmt: skip
        self.why_off = ""
        self.size_bytes = 0
        self.lookup_ns = 0
        self.counters = dict.fromkeys(("found", "absent", "late", "kept", "dropped", "damaged"), 0)
        self.secret = secrets.token_bytes(32)
        try:
            self.secret = read_or_make_secret(path.with_name(path.name + ".secret"))
        except (OSError, StorageError) as error:
            self._turn_off(error)

    @property
    def is_on(self) -> bool:
        """Whether look-ups can find anything."""
        return not self.why_off

    async def start(self) -> None:
        """Open the file and measure the cost of a look-up, from the event loop and back: `lookup_ns`."""
        if not self.is_on:
            return
        self._thread.start()
        await self.find(secrets.token_bytes(16), limit_s=30.0)  # waits until the file is open
        times = []
        for _ in range(9):
            started_ns = time.perf_counter_ns()
            await self.find(secrets.token_bytes(16), limit_s=1.0)
            times.append(time.perf_counter_ns() - started_ns)
        self.lookup_ns = int(statistics.median(times))
        self.counters["absent"] = self.counters["late"] = 0

    async def find(self, key: bytes, *, limit_s: float = LOOKUP_LIMIT_S) -> Found | None:
        """Return the value of `key`, or None: absent, damaged, or not read within `limit_s`."""
        if not self.is_on:
            return None
        # So many wait only if the disk stands still: this one would wait in vain, and each costs memory.
        if self._thread.pending_jobs >= _MAX_PENDING_LOOKUPS:
            self.counters["late"] += 1
            return None
        try:
            async with asyncio.timeout(limit_s):
                found = await self._thread.submit(lambda database: self._look_up(database, key))
        except TimeoutError:
            self.counters["late"] += 1
            return None
        except StorageError:  # the failure was logged when it turned the store off
            return None
        self.counters["found" if found is not None else "absent"] += 1
        return found

    def keep(self, key: bytes, model: str, value: bytes, age_ns: int = 0) -> None:
        """Write within a second. What comes faster than the disk takes it, or is too large, is dropped.

        The value is `age_ns` old now, not when it is written.
        """
        size = len(value) + _ROW_BYTES
        has_room = self._thread.pending_bytes + size <= _MAX_PENDING_BYTES and len(value) <= _MAX_VALUE_BYTES
        if not self.is_on or not has_room:
            self.counters["dropped"] += 1
            return
        then = self._now().earlier_by(age_ns)
        self._thread.write(
            lambda database: self._insert(database, key, model, then, value), size, self._count_kept
        )

    def retain_models(self, models: Collection[str]) -> None:
        """Drop the answers of all models but those with these digests."""
        marks, kept = ", ".join("?" * len(models)), tuple(models)
        with suppress(StorageError):  # the failure was logged when it turned the store off
            self._thread.submit(
                lambda database: database.run(f"DELETE FROM answers WHERE model NOT IN ({marks})", *kept)  # noqa: S608
            )

    async def close(self) -> None:
        """Write what waits and close the file."""
        await self._thread.close()

    def status(self) -> dict[str, object]:
        """State, size and counters, as JSON values for `edge-runtime status`."""
        return {
            "state": "on" if self.is_on else "off",
            "why_off": self.why_off or None,
            "bytes": self.size_bytes,
            "lookup_us": round(self.lookup_ns / 1e3, 1),
            **self.counters,
        }

    def _file(self) -> DatabaseFile:
        return DatabaseFile(
            self._path,
            _APPLICATION_ID,
            _SCHEMA,
            upgrade=lambda database, _: _create(database),
            foreign_advice="give another path in [cache] path",
            file_pragmas=(
                f"page_size = {_PAGE_BYTES}",
                "synchronous = NORMAL",  # a power cut may lose the last answers, never the file
                f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
                f"journal_size_limit = {_LOG_BYTES}",
                "cache_size = -256",  # KiB: the system caches the file already
            ),
        )

    def _moment(self) -> Moment:
        return Moment(self._boot, since_boot_ns(), int(time.time()))

    def _turn_off(self, error: Exception) -> None:
        """Turn the store off for the life of the process: a cache that comes and goes is harder to operate than none."""
        self.why_off = str(error) or type(error).__name__
        _log.warning("event=answer_store_off path=%s why=%s", self._path, self.why_off)

    # What follows runs in the thread that owns the file.

    def _limit_size(self, database: Database) -> None:
        if self._path.stat().st_size > self._max_bytes:  # the limit was lowered
            with database.transaction():
                _create(database)
            database.run("VACUUM")
        database.pragma(f"max_page_count = {self._max_bytes // _PAGE_BYTES}")
        self.size_bytes = database.used_bytes

    def _look_up(self, database: Database, key: bytes) -> Found | None:
        rows = database.rows(_SELECT, key)
        if not rows:
            return None
        *fields, tag = rows[0]
        if tag != self._tag(key, *fields):
            self.counters["damaged"] += 1
            return None
        _, boot, since_boot_ns, unix_s, value = fields
        age_ns = self._now().age_ns(Moment(boot, since_boot_ns, unix_s))
        return None if age_ns is None else Found(value, age_ns)

    def _insert(self, database: Database, key: bytes, model: str, then: Moment, value: bytes) -> None:
        fields = (model, then.boot, then.since_boot_ns, then.unix_s, value)
        database.run(_INSERT, key, *fields, self._tag(key, *fields))

    def _count_kept(self) -> None:
        self.counters["kept"] += 1

    def _trim(self, database: Database) -> None:
        """Drop the oldest rows until a tenth of the file is free, so that the next batch fits without a check."""
        while database.used_bytes > self._max_bytes * 9 // 10:
            database.run(_TRIM)
        self.size_bytes = database.used_bytes

    def _tag(self, *fields: object) -> bytes:
        """A keyed digest of a row's key and fields, of any type: a flipped bit can change the type of a field."""
        keyed = hashlib.blake2b(digest_size=16, key=self.secret, person=b"er-answer-v2")
        for field in fields:
            raw = repr(field).encode("ascii", "backslashreplace")  # bytes and texts differ by their quotes
            keyed.update(len(raw).to_bytes(8, "little") + raw)
        return keyed.digest()


def _create(database: Database) -> None:
    database.run("DROP TABLE IF EXISTS answers")
    database.run(_CREATE)
