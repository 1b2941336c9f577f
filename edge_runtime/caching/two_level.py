"""Answers kept in memory and, where a look-up there costs less than the answer, on disk below it."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.caching.outcome_codec import decode_outcome, encode_outcome
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.messages import Origin, Reason
from edge_runtime.core.outcome import Outcome, payload_bytes

#: A model that costs so many look-ups is asked after the disk; at this ratio a disk that never has the answer
#: slows the model by a tenth.
_LOOKUPS_PER_ROW = 10


class Stored(Protocol):
    """A value of the second level and its age."""

    @property
    def value(self) -> bytes: ...
    @property
    def age_ns(self) -> int: ...


class Store(Protocol):
    """What is needed of the second level."""

    @property
    def lookup_ns(self) -> int:
        """What a look-up costs, as measured here."""

    @property
    def is_on(self) -> bool:
        """Whether it can find anything."""

    @property
    def size_bytes(self) -> int:
        """Bytes in use."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened, how often."""

    async def find(self, key: bytes) -> Stored | None:
        """The value of `key`, in bounded time."""

    def keep(self, key: bytes, model: str, value: bytes) -> None:
        """Keep `value` for the model of that digest, some time soon."""

    def retain_models(self, models: Collection[str]) -> None:
        """Drop what belongs to models of other digests."""

    def status(self) -> dict[str, object]:
        """All of that, for people."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the disk had. What is not fresh may still serve while the cloud is out of reach."""

    outcome: Outcome
    is_fresh: bool


class Recall:
    """Both levels of the cache."""

    def __init__(self, memory: Cache[Outcome], disk: Store | None = None) -> None:
        self.memory = memory
        self.disk = disk
        self._cloud_versions: dict[str, str] = {}

    def is_worth_reading(self, row_ns: int) -> bool:
        """Whether the disk is asked before a model of which one row costs `row_ns`."""
        return self.disk is not None and row_ns >= _LOOKUPS_PER_ROW * self.disk.lookup_ns

    async def from_disk(self, key: bytes, digest: str) -> Recalled | None:
        """What the disk has under `key`; what is fresh is in memory from now on, as old as it is."""
        found = None if self.disk is None else await self.disk.find(key)
        if found is None or found.age_ns >= self.memory.ttl_ns + self.memory.stale_ns:
            return None
        try:
            outcome = decode_outcome(found.value)
        except ValueError:
            return None
        if outcome.cloud_version and outcome.cloud_version != self._cloud_versions.get(
            digest, outcome.cloud_version
        ):
            return None
        is_fresh = found.age_ns < self.memory.ttl_ns
        if is_fresh:
            size = payload_bytes(outcome.answer)
            self.memory.put(time.monotonic_ns(), key, outcome, size, group=digest, age_ns=found.age_ns)
        return Recalled(outcome, is_fresh)

    def stale(self, key: bytes, recalled: Recalled | None) -> Outcome | None:
        """The cloud's own answer of earlier, from memory or as just `recalled`; None without one."""
        kept = self.memory.get_stale(time.monotonic_ns(), key)
        if kept is None and recalled is not None:
            kept = recalled.outcome
        return kept if kept is not None and kept.reason is Reason.UNSURE else None

    def keep(
        self, now_ns: int, key: bytes, digest: str, row_ns: int, outcome: Outcome, *, is_private: bool
    ) -> None:
        """Keep an outcome that is final: not degraded, and not itself from the cache.

        The disk gets what it would be asked for, and nothing private.
        """
        self.memory.put(now_ns, key, outcome, payload_bytes(outcome.answer), group=digest)
        if self.disk is None or is_private:
            return
        if outcome.origin is Origin.CLOUD or self.is_worth_reading(row_ns):
            self.disk.keep(key, digest, encode_outcome(outcome))

    def as_hit(self, key: bytes, found: Outcome) -> Outcome:
        """What a hit is answered with. Made at the first hit, since most answers are never asked for again."""
        hit = found.as_kept()
        self.memory.revise(key, hit)
        return hit

    def see_cloud(self, digest: str, version: str) -> None:
        """A cloud of another version has answered for a model: what earlier versions said is forgotten."""
        if self._cloud_versions.setdefault(digest, version) != version:
            self._cloud_versions[digest] = version
            self.memory.forget(digest, unless=lambda kept: kept.cloud_version in ("", version))

    def forget(self, digest: str, loaded: Collection[str]) -> None:
        """Drop every answer of the model `digest`, and on disk those of all models but the `loaded` ones."""
        self.memory.forget(digest)
        if self.disk is not None:
            self.disk.retain_models(loaded)
