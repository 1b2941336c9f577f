"""From a model's own probability of a whole answer to the chance that intent and all slots are right."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.manifest import CalibrationEntry
from tools.calibration.error import expected_calibration_error
from tools.calibration.knots import apply_knots, fit_knots

Judged = tuple[NDArray[np.float64], NDArray[np.bool_]]


def _nll(logits: NDArray[np.float32], wanted: Sequence[int], temperature: float) -> float:
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(wanted)), wanted]).sum())


def fit_temperature(
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
    intents: Sequence[int],
    tags: Sequence[Sequence[int]],
) -> float:
    """One temperature for intents and tags, by the likelihood of all of them (Guo et al. 2017), to about 2 %."""
    words = np.concatenate([by_tag[: len(row)] for by_tag, row in zip(logits[1], tags, strict=True)])
    wanted = [tag for row in tags for tag in row]

    def loss(temperature: float) -> float:
        return _nll(logits[0], intents, temperature) + _nll(words, wanted, temperature)

    return float(min(np.geomspace(0.2, 5.0, 160), key=loss))


def calibrate(
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
    intents: Sequence[int],
    tags: Sequence[Sequence[int]],
    judged: Callable[[float], Judged],
) -> tuple[CalibrationEntry, float]:
    """Fit on rows the net has not seen; also return the calibration error of five folds that fitted nothing.

    `judged(temperature)` gives the rows' scores and whether all of each is right.
    """
    temperature = fit_temperature(logits, intents, tags)
    scores, right = judged(temperature)
    fold = np.random.default_rng(0).integers(0, 5, len(scores))
    crossed = np.empty_like(scores)
    for i in range(5):
        knots = fit_knots(scores[fold != i], right[fold != i])
        crossed[fold == i] = apply_knots(scores[fold == i], knots)
    ece = expected_calibration_error(crossed, right)
    return CalibrationEntry(temperature, fit_knots(scores, right)), ece
