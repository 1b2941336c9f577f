"""The engine of a simulated case: the true duration of a batch, which the policies do not know."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Engine:
    """t(b) = fixed + marginal * b, times lognormal noise of that deviation, times `throttle` from `throttled_at_ns` on.

    With `pads` a batch takes as long as one of the next power of two, which is how prepared buffers work.
    """

    fixed_ns: int
    marginal_ns: int
    max_batch: int = 64
    noise: float = 0.0
    throttled_at_ns: int | None = None
    throttle: float = 1.0
    pads: bool = False

    def cost_ns(self, rows: int) -> int:
        """The mean duration of a batch, unthrottled."""
        if self.pads and rows > 1:
            rows = min(1 << (rows - 1).bit_length(), self.max_batch)
        return self.fixed_ns + self.marginal_ns * rows

    def latency_profile(self) -> tuple[tuple[int, int], ...]:
        """The result of a warm-up sweep: `(rows, nanoseconds)` of the powers of two and the most."""
        sizes = {1 << i for i in range(self.max_batch.bit_length())} | {self.max_batch}
        return tuple((rows, self.cost_ns(rows)) for rows in sorted(sizes))

    @property
    def capacity(self) -> float:
        """Requests per nanosecond when every batch is full."""
        return self.max_batch / self.cost_ns(self.max_batch)

    def duration_ns(self, now_ns: int, rows: int, rng: np.random.Generator) -> int:
        """The duration of this batch if it starts now."""
        cost = float(self.cost_ns(rows))
        if self.noise:  # of mean 1
            cost *= float(np.exp(self.noise * rng.standard_normal() - self.noise**2 / 2))
        if self.throttled_at_ns is not None and now_ns >= self.throttled_at_ns:
            cost *= self.throttle
        return max(int(cost), 1)
