"""A monotone map from score to the probability of being right, as a few knots with straight lines between."""

import numpy as np
from numpy.typing import NDArray

Knots = tuple[tuple[float, float], ...]

#: Pools before merging; below the format's 32, and 33 rows each at the least.
POOLS = 30
#: With fewer rows isotonic regression fits the noise, and two parameters are better.
ISOTONIC_ROWS = 1000
#: Scores closer to 0 or 1 than this count as equal.
_EDGE = 1e-6


def fit_knots(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Knots:
    """Isotonic regression with 1,000 rows or more, else Platt's logistic; claims stay off certainty.

    No finite sample shows certainty: Laplace's rule bounds each chance to [1/(n+2), 1-1/(n+2)].
    """
    raw = isotonic(scores, right) if len(scores) >= ISOTONIC_ROWS else logistic(scores, right)
    edge = 1.0 / (len(scores) + 2)
    return tuple((score, min(max(chance, edge), 1.0 - edge)) for score, chance in raw)


def isotonic(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Knots:
    """Pool adjacent violators over bins of equal mass: each pool is a knot at its mean score."""
    order = np.argsort(scores, kind="stable")
    merged: list[tuple[int, float, float]] = []
    for part in np.array_split(order, min(POOLS, len(order))):
        merged.append((part.size, float(scores[part].mean()), float(right[part].mean())))
        while len(merged) > 1 and (merged[-1][2] <= merged[-2][2] or merged[-1][1] <= merged[-2][1] + 1e-9):
            (n, s, p), (m, t, q) = merged[-2:]
            merged[-2:] = [(n + m, (n * s + m * t) / (n + m), (n * p + m * q) / (n + m))]
    if len(merged) == 1:
        return (0.0, merged[0][2]), (1.0, merged[0][2])
    return tuple((score, chance) for _, score, chance in merged)


def logistic(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Knots:
    """Platt's map on the score's log-odds, with his smoothed targets; the slope is never negative.

    Source: Platt 1999. A prior of one row's weight around slope 1 keeps a handful of rows from being taken
    for certainty; without any rows the chance is the score.
    """
    x = _log_odds(scores)
    good = int(right.sum())
    target = np.where(right, (good + 1) / (good + 2), 1 / (len(right) - good + 2))
    slope, bias = _newton(x, target)
    if slope < 0.0:
        chance = (good + 1) / (len(right) + 2)
        return (0.0, chance), (1.0, chance)
    span = (float(x.min()), float(x.max())) if len(x) else (0.0, 0.0)
    grid = np.linspace(min(span[0], -1.0), max(span[1], 1.0), POOLS)
    chances = np.maximum.accumulate(1.0 / (1.0 + np.exp(-(slope * grid + bias))))
    return tuple(zip((1.0 / (1.0 + np.exp(-grid))).tolist(), chances.tolist(), strict=True))


def apply_knots(scores: NDArray[np.float64], knots: Knots) -> NDArray[np.float64]:
    """Probability of being right for each score."""
    return np.asarray(np.interp(scores, [s for s, _ in knots], [p for _, p in knots]))


def _log_odds(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(scores, _EDGE, 1.0 - _EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _newton(x: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and bias of the regularised logistic regression, by damped Newton steps."""
    features = np.stack([x, np.ones_like(x)], axis=1)
    prior = np.array([1.0, 0.0])
    weights = prior.copy()

    def loss(at: NDArray[np.float64]) -> float:
        z = features @ at
        return float((np.logaddexp(0.0, z) - target * z).sum() + 0.5 * ((at - prior) ** 2).sum())

    for _ in range(50):
        chance = 1.0 / (1.0 + np.exp(-np.clip(features @ weights, -500, 500)))
        gradient = features.T @ (chance - target) + (weights - prior)
        curve = (features * (chance * (1.0 - chance))[:, None]).T @ features + np.eye(2)
        step = np.linalg.solve(curve, gradient)
        scale = 1.0
        while scale > 1e-6 and loss(weights - scale * step) > loss(weights):
            scale /= 2
        weights = weights - scale * step
        if float(np.abs(scale * step).max()) < 1e-8:
            break
    return float(weights[0]), float(weights[1])
