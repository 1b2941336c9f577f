"""The answer cache: admission, expiry and revision. No clock: `now_ns` is an argument.

`core.caching.keys` says which requests share an answer, and `core.caching.s3fifo` which answers are evicted.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from edge_runtime.core.caching.s3fifo import Entry, Eviction, S3Fifo

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Answers within `max_bytes`, each fresh for `ttl_ns` and, for who has nothing better, `stale_ns` longer.

    Invariants (a state machine tests them): the sizes never sum above `max_bytes`; what is expired is
    never returned as fresh, nor anything beyond its stale time; a value is returned only under the key it was put.
    """

    #: What an entry costs beside its payload: key, slot, entry, the answer's own objects, and the key that is
    #: remembered after it went. Measured with tracemalloc on CPython 3.11 for answers to commands: 690 to 719 in all.
    OVERHEAD_BYTES = 700

    def __init__(
        self, max_bytes: int, ttl_ns: int, stale_ns: int = 0, eviction: Eviction[Value] | None = None
    ) -> None:
        self.ttl_ns = ttl_ns
        self.stale_ns = stale_ns
        self._eviction: Eviction[Value] = S3Fifo(max_bytes) if eviction is None else eviction

    def __len__(self) -> int:
        return len(self._eviction)

    @property
    def size_bytes(self) -> int:
        """What all entries cost."""
        return self._eviction.size_bytes

    @property
    def evictions(self) -> int:
        """Entries that went for others."""
        return self._eviction.evictions

    def get(self, now_ns: int, key: bytes) -> Value | None:
        """Return the fresh value of `key`, or None. An expired one stays until it is replaced or evicted."""
        entry = self._eviction.get(key)
        if entry is None or entry.expires_ns <= now_ns:
            return None
        return entry.value

    def get_stale(self, now_ns: int, key: bytes) -> Value | None:
        """Return the value of `key` that is fresh or expired less than the stale time ago, or None."""
        entry = self._eviction.get(key)
        if entry is None or entry.expires_ns + self.stale_ns <= now_ns:
            return None
        return entry.value

    def put(
        self, now_ns: int, key: bytes, value: Value, payload_bytes: int, *, group: str = "", age_ns: int = 0
    ) -> None:
        """Keep `value`, which is already `age_ns` old, unless it cannot fit at all.

        `group` is what it is forgotten with: the digest of its model.
        """
        expires_ns = now_ns + self.ttl_ns - age_ns
        self._eviction.put(Entry(key, value, group, payload_bytes + self.OVERHEAD_BYTES, expires_ns))

    def revise(self, key: bytes, value: Value) -> None:
        """Put `value`, of the same size, in place of the one that is kept, with its time and its uses."""
        entry = self._eviction.get(key)
        if entry is not None:
            entry.value = value

    def forget(self, group: str, *, unless: Callable[[Value], bool] = lambda _: False) -> None:
        """Drop the entries of `group`, but those whose values `unless` holds for."""
        self._eviction.retain(lambda entry: entry.group != group or unless(entry.value))
