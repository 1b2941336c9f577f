"""How far claimed and true accuracy lie apart: expected calibration error, plain and debiased."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of like chance: their number, mean claim and true share."""

    rows: int
    claimed: float
    true: float


def reliability(chances: NDArray[np.float64], right: NDArray[np.bool_], bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equal mass, the least sure first."""
    parts = np.array_split(np.argsort(chances, kind="stable"), bins)
    return tuple(Bin(len(p), float(chances[p].mean()), float(right[p].mean())) for p in parts if len(p))


def expected_calibration_error(
    chances: NDArray[np.float64], right: NDArray[np.bool_], bins: int = BINS
) -> float:
    """Mean distance of claimed and true accuracy over bins of equal mass; biased upwards by noise."""
    return _mean([(b.rows, abs(b.claimed - b.true)) for b in reliability(chances, right, bins)])


def debiased_calibration_error(
    chances: NDArray[np.float64], right: NDArray[np.bool_], bins: int = BINS
) -> float:
    """The same less what chance alone adds, at least 0.

    In each bin the share of right rows is taken as normal around its true value; what |distance| exceeds in
    the mean is subtracted. Source: Kumar, Liang and Ma 2019, in closed form (mean of a folded normal).
    """
    terms = []
    for b in reliability(chances, right, bins):
        distance, noise = abs(b.claimed - b.true), math.sqrt(b.true * (1.0 - b.true) / b.rows)
        terms.append((b.rows, 2.0 * distance - _folded_mean(distance, noise)))
    return max(0.0, _mean(terms))


def _folded_mean(mean: float, deviation: float) -> float:
    """E|X| of a normal X."""
    if deviation == 0.0:
        return abs(mean)
    z = mean / deviation
    return deviation * math.sqrt(2.0 / math.pi) * math.exp(-z * z / 2.0) + mean * math.erf(z / math.sqrt(2.0))


def _mean(terms: list[tuple[int, float]]) -> float:
    total = sum(rows for rows, _ in terms)
    return sum(rows * value for rows, value in terms) / total if total else 0.0
