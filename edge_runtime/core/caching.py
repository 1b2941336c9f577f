"""The answer cache: the key law, bounds, expiry and eviction. No clock: `now_ns` is an argument.

A key is a keyed digest, so that neither a log nor a memory dump tells which command was asked, and so
that no tenant can hit, probe or poison another tenant's entries.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge_runtime.core.messages import Scalar

_KEY_SCHEMA = b"er-cache-v1"  # change whenever the fields below change
#: Request parameters which steer how a request travels and can never change what the answer is.
TRAVEL_PARAMETERS = frozenset({"timeout", "deadline_ms", "cache"})

Value = TypeVar("Value")


class KeyPrefix:
    """Everything of a cache key but the row itself, hashed once and reused for each row.

    | part               | why two requests that differ in it must not share an answer         |
    |--------------------|----------------------------------------------------------------------|
    | tenant secret      | timing would tell one tenant what another asked                      |
    | model digest       | a new version never answers from the old one's entries               |
    | processing version | the same text may become other tensors                               |
    | parameters         | any parameter but TRAVEL_PARAMETERS may steer the answer             |
    | requested outputs  | another selection is another answer                                  |
    | row                | input names, datatypes, shapes and bytes, as the processor wrote it  |
    """

    def __init__(
        self,
        tenant_secret: bytes,
        model_digest: str,
        processing_version: str,
        parameters: Mapping[str, Scalar],
        outputs: Sequence[str],
    ) -> None:
        """Hash the parts; `tenant_secret` is 16 to 64 random bytes."""
        self._hash = hashlib.blake2b(digest_size=16, key=tenant_secret, person=_KEY_SCHEMA)
        fields = [model_digest, processing_version]
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


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    value: Value
    size_bytes: int
    expires_ns: int


class Cache(Generic[Value]):
    """Least recently used answers within `max_bytes`, each alive for `ttl_ns`.

    Invariants (property tests): the sizes never sum above `max_bytes`; an expired entry is never
    returned; a value is returned only under the key it was put.
    """

    #: What an entry costs beside its payload: key, slot, entry and the answer's own objects. Measured with
    #: tracemalloc on CPython 3.11 for answers to commands: 576 bytes in all.
    OVERHEAD_BYTES = 560

    def __init__(self, max_bytes: int, ttl_ns: int) -> None:
        self._max_bytes = max_bytes
        self._ttl_ns = ttl_ns
        self._entries: OrderedDict[bytes, _Entry[Value]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, now_ns: int, key: bytes) -> Value | None:
        """Return the live value of `key`, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_ns <= now_ns:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, now_ns: int, key: bytes, value: Value, payload_bytes: int) -> None:
        """Keep `value`; evict the least recently used ones for it. One that cannot fit is not kept."""
        if key in self._entries:
            self._drop(key)
        size = payload_bytes + self.OVERHEAD_BYTES
        if size > self._max_bytes:
            return
        while self.size_bytes + size > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.size_bytes -= evicted.size_bytes
        self._entries[key] = _Entry(value, size, now_ns + self._ttl_ns)
        self.size_bytes += size

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.size_bytes = 0

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes
