"""Requests this worker knows: which run now, and the replies of those that ended. Brokers and edges send requests twice.

The same request is the same topic, the same id and the same body: people repeat an id with another question.
"""

import hashlib
from collections import OrderedDict

from edge_runtime.mqtt.envelope import Message

_MAX_KNOWN = 4096  # a minute at 64 requests per second

#: Topic, request id and digest of the body.
RequestKey = tuple[str, bytes, bytes]


def key_of(message: Message) -> RequestKey | None:
    """What makes two messages the same request; None for one without an id, which is always new."""
    if not message.correlation:
        return None
    return message.topic, message.correlation, hashlib.blake2b(message.payload, digest_size=16).digest()


class Duplicates:
    """The requests that run, and the newest replies."""

    def __init__(self, max_known: int = _MAX_KNOWN) -> None:
        self._max_known = max_known
        # a request -> its reply, or None while it runs
        self._known: OrderedDict[RequestKey, Message | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def is_running(self, key: RequestKey | None) -> bool:
        """Whether this request was begun and has not ended."""
        return key is not None and key in self._known and self._known[key] is None

    def reply_to(self, key: RequestKey | None) -> Message | None:
        """The reply this request got; None while it runs or where it is not known."""
        return None if key is None else self._known.get(key)

    def begin(self, key: RequestKey | None) -> None:
        """Note that this request runs."""
        if key is not None:
            self._keep(key, None)

    def end(self, key: RequestKey | None, reply: Message | None) -> None:
        """Note its reply; None where the same request may fare better next time."""
        if key is None:
            return
        if reply is None:
            self._known.pop(key, None)
        else:
            self._keep(key, reply)

    def _keep(self, key: RequestKey, reply: Message | None) -> None:
        self._known[key] = reply
        self._known.move_to_end(key)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)
