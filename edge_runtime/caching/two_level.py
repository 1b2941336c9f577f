"""The two-level answer cache: memory first, then the disk where a look-up there costs less than the answer.

Memory is the pure `core.caching.cache.Cache`; the disk is anything that behaves as `DiskStore`. This module decides
which level holds what, and knows which answers outlive a change of the cloud's model.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from edge_runtime.caching.outcome_codec import decode_outcome, encode_outcome
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.messages import Origin, Reason
from edge_runtime.core.outcome import Outcome, pinned_bytes, with_own_values
from edge_runtime.storage.clock import since_boot_ns

#: The disk is asked before a model if one row of the model costs this many look-ups; at this ratio a disk that never
#: has the answer slows the model by a tenth.
_LOOKUPS_PER_ROW = 10


class StoredValue(Protocol):
    """A value on disk and its age."""

    @property
    def value(self) -> bytes: ...
    @property
    def age_ns(self) -> int: ...


class DiskStore(Protocol):
    """What the cache needs of its second level."""

    @property
    def lookup_ns(self) -> int:
        """The measured cost of a look-up."""

    @property
    def is_on(self) -> bool:
        """Whether look-ups can find anything."""

    @property
    def size_bytes(self) -> int:
        """Bytes in use."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Events by name."""

    async def find(self, key: bytes) -> StoredValue | None:
        """The value of `key`, in bounded time."""

    def keep(self, key: bytes, model: str, value: bytes, age_ns: int) -> None:
        """Write `value` soon, which is `age_ns` old; `model` is the digest of the model it belongs to."""

    def retain_models(self, models: Collection[str]) -> None:
        """Drop the values of all models but those with these digests."""

    def status(self) -> dict[str, object]:
        """State, size and counters as JSON values."""


@dataclass(frozen=True, slots=True)
class DiskHit:
    """An outcome found on disk. One that is not fresh may still serve while the cloud is out of reach."""

    outcome: Outcome
    is_fresh: bool


class TwoLevelCache:
    """Outcomes by key in memory and, if `disk` is given, on disk.

    Its clock `now_ns` counts the time in which the device was suspended; all ages are by this clock. What is kept owns
    its bytes, so that `memory.size_bytes` is what the cache pins.
    """

    def __init__(
        self,
        memory: Cache[Outcome],
        disk: DiskStore | None = None,
        now_ns: Callable[[], int] = since_boot_ns,
    ) -> None:
        self.memory = memory
        self.disk = disk
        self.now_ns = now_ns
        self._cloud_versions: dict[str, str] = {}

    def is_disk_worthwhile(self, row_ns: int) -> bool:
        """Whether the disk is asked before a model of which one row costs `row_ns`."""
        return self.disk is not None and row_ns >= _LOOKUPS_PER_ROW * self.disk.lookup_ns

    def get(self, key: bytes) -> Outcome | None:
        """Return the fresh outcome of `key` from memory, as a cache hit, or None.

        The form of a hit is made at the first one, because most answers are never asked for again.
        """
        found = self.memory.get(self.now_ns(), key)
        if found is None or found.origin is Origin.CACHE:
            return found
        hit = found.as_cached()
        self.memory.revise(key, hit)
        return hit

    def peek(self, key: bytes) -> Outcome | None:
        """As `get`, for a request that has been counted by its `get` already."""
        found = self.memory.peek(self.now_ns(), key)
        return None if found is None else found.as_cached()

    async def read_disk(self, key: bytes, digest: str) -> DiskHit | None:
        """Return what the disk has for `key`; copy a fresh outcome to memory, where it keeps its age.

        `digest` is that of the model the key belongs to.
        """
        asked_ns = (
            self.now_ns()
        )  # the disk returns the age at a later moment: nothing gets younger on its way
        found = None if self.disk is None else await self.disk.find(key)
        if found is None or found.age_ns >= self.memory.ttl_ns + self.memory.stale_ns:
            return None
        try:
            outcome = decode_outcome(found.value)
        except ValueError:
            return None
        current = self._cloud_versions.get(digest, outcome.cloud_version)
        if outcome.cloud_version not in ("", current):
            return None
        is_fresh = found.age_ns < self.memory.ttl_ns
        if is_fresh:
            self._put_in_memory(asked_ns, key, digest, outcome, found.age_ns)
        return DiskHit(outcome, is_fresh)

    def stale_answer(self, key: bytes, on_disk: DiskHit | None) -> Outcome | None:
        """Return an earlier answer of the cloud, from memory or else `on_disk`, or None."""
        found = self.memory.get_stale(self.now_ns(), key)
        if found is None and on_disk is not None:
            found = on_disk.outcome
        return found if found is not None and found.reason is Reason.UNSURE else None

    def put(
        self, asked_ns: int, key: bytes, digest: str, row_ns: int, outcome: Outcome, *, is_private: bool
    ) -> None:
        """Keep a final outcome: neither degraded nor from the cache itself. Its age counts from `asked_ns`.

        It is written to disk only if `is_disk_worthwhile` would look there later, and never for private requests.
        """
        self._put_in_memory(asked_ns, key, digest, outcome)
        if self.disk is None or is_private:
            return
        if outcome.origin is Origin.CLOUD or self.is_disk_worthwhile(row_ns):
            self.disk.keep(key, digest, encode_outcome(outcome), self.now_ns() - asked_ns)

    def note_cloud_version(self, digest: str, version: str) -> None:
        """Drop what other versions of the cloud's model said, once `version` has answered for the model `digest`."""
        if self._cloud_versions.setdefault(digest, version) != version:
            self._cloud_versions[digest] = version
            self.memory.forget(digest, unless=lambda kept: kept.cloud_version in ("", version))

    def drop_model(self, digest: str, loaded: Collection[str]) -> None:
        """Drop every answer of the model `digest`, and on disk those of all models but the `loaded` ones."""
        self.memory.forget(digest)
        self._cloud_versions.pop(digest, None)
        if self.disk is not None:
            self.disk.retain_models(loaded)

    def _put_in_memory(
        self, asked_ns: int, key: bytes, digest: str, outcome: Outcome, age_ns: int = 0
    ) -> None:
        answer = with_own_values(outcome.answer)
        kept = outcome if answer is outcome.answer else replace(outcome, answer=answer)
        self.memory.put(asked_ns, key, kept, pinned_bytes(answer), group=digest, age_ns=age_ns)
