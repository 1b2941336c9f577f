"""The wait before the next attempt: exponential with full jitter, so that the clients of a restarted broker spread out."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Bounds of the wait, in seconds."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, attempt: int, random: Callable[[], float]) -> float:
        """Seconds to wait after failed attempt number `attempt` (0 is the first).

        A uniform draw from 0 to min(cap, base * 2^attempt). `random` returns a number in [0, 1).
        Source: "Exponential Backoff And Jitter", AWS Architecture Blog.
        """
        # The exponent is bounded because 2.0**attempt overflows after weeks offline; long before 2^32 the cap decides.
        return random() * min(self.cap_s, self.base_s * 2.0 ** min(max(attempt, 0), 32))
