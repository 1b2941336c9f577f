"""How long a reply takes, pessimistically, from the replies seen: smoothed mean plus four mean deviations."""

_HALF_LIFE_NS = 30_000_000_000


class RoundTrip:
    """Jacobson's estimator as in RFC 6298 (gains 1/8 and 1/4), which decays while no reply comes.

    The decay matters: the estimate may veto asking, and without asking it would never be corrected.
    """

    def __init__(self) -> None:
        self._mean_ns = 0.0
        self._deviation_ns = 0.0
        self._heard_ns: int | None = None

    def observe(self, now_ns: int, took_ns: int) -> None:
        """Learn from one reply."""
        if self._heard_ns is None:
            self._mean_ns = float(took_ns)
            self._deviation_ns = took_ns / 2
        else:
            self._deviation_ns += (abs(took_ns - self._mean_ns) - self._deviation_ns) / 4
            self._mean_ns += (took_ns - self._mean_ns) / 8
        self._heard_ns = now_ns

    def p95_ns(self, now_ns: int) -> int:
        """Pessimistic estimate of a reply's time; 0 before the first reply; halves with every 30 s without one."""
        if self._heard_ns is None:
            return 0
        estimate = self._mean_ns + 4 * self._deviation_ns
        return int(estimate * 0.5 ** ((now_ns - self._heard_ns) // _HALF_LIFE_NS))
