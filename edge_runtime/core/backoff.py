"""How long to wait before connecting again: full jitter, so that clients of a restarted broker do not come back in waves."""

from collections.abc import Callable
from dataclasses import dataclass

#: The longest wait is this part of the time that the peer has been away: who was away for ten seconds is found within
#: two and a half, and a peer that is away for an hour costs as little as the cap allows.
_PART_OF_OUTAGE = 0.25


@dataclass(frozen=True, slots=True)
class Backoff:
    """Bounds of the wait, in seconds."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, out_s: float, random: Callable[[], float]) -> float:
        """Seconds to wait where the peer has been out of reach for `out_s`.

        A uniform draw from 0 to a bound that grows with the outage, not with the number of tries: tries may each take
        a millisecond (refused) or seconds (silent), and neither says how long it still takes. `random` returns a number
        in [0, 1). Source of the jitter: "Exponential Backoff And Jitter", AWS Architecture Blog.
        """
        return random() * min(self.cap_s, max(self.base_s, out_s * _PART_OF_OUTAGE))

    def longest_s(self, random: Callable[[], float]) -> float:
        """Seconds to wait where only a person can help, so that trying soon is of no use."""
        return random() * self.cap_s
