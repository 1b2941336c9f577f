"""How long a reply takes, pessimistically, from the newest replies: a quantile, which one slow reply does not own."""

from bisect import bisect_left, insort
from collections import deque

_KEPT = 32
_HALF_LIFE_NS = 30_000_000_000
_FEW = 8


class RoundTrip:
    """The 95th percentile of the newest 32 replies, without the slowest one as soon as there are two.

    The estimate may veto asking, and without asking it would never be corrected. Three things correct it: replies that
    come after their caller left teach it too, it halves with every 30 s without a reply, and `is_worth_a_try` lets some
    callers through against it.
    """

    def __init__(self) -> None:
        self._newest: deque[int] = deque(maxlen=_KEPT)
        self._sorted: list[int] = []
        self._heard_ns = 0

    def observe(self, now_ns: int, took_ns: int) -> None:
        """Learn from one reply."""
        if len(self._newest) == _KEPT:
            del self._sorted[bisect_left(self._sorted, self._newest[0])]
        self._newest.append(took_ns)
        insort(self._sorted, took_ns)
        self._heard_ns = now_ns

    def p95_ns(self, now_ns: int) -> int:
        """Pessimistic estimate of a reply's time; 0 before the first reply; halves with every 30 s without one."""
        if not self._sorted:
            return 0
        estimate_ns = self._sorted[(len(self._sorted) - 1) * 19 // 20]
        halvings = max(0, now_ns - self._heard_ns) // _HALF_LIFE_NS
        return estimate_ns >> min(halvings, 62)

    def is_worth_a_try(self, draw: float) -> bool:
        """Whether a caller is let through against the estimate, by a `draw` from [0, 1).

        Every other one while the estimate rests on a few replies (the first is often slow: a cold cache, a model that
        has just been loaded), and one of eight later.
        """
        return draw < (1 / 2 if len(self._sorted) < _FEW else 1 / 8)
