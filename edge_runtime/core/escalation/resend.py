"""When to ask again within a caller's deadline, and how often: a lost message must not cost a caller all of its time.

Only the edge's own timer is sure: no broker hands on what a dead worker had, and PUBACK proves nothing. The request
keeps its id, so that a worker that already has it does not run it twice.
"""

#: Of one request. The first may be lost with its worker, the second with the connection of another.
MAX_SENDS = 3
_FLOOR_NS = 200_000_000


def resend_after_ns(
    sends: int, estimate_ns: int, patience_ns: int, remaining_ns: int, draw: float
) -> int | None:
    """How long to wait for a reply after send number `sends` (from 1) before asking again; None: ask no more.

    Twice the estimate of a reply's time, or half of `patience_ns` while nothing is known, doubling with each send, with
    up to a quarter more by a `draw` from [0, 1), so that the callers of one dead worker do not come back at once.
    Asking again is of use only where the reply to it can come within `remaining_ns`.
    """
    if sends >= MAX_SENDS:
        return None
    base_ns = max(_FLOOR_NS, 2 * estimate_ns) if estimate_ns else patience_ns // 2
    wait_ns = int((base_ns << (sends - 1)) * (1 + draw / 4))
    return wait_ns if wait_ns + max(estimate_ns, _FLOOR_NS) < remaining_ns else None


class ResendBudget:
    """A token bucket over all callers of a device, so that a busy one does not ask twice as often because the cloud is slow.

    Each second earns ten resends and each request a tenth of one. A broker deals in turns: where one of two workers is
    silent, every request of a lone caller goes to it first, and its second copy to the other, for the 15 s that the
    broker takes to notice. Of a thousand requests a second a tenth is asked again. An overloaded cloud answers "busy",
    which is not asked again at all. Time is an argument, in nanoseconds.
    """

    def __init__(self, capacity: int = 20, per_s: int = 10, requests_per_resend: int = 10) -> None:
        # One resend costs so many nanoseconds; whole numbers, so that nothing is rounded.
        self._cost = 1_000_000_000 // per_s
        self._capacity = capacity * self._cost
        self._earned = self._cost // requests_per_resend
        self._tokens = self._capacity
        self._at_ns: int | None = None

    def earn(self) -> None:
        """A request was sent for the first time."""
        self._tokens = min(self._capacity, self._tokens + self._earned)

    def take(self, now_ns: int) -> bool:
        """Take one resend; False where none is left."""
        if self._at_ns is not None:
            self._tokens = min(self._capacity, self._tokens + max(0, now_ns - self._at_ns))
        self._at_ns = now_ns
        if self._tokens < self._cost:
            return False
        self._tokens -= self._cost
        return True
