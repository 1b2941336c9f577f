"""How good intents with slots are: spans as in CoNLL, a value counts only with its name and both its ends right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.calibration.error import expected_calibration_error
from tools.rows import LabelledText, Span


@dataclass(frozen=True)
class Found:
    """An answer: the intent, the spans, and the confidence that both are right."""

    intent: str
    slots: tuple[Span, ...]
    confidence: float


@dataclass(frozen=True)
class Score:
    """Precision, recall and their harmonic mean of `support` true spans."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Report:
    """Shares of rows, the score of all spans together and of each slot. `exact`: intent and all spans right."""

    rows: int
    intent_accuracy: float
    exact: float
    ece: float
    slots: Score
    by_slot: dict[str, Score]


def is_exact(found: Found, row: LabelledText) -> bool:
    """Whether nothing at all is wrong."""
    return found.intent == row.label and set(found.slots) == set(row.slots)


def report_of(found: Sequence[Found], rows: Sequence[LabelledText]) -> Report:
    """Compare answers with the truth. `ece` is of the confidence against `exact`."""
    hits: Counter[str] = Counter()
    claims: Counter[str] = Counter()
    truths: Counter[str] = Counter()
    for answer, row in zip(found, rows, strict=True):
        hits.update(span.slot for span in set(answer.slots) & set(row.slots))
        claims.update(span.slot for span in answer.slots)
        truths.update(span.slot for span in row.slots)
    exact = np.array([is_exact(answer, row) for answer, row in zip(found, rows, strict=True)])
    return Report(
        rows=len(rows),
        intent_accuracy=float(np.mean([a.intent == row.label for a, row in zip(found, rows, strict=True)])),
        exact=float(exact.mean()),
        ece=expected_calibration_error(np.array([answer.confidence for answer in found]), exact),
        slots=_score(hits.total(), claims.total(), truths.total()),
        by_slot={
            slot: _score(hits[slot], claims[slot], truths[slot])
            for slot in sorted(claims.keys() | truths.keys())
        },
    )


def _score(hits: int, claims: int, truths: int) -> Score:
    precision, recall = hits / max(1, claims), hits / max(1, truths)
    return Score(precision, recall, 2 * hits / max(1, claims + truths), truths)
