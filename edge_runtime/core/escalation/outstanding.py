"""Requests that were sent to a peer and not answered. What is observed is the peer: callers may have left long ago."""

from collections import OrderedDict
from dataclasses import dataclass

#: Bounds memory: about 200 bytes each. At a thousand requests a second it holds those of one second.
_MAX_KEPT = 1024


@dataclass(slots=True)
class Asked:
    """When a request was sent for the first time, and when last. Nanoseconds."""

    first_ns: int
    last_ns: int


class Outstanding:
    """Ids and when they were asked. Times are arguments.

    An id is waiting, until its reply comes, or a fair time is over, or it is withdrawn because silence would say
    nothing (the link fell, the broker refused it or knew of no subscriber). Ids that are not waiting any more are kept
    for a while, so that a late reply is recognised.
    """

    def __init__(self, max_kept: int = _MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._waiting: OrderedDict[bytes, Asked] = OrderedDict()
        self._over: OrderedDict[bytes, Asked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: bytes) -> bool:
        return request_id in self._waiting or request_id in self._over

    def sent(self, request_id: bytes, now_ns: int) -> None:
        """Note a request; asking again with the same id does not give the peer more time."""
        asked = self._waiting.get(request_id) or self._over.get(request_id)
        if asked is not None:
            asked.last_ns = now_ns
            return
        self._waiting[request_id] = Asked(now_ns, now_ns)
        if len(self._waiting) > self._max_kept:
            self._waiting.popitem(last=False)

    def answered(self, request_id: bytes) -> Asked | None:
        """Forget a request and return when it was asked; None where it is not known."""
        return self._waiting.pop(request_id, None) or self._over.pop(request_id, None)

    def withdraw(self, request_id: bytes) -> None:
        """No longer wait for a reply, but recognise one."""
        asked = self._waiting.pop(request_id, None)
        if asked is not None:
            self._over[request_id] = asked
            if len(self._over) > self._max_kept:
                self._over.popitem(last=False)

    def withdraw_all(self) -> None:
        """No longer wait for any reply: the link fell."""
        for request_id in list(self._waiting):
            self.withdraw(request_id)

    def silent(self, now_ns: int, fair_ns: int) -> list[int]:
        """Return when each request was asked first that has waited for `fair_ns` now; each is returned once."""
        found = []
        while self._waiting:
            request_id, asked = next(iter(self._waiting.items()))
            if now_ns - asked.first_ns < fair_ns:
                break
            found.append(asked.first_ns)
            self.withdraw(request_id)
        return found

    def first_ns(self) -> int | None:
        """When the request was asked that has waited longest; None where none waits."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else oldest.first_ns

    def forgive(self, gap_ns: int) -> None:
        """Leave out a time in which this process did not run: replies of that time are yet to be read."""
        for asked in self._waiting.values():
            asked.first_ns += gap_ns
            asked.last_ns += gap_ns
