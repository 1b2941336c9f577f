"""Requests this worker knows: which run now, and the replies of those that ended. Brokers and edges send requests twice.

The same request is the same topic, the same id and the same body: people repeat an id with another question. One
process runs a known request once; after a restart, or at another worker of the group, it may run again.
Time is an argument.
"""

import hashlib
from collections import OrderedDict

from edge_runtime.mqtt.envelope import Message

#: 64 MiB: 90,000 replies of a command, or 500 of the largest packets.
MAX_BYTES = 64 << 20
#: No edge asks again after its deadline; ten minutes is above all that are sensible for somebody who waits.
MAX_AGE_NS = 600_000_000_000
#: What an entry costs beside its texts: two keys, tuples, the message.
_ENTRY_BYTES = 700

#: Topic, request id and digest of the body.
RequestKey = tuple[str, bytes, bytes]


def key_of(message: Message) -> RequestKey | None:
    """What makes two messages the same request; None for one without a proper id, which is always new."""
    if len(message.correlation) != 16:
        return None
    return message.topic, message.correlation, hashlib.blake2b(message.payload, digest_size=16).digest()


class Duplicates:
    """The requests that run, and the newest replies, bounded in bytes."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._running: set[RequestKey] = set()
        # By the time at which they were kept: the oldest come first.
        self._replies: OrderedDict[RequestKey, tuple[Message, int]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._replies)

    def is_running(self, key: RequestKey | None) -> bool:
        """Whether this request was begun and has not ended."""
        return key in self._running

    def reply_to(self, key: RequestKey | None, now_ns: int) -> Message | None:
        """The reply that this request got; None while it runs or where it is not known."""
        if key is None:
            return None
        self._forget_old(now_ns)
        kept = self._replies.get(key)
        return None if kept is None else kept[0]

    def begin(self, key: RequestKey | None) -> None:
        """Note that this request runs. Whoever begins it bounds how many run."""
        if key is not None:
            self._running.add(key)

    def end(self, key: RequestKey | None, reply: Message | None, now_ns: int) -> None:
        """Note what was sent for it; None where the same request may fare better next time."""
        if key is None:
            return
        self._running.discard(key)
        self._drop(key)
        if reply is None:
            return
        self._replies[key] = reply, now_ns
        self.size_bytes += _size(key, reply)
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._replies)))
        self._forget_old(now_ns)

    def _forget_old(self, now_ns: int) -> None:
        while self._replies:
            key, (_, kept_ns) = next(iter(self._replies.items()))
            if now_ns - kept_ns <= MAX_AGE_NS:
                return
            self._drop(key)

    def _drop(self, key: RequestKey) -> None:
        kept = self._replies.pop(key, None)
        if kept is not None:
            self.size_bytes -= _size(key, kept[0])


def _size(key: RequestKey, reply: Message) -> int:
    return _ENTRY_BYTES + len(key[0]) + reply.packet_bytes
