"""Pad or split: which batch sizes serve `n` waiting rows soonest, by a small dynamic program over the prepared sizes.

An engine pads a batch to the next prepared size, so 5 rows may run as one padded 8, or as 4 and 1; which is
cheaper depends on what was measured, and CPU kernels make t(8) > 2 * t(4) possible.
"""

from collections.abc import Sequence

#: Fewer, larger batches win when they cost at most this much more: each batch has a price outside the engine too.
_TOLERANCE = 1.02


class Split:
    """The best first batch and the total time for 0..max_batch rows; computed once from (sizes, costs)."""

    __slots__ = ("first", "most", "per_row", "total")

    def __init__(self, sizes: Sequence[int], costs: Sequence[float]) -> None:
        """`sizes` rise, the last is the most rows of a batch; `costs` are nanoseconds."""
        most = sizes[-1]
        self.first, self.total = [0] * (most + 1), [0.0] * (most + 1)
        for n in range(1, most + 1):
            best, rows = float("inf"), n
            for size, cost in zip(reversed(sizes), reversed(costs), strict=True):
                taken = min(size, n)
                total = cost + self.total[n - taken]
                if total * _TOLERANCE < best:
                    best, rows = total, taken
            self.first[n], self.total[n] = rows, best
        pairs = [(cost / size, -size) for size, cost in zip(sizes, costs, strict=True)]
        cheapest = min(share for share, _ in pairs)
        #: The size that serves a long queue fastest, and what a row costs in it.
        self.most = max(-size for share, size in pairs if share <= cheapest * _TOLERANCE)
        self.per_row = cheapest

    def batch(self, waiting: int) -> int:
        """Rows of the next batch for so many waiting (at least 1)."""
        return self.first[waiting] if waiting < len(self.first) else self.most

    def drain(self, rows: int) -> float:
        """Time to serve so many rows, in nanoseconds."""
        if rows < len(self.first):
            return self.total[rows]
        whole = (rows - len(self.first) + 1) // self.most + 1
        return whole * self.most * self.per_row + self.total[rows - whole * self.most]
