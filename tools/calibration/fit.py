"""The whole calibration of a classifier from its logits on rows it has not learned from."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.manifest import CalibrationEntry
from tools.calibration.certificates import DELTA, ERRORS, certify
from tools.calibration.error import (
    BINS,
    Bin,
    debiased_calibration_error,
    expected_calibration_error,
    reliability,
)
from tools.calibration.knots import apply_knots, fit_knots
from tools.calibration.scores import fit_temperature, scores_of

#: Share of the in-scope rows the threshold sends on.
ESCALATE = 0.15
FOLDS = 5
#: Score bins whose counts are the prior of online learning; between 24 and the format's 32.
PRIOR_BINS = 28


@dataclass(frozen=True)
class Report:
    """Shares of the calibration rows. The errors come from folds that fitted nothing of what they measure.

    `accuracy`, `escalated` and `kept_accuracy` are of the rows in scope, `oos_*` of those out of scope (None
    where there are none).
    """

    rows: int
    oos_rows: int
    accuracy: float
    oos_recall: float | None
    escalated: float
    kept_accuracy: float
    oos_escalated: float | None
    ece: float
    ece_debiased: float
    ece_bins: int

    def metrics(self, prefix: str) -> dict[str, float | str]:
        """As a manifest's `metrics`."""
        return {
            prefix + key: round(value, 4) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


@dataclass(frozen=True)
class Calibrated:
    """The manifest's entry, the report, and the calibration curve."""

    entry: CalibrationEntry
    report: Report
    curve: tuple[Bin, ...]  # cross-fitted: claimed and true accuracy, the least sure rows first


def calibrate(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    oos: int | None,
    *,
    fitted_on: str,
    escalate: float = ESCALATE,
    date: str = "",
    data_sha256: str = "",
) -> Calibrated:
    """Fit on rows [n, labels] the model has not learned from.

    `labels` are indices, -1 for out of scope where the model has no such label; `oos` is that label's index. An
    out-of-scope row answered in scope counts as wrong. The threshold escalates the least sure share `escalate` of
    the in-scope rows; without in-scope rows there is no threshold.
    """
    temperature = fit_temperature(logits, labels)
    scores, right = scores_of(logits, temperature, oos), logits.argmax(1) == labels
    knots = fit_knots(scores, right)
    chances = apply_knots(scores, knots)
    inside = (labels >= 0) & (labels != (-1 if oos is None else oos))
    threshold = _threshold(chances[inside], escalate)
    crossed = _cross_fitted(logits, labels, oos)
    entry = CalibrationEntry(
        temperature,
        knots,
        "max_softmax" if oos is None else "in_scope",
        threshold,
        fitted_on,
        rows=len(labels),
        date=date,
        data_sha256=data_sha256,
        bins=prior_bins(scores, right),
        certificates=tuple(certify(chances, right, error, DELTA) for error in ERRORS),
    )
    escalated = chances < (-1.0 if threshold is None else threshold)
    report = Report(
        rows=int(inside.sum()),
        oos_rows=int((~inside).sum()),
        accuracy=_share(right[inside]) or 0.0,
        oos_recall=_share(right[~inside]) if oos is not None else None,
        escalated=_share(escalated[inside]) or 0.0,
        kept_accuracy=_share(right[inside & ~escalated]) or 0.0,
        oos_escalated=_share(escalated[~inside]),
        ece=expected_calibration_error(crossed, right),
        ece_debiased=debiased_calibration_error(crossed, right),
        ece_bins=BINS,
    )
    return Calibrated(entry, report, reliability(crossed, right))


def prior_bins(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[tuple[float, int, int], ...]:
    """Bins of about equal mass as (largest score, right, wrong); the last one reaches 1, equal scores share one."""
    order = np.argsort(scores, kind="stable")
    bins: list[tuple[float, int, int]] = []
    for part in np.array_split(order, min(PRIOR_BINS, len(order))) if len(order) else []:
        top, good = float(scores[part].max()), int(right[part].sum())
        if bins and bins[-1][0] >= top:
            _, before, bad = bins.pop()
            bins.append((top, before + good, bad + len(part) - good))
        else:
            bins.append((top, good, len(part) - good))
    return (*bins[:-1], (1.0, *bins[-1][1:])) if bins else ()


def _threshold(chances: NDArray[np.float64], escalate: float) -> float | None:
    """Half-way between two chances, so that rounding moves no row; the split nearest to the wanted share."""
    if not len(chances):
        return None
    rising = np.sort(chances)
    # Where a chance differs from the one before: so many rows lie below.
    below = np.concatenate([[0], np.flatnonzero(np.diff(rising) > 0) + 1])
    best = int(below[np.argmin(np.abs(below - escalate * len(rising)))])
    return float(rising[0] if best == 0 else (rising[best - 1] + rising[best]) / 2)


def _cross_fitted(
    logits: NDArray[np.float32], labels: NDArray[np.int64], oos: int | None
) -> NDArray[np.float64]:
    """Each row's chance by a temperature and a map that were fitted without it."""
    crossed = np.empty(len(labels))
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    for i in range(FOLDS):
        fitted, held = fold != i, fold == i
        temperature = fit_temperature(logits[fitted], labels[fitted])
        knots = fit_knots(scores_of(logits[fitted], temperature, oos), (logits.argmax(1) == labels)[fitted])
        crossed[held] = apply_knots(scores_of(logits[held], temperature, oos), knots)
    return crossed


def _share(claims: NDArray[np.bool_]) -> float | None:
    return float(claims.mean()) if len(claims) else None
