"""The duration of a batch, learned per lane and batch size, and one speed factor per engine.

The factor separates the cost of a batch from the present speed of the engine. A throttled processor or a busy neighbour
slows every size alike, so one observation of any size corrects the prediction of all. Times are nanoseconds,
predictions are floats. No clock: durations are arguments.
"""

from collections.abc import Sequence

from edge_runtime.core.messages import LatencyProfile

#: A figure of the warm-up sweep counts as this many observations, so the first real ones weigh 1/3, 1/4, ...
_PRIOR_WEIGHT = 2
#: A size corrects the speed factor only after this many observations; before, it learns its own mean.
_TRUSTED_AFTER = 8
#: Smallest weight of one observation in the mean of its size: slow, because the speed factor follows fast changes.
_MEAN_WEIGHT = 0.02
#: Weight of one batch in the speed factor: after 20 batches 1 % of the old speed is left (0.8 ** 20).
_SPEED_WEIGHT = 0.2
#: One batch can claim at most this change of speed. A batch that takes a hundred times as long (a page fault, a
#: descheduled core) would otherwise stop all admission for many batches.
_SPEED_STEP = 2.0
#: The splits and the learned window are recomputed after a mean has changed by this share.
_DRIFT = 0.1


class BatchCosts:
    """Mean and 99th percentile of one lane's batches at speed 1, per prepared size.

    Where engines pad, a batch of `rows` costs what the next larger prepared size costs. Sizes without an observation
    are predicted by an affine fit to the others (t(b) = fixed + marginal * b, least squares).
    """

    __slots__ = ("_index", "_noted", "deviations", "means", "p99s", "seen", "sizes", "version")

    def __init__(self, max_batch: int, prior: LatencyProfile = (), *, pads: bool = True) -> None:
        self.sizes = prepared_sizes(max_batch) if pads else tuple(range(1, max_batch + 1))
        self._index = [
            0,
            *(i for i, size in enumerate(self.sizes) for _ in range(size - _below(self.sizes, i))),
        ]
        self.seen = [0] * len(self.sizes)
        self.means = [0.0] * len(self.sizes)
        self.deviations = [0.0] * len(self.sizes)
        for rows, ns in prior:
            if rows in self.sizes:
                at = self.sizes.index(rows)
                self.seen[at], self.means[at], self.deviations[at] = _PRIOR_WEIGHT, float(ns), ns / 8
        self.p99s = [1.375 * mean for mean in self.means]
        self._guess_unseen()
        self.version = 0
        self._noted = list(self.means)

    @property
    def is_known(self) -> bool:
        """Whether any size was measured; if not, all costs are 0."""
        return any(self.seen)

    def mean(self, rows: int) -> float:
        """Expected duration of a batch of `rows`, at speed 1."""
        return self.means[self._index[rows]]

    def p99(self, rows: int) -> float:
        """The duration that one batch in a hundred exceeds, at speed 1."""
        return self.p99s[self._index[rows]]

    def fixed_and_marginal(self) -> tuple[float, float]:
        """The affine fit (a, c) to the table: t(b) = a + c*b, both at least 0."""
        return _affine(self.sizes, self.means)

    def observe(self, rows: int, duration: float) -> float | None:
        """Learn from one batch of `duration` nanoseconds at speed 1; return its duration over the predicted mean.

        None while the size has too few observations to correct the speed factor.
        """
        at = self._index[rows]
        seen, mean = self.seen[at], self.means[at]
        self.seen[at] = seen + 1
        ratio = duration / mean if mean > 0 and seen >= _TRUSTED_AFTER else None
        if not seen:
            self.means[at], self.deviations[at], self.p99s[at] = duration, duration / 8, duration * 1.375
            self._guess_unseen()
        else:
            weight = max(1 / (seen + 1), _MEAN_WEIGHT)
            # The error is clipped (Huber): one outlier must not distort the next hundred batches. The first figures,
            # from a sweep with another shape or on a busy machine, may be wrong by more.
            spread = 4 * self.deviations[at] + mean / 8 if seen >= _TRUSTED_AFTER else 3 * mean
            error = duration - mean
            if abs(error) > spread:
                error = spread if error > 0 else -spread
            self.means[at] = mean + weight * error
            # The quantile is scaled with the mean: by its own steps it would need a thousand batches to come down.
            self.p99s[at] *= self.means[at] / mean
            self.deviations[at] += weight * (abs(error) - self.deviations[at])
            self._raise_or_lower(at, duration)
        if abs(self.means[at] - self._noted[at]) > _DRIFT * self._noted[at]:
            self._noted = list(self.means)
            self.version += 1
        return ratio

    def _raise_or_lower(self, at: int, duration: float) -> None:
        """Move the 99th percentile by steps that balance where 1 % of batches take longer (Robbins and Monro 1951)."""
        step = self.deviations[at] + self.means[at] / 64
        p99 = self.p99s[at] + (0.99 * step if duration > self.p99s[at] else -0.01 * step)
        self.p99s[at] = max(p99, self.means[at])

    def _guess_unseen(self) -> None:
        known = [i for i, count in enumerate(self.seen) if count]
        if not known:
            return
        fixed, marginal = _affine([self.sizes[i] for i in known], [self.means[i] for i in known])
        for i, count in enumerate(self.seen):
            if not count:
                # Never below a smaller size that was measured: a larger batch is not cheaper.
                floor = max((self.means[k] for k in known if k < i), default=0.0)
                self.means[i] = max(fixed + marginal * self.sizes[i], floor)
                self.deviations[i] = self.means[i] / 4
                self.p99s[i] = 1.75 * self.means[i]


class Speed:
    """How many times as long as learned batches take on one engine at present; 1.0 is as learned."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, ratio: float) -> None:
        """Move the factor towards `ratio`: the duration of a batch over its predicted mean at speed 1."""
        ratio = min(max(ratio, self.factor / _SPEED_STEP), self.factor * _SPEED_STEP)
        self.factor += _SPEED_WEIGHT * (ratio - self.factor)


def prepared_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that engines prepare: the powers of two below `max_batch`, and `max_batch`."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if max_batch == 1 else (*sizes, max_batch)


def _below(sizes: Sequence[int], i: int) -> int:
    return sizes[i - 1] if i else 0


def _affine(sizes: Sequence[int], means: Sequence[float]) -> tuple[float, float]:
    """Least squares of means over sizes, with equal weights; of a single point, half is taken as fixed."""
    if len(sizes) == 1:
        return means[0] / 2, means[0] / 2 / sizes[0]
    size, mean = sum(sizes) / len(sizes), sum(means) / len(means)
    slope = sum((s - size) * (m - mean) for s, m in zip(sizes, means, strict=True))
    marginal = max(slope / sum((s - size) ** 2 for s in sizes), 0.0)
    return max(mean - marginal * size, 0.0), marginal
