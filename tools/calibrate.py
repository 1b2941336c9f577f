"""Fit what turns logits into the probability that an answer is right, and choose the threshold to keep it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.manifest import CalibrationEntry

#: Rows per knot before merging; 30 knots stay below the format's 32 and need about 100 rows each.
KNOTS = 30
BINS = 15


@dataclass(frozen=True)
class Report:
    """Shares of validation rows. `ece` comes from folds that fitted nothing of what they measure."""

    accuracy: float
    oos_recall: float
    escalated: float
    kept_accuracy: float
    oos_escalated: float
    ece: float


def scores_of(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """The largest softmax value of each row at `temperature`."""
    scaled = logits.astype(np.float64) / temperature
    return np.asarray(1.0 / np.exp(scaled - scaled.max(1, keepdims=True)).sum(1))


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017), to about 1 %."""

    def loss(temperature: float) -> float:
        scaled = logits.astype(np.float64) / temperature
        scaled -= scaled.max(1, keepdims=True)
        chosen = scaled[np.arange(len(labels)), labels]
        return float((np.log(np.exp(scaled).sum(1)) - chosen).mean())

    return float(min(np.geomspace(0.1, 10.0, 460), key=loss))


def fit_knots(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Isotonic regression over bins of equal mass: pools of falling neighbours become one knot."""
    order = np.argsort(scores, kind="stable")
    pools = [(part.size, scores[part].mean(), right[part].mean()) for part in np.array_split(order, KNOTS)]
    merged: list[tuple[int, float, float]] = []
    for pool in pools:
        merged.append(pool)
        while len(merged) > 1 and (merged[-1][2] <= merged[-2][2] or merged[-1][1] <= merged[-2][1] + 1e-9):
            (n, s, p), (m, t, q) = merged[-2:]
            merged[-2:] = [(n + m, (n * s + m * t) / (n + m), (n * p + m * q) / (n + m))]
    # No finite sample shows certainty: Laplace's rule bounds what may be claimed.
    edge = 1.0 / (len(scores) + 2)
    knots = [(float(s), float(np.clip(p, edge, 1.0 - edge))) for _, s, p in merged]
    return tuple(knots) if len(knots) > 1 else ((0.0, knots[0][1]), (1.0, knots[0][1]))


def apply_knots(scores: NDArray[np.float64], knots: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    """Probability of being right for each score."""
    return np.asarray(np.interp(scores, [s for s, _ in knots], [p for _, p in knots]))


def expected_calibration_error(chances: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Mean distance of claimed and true accuracy over 15 bins of equal mass."""
    parts = np.array_split(np.argsort(chances, kind="stable"), BINS)
    return float(sum(len(p) * abs(chances[p].mean() - right[p].mean()) for p in parts if len(p)) / len(right))


def calibrate(
    logits: NDArray[np.float32], labels: NDArray[np.int64], oos: int, *, escalate: float, fitted_on: str
) -> tuple[CalibrationEntry, Report]:
    """Fit on rows the model has not seen; out-of-scope rows answered in scope count as wrong.

    The threshold sends the least sure share `escalate` of the in-scope rows to the cloud.
    """
    temperature = fit_temperature(logits, labels)
    scores, right = scores_of(logits, temperature), logits.argmax(1) == labels
    knots = fit_knots(scores, right)
    chances = apply_knots(scores, knots)
    inside = labels != oos
    threshold = float(np.quantile(chances[inside], escalate))
    kept = inside & (chances >= threshold)
    crossed = np.empty_like(chances)
    fold = np.random.default_rng(0).integers(0, 5, len(labels))
    for i in range(5):
        crossed[fold == i] = apply_knots(scores[fold == i], fit_knots(scores[fold != i], right[fold != i]))
    report = Report(
        accuracy=float(right[inside].mean()),
        oos_recall=float(right[~inside].mean()),
        escalated=float((chances < threshold)[inside].mean()),
        kept_accuracy=float(right[kept].mean()),
        oos_escalated=float((chances < threshold)[~inside].mean()),
        ece=expected_calibration_error(crossed, right),
    )
    return CalibrationEntry(temperature, knots, threshold, fitted_on), report
