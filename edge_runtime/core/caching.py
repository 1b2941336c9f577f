"""The answer cache: the key law, admission and expiry. No clock: `now_ns` is an argument.

A key is a keyed digest, so that neither a log nor a memory dump tells which command was asked, and so
that no tenant can hit, probe or poison another tenant's entries. What goes when memory is short is said by
`core.eviction`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from edge_runtime.core.eviction import Entry, Eviction, S3Fifo
from edge_runtime.core.messages import Scalar

_KEY_SCHEMA = b"er-cache-v2"  # change whenever the fields below change
#: Request parameters which steer how a request travels and can never change what the answer is.
TRAVEL_PARAMETERS = frozenset({"timeout", "deadline_ms", "cache", "priority"})

Value = TypeVar("Value")


class KeyPrefix:
    """Everything of a cache key but the row itself, hashed once and reused for each row.

    | part               | why two requests that differ in it must not share an answer         |
    |--------------------|----------------------------------------------------------------------|
    | tenant secret      | timing would tell one tenant what another asked                      |
    | model digest       | a new version never answers from the old one's entries               |
    | processing version | the same text may become other tensors                               |
    | engine             | another runner, its version or its batches may round otherwise       |
    | policy             | another threshold, or a cloud where there was none, decides otherwise|
    | parameters         | any parameter but TRAVEL_PARAMETERS may steer the answer             |
    | requested outputs  | another selection is another answer                                  |
    | row                | input names, datatypes, shapes and bytes, as the processor wrote it  |

    Engine and policy stand still while a process lives; they matter to entries that outlive it.
    """

    def __init__(
        self,
        tenant_secret: bytes,
        model_digest: str,
        processing_version: str,
        engine: str,
        policy: str,
        parameters: Mapping[str, Scalar],
        outputs: Sequence[str],
    ) -> None:
        """Hash the parts; `tenant_secret` is 16 to 64 random bytes."""
        self._hash = hashlib.blake2b(digest_size=16, key=tenant_secret, person=_KEY_SCHEMA)
        fields = [model_digest, processing_version, engine, policy]
        for name in sorted(parameters.keys() - TRAVEL_PARAMETERS):
            value = parameters[name]
            fields += [name, type(value).__name__, str(value)]
        # The counts keep parameters and outputs apart; the lengths keep neighbours apart.
        fields.append(str(len(fields)))
        fields += outputs
        for text in fields:
            raw = text.encode("utf-8", "surrogatepass")
            self._hash.update(len(raw).to_bytes(8, "little") + raw)

    def key(self, row: bytes) -> bytes:
        """The 16-byte key of one row: 128 bits leave accidental equality out of reach."""
        keyed = self._hash.copy()
        keyed.update(row)
        return keyed.digest()


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
