"""Pad or split: the batch sizes that serve `n` waiting rows in the least time, by dynamic programming.

An engine pads a batch to the next prepared size, so 5 rows can run as a padded 8, or as 4 and 1. The measured costs say
which is cheaper; with CPU kernels t(8) > 2 * t(4) does occur.
"""

from collections.abc import Sequence

#: A larger first batch is preferred if the total is at most this much larger: costs are not known more exactly.
_TOLERANCE = 1.02


class Split:
    """The best first batch and the total time for 0 to max_batch rows, computed once from sizes and costs.

    `most` is the size that serves a long queue fastest, `per_row` the time of a row in the cheapest size.
    """

    __slots__ = ("first", "most", "per_row", "total")

    def __init__(self, sizes: Sequence[int], costs: Sequence[float], overhead_ns: int = 0) -> None:
        """`sizes` are in rising order, the last is the largest batch; `costs` are their times in nanoseconds.

        `overhead_ns` is the time of a batch outside the engine. It decides between sizes, but is no part of the totals,
        since an engine may run the next batch meanwhile.
        """
        most = sizes[-1]
        self.first, self.total = [0] * (most + 1), [0.0] * (most + 1)
        with_overhead = [0.0] * (most + 1)
        for n in range(1, most + 1):
            best, rows = float("inf"), n
            for size, cost in zip(reversed(sizes), reversed(costs), strict=True):
                taken = min(size, n)
                total = cost + overhead_ns + with_overhead[n - taken]
                if total * _TOLERANCE < best:
                    best, rows = total, taken
                    self.total[n] = cost + self.total[n - taken]
            self.first[n], with_overhead[n] = rows, best
        pairs = [((cost + overhead_ns) / size, -size) for size, cost in zip(sizes, costs, strict=True)]
        cheapest = min(each for each, _ in pairs)
        self.most = max(-size for each, size in pairs if each <= cheapest * _TOLERANCE)
        self.per_row = min(cost / size for size, cost in zip(sizes, costs, strict=True))

    def batch(self, waiting: int) -> int:
        """The size of the next batch while `waiting` rows wait (at least 1)."""
        return self.first[waiting] if waiting < len(self.first) else self.most

    def drain(self, rows: int) -> float:
        """The time to serve `rows` rows, in nanoseconds."""
        if rows < len(self.first):
            return self.total[rows]
        whole = (rows - len(self.first) + 1) // self.most + 1
        return whole * self.most * self.per_row + self.total[rows - whole * self.most]
