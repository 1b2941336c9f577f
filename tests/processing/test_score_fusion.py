"""A cloud's scores are believed only where they fit its own answer and this device's labels."""

import numpy as np
import pytest

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.escalation.score_fusion import Pooling
from edge_runtime.core.messages import Answer
from edge_runtime.processing.ngrams import NgramFeaturiser
from edge_runtime.processing.text_classification import Calibration, Fusion, TextClassification

PROCESSOR = TextClassification(
    NgramFeaturiser(slots=4, buckets=8, grams=(3,), skips=False),
    ["a", "b", "c"],
    Calibration(1.0, (0.0, 1.0), (0.0, 1.0)),
    version="1",
    max_text_bytes=99,
    fusion=Fusion("1", Pooling(1.0, 1.0, (0.0, 1.0), (0.0, 1.0))),
)


def answer(label, *scores):
    return Answer((label, np.float32(0.5)), 0.5, (np.array(scores, np.float32),))


def test_both_sides_count():
    joined = PROCESSOR.fuse(answer(b"a", -0.5, -1.0, -9.0), answer(b"b", -9.0, -0.6, -0.8))
    assert joined.values[0] == b"b"
    assert np.exp(joined.extras[0]).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("scores", [(0.0, -9.0, -9.0), (np.nan, 0.0, 0.0), (0.0, np.inf, 0.0)])
def test_scores_that_contradict_the_answer_or_are_no_numbers_are_refused(scores):
    with pytest.raises(InvalidRequest):
        PROCESSOR.fuse(answer(b"a", 0.0, -1.0, -2.0), answer(b"c", *scores))
