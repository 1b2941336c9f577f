"""Joining the evidence of both tiers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.escalation.score_fusion import Pooling, join, pool

LABELS = 5
logits = st.lists(st.floats(-30, 30, width=32), min_size=LABELS, max_size=LABELS)
weights = st.floats(0.01, 10)


def log_probabilities(values):
    x = np.array(values, np.float32)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


@given(logits, logits, weights, weights)
def test_the_pooled_answer_is_a_distribution_and_one_sided_weights_give_one_side(a, b, edge, cloud):
    a, b = log_probabilities(a), log_probabilities(b)
    assert np.exp(pool(a, b, edge, cloud)).sum() == pytest.approx(1.0, abs=1e-4)
    assert np.allclose(pool(a, b, 1.0, 0.0), a, atol=1e-4)
    assert np.allclose(pool(a, b, 0.0, 1.0), b, atol=1e-4)


@given(logits, weights)
def test_agreeing_tiers_are_never_less_sure_than_the_weaker_weight_makes_them(a, weight):
    a = log_probabilities(a)
    assert pool(a, a, weight, 1.0).max() >= a.max() - 1e-4


def test_two_weak_votes_for_one_label_outweigh_two_split_strong_ones():
    edge = log_probabilities([3.0, 2.5, 0, 0, 0])
    cloud = log_probabilities([0, 2.5, 3.0, 0, 0])
    pooled, best, chance = join(edge, cloud, Pooling(1.0, 1.0, (0.0, 1.0), (0.1, 0.9)))
    assert best == 1
    assert chance == pytest.approx(0.1 + 0.8 * float(np.exp(pooled[1])), abs=1e-6)


def test_batches_pool_row_by_row():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, LABELS)).astype(np.float32)
    together = pool(a, b, 0.3, 0.7)
    assert np.allclose(together, [pool(x, y, 0.3, 0.7) for x, y in zip(a, b, strict=True)], atol=1e-6)
