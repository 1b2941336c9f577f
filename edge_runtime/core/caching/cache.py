"""The answer cache in memory: admission, expiry and replacement. It has no clock: `now_ns` is an argument.

`core.caching.keys` defines which requests share an answer, and `core.caching.s3fifo` which answers are evicted.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from edge_runtime.core.caching.s3fifo import Entry, Eviction, S3Fifo

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Answers within `max_bytes`, fresh for `ttl_ns`; for `stale_ns` more only `get_stale` returns them.

    Invariants (a state machine tests them): the sizes never sum above `max_bytes`; `get` returns no expired value and
    `get_stale` none beyond its stale time; a value is returned only under the key it was put with.
    """

    #: Bytes of an entry beside the values of its answer: key, dictionary slot, entry, outcome, answer, and the key that
    #: the ghost queue remembers after an eviction. Measured with tracemalloc on CPython 3.11; a test compares what is
    #: counted with what is allocated.
    OVERHEAD_BYTES = 660

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
        """Bytes of all entries."""
        return self._eviction.size_bytes

    @property
    def evictions(self) -> int:
        """How many entries made room for others."""
        return self._eviction.evictions

    def get(self, now_ns: int, key: bytes) -> Value | None:
        """Return the fresh value of `key`, or None. An expired one stays until it is replaced or evicted."""
        entry = self._eviction.get(key)
        if entry is None or entry.expires_ns <= now_ns:
            return None
        return entry.value

    def peek(self, now_ns: int, key: bytes) -> Value | None:
        """As `get`, without counting a use."""
        entry = self._eviction.peek(key)
        return None if entry is None or entry.expires_ns <= now_ns else entry.value

    def get_stale(self, now_ns: int, key: bytes) -> Value | None:
        """Return the value of `key` that is fresh or expired less than the stale time ago, or None."""
        entry = self._eviction.peek(key)  # the request was counted by its `get`
        if entry is None or entry.expires_ns + self.stale_ns <= now_ns:
            return None
        return entry.value

    def put(
        self, now_ns: int, key: bytes, value: Value, pinned_bytes: int, *, group: str = "", age_ns: int = 0
    ) -> None:
        """Keep `value`, which is already `age_ns` old and pins `pinned_bytes`, unless it is larger than the cache.

        `group` is the digest of its model: `forget` drops values by group.
        """
        expires_ns = now_ns + self.ttl_ns - age_ns
        self._eviction.put(Entry(key, value, group, pinned_bytes + self.OVERHEAD_BYTES, expires_ns))

    def revise(self, key: bytes, value: Value) -> None:
        """Replace the value of `key` by one of the same size; its expiry and its use count stay."""
        entry = self._eviction.peek(key)  # no use: the hit that wants another form was counted by its `get`
        if entry is not None:
            entry.value = value

    def forget(self, group: str, *, unless: Callable[[Value], bool] = lambda _: False) -> None:
        """Drop the entries of `group` except those whose value satisfies `unless`."""
        self._eviction.retain(lambda entry: entry.group != group or unless(entry.value))
