"""What batches cost: learned from noise, apart from how fast the engine runs just now."""

import random

import pytest

from edge_runtime.core.scheduling.batch_costs import BatchCosts, Speed, prepared_sizes


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9)), (6, (1, 2, 4, 6))]
)
def test_the_ladder_is_what_engines_prepare(most, sizes):
    assert prepared_sizes(most) == sizes


def test_a_batch_costs_what_the_size_it_is_padded_to_costs():
    costs = BatchCosts(8, ((1, 100), (2, 120), (4, 160), (8, 240)))
    assert [costs.mean(rows) for rows in range(1, 9)] == [100, 120, 160, 160, 240, 240, 240, 240]


def test_sizes_never_seen_are_affine_in_those_that_were():
    costs = BatchCosts(8, ((1, 110), (2, 120)))
    assert costs.mean(8) == pytest.approx(180)
    assert costs.fixed_and_marginal() == (pytest.approx(100), pytest.approx(10))
    costs.observe(8, 300)  # seen now
    assert costs.mean(8) == 300


def test_unseen_sizes_never_cost_less_than_smaller_ones():
    costs = BatchCosts(8, ((1, 200), (2, 100)))  # noise: two cost less than one
    assert costs.mean(8) >= 200


def test_without_a_ladder_the_first_batches_tell():
    costs = BatchCosts(4)
    assert not costs.is_known
    assert costs.mean(4) == 0
    costs.observe(2, 100)
    assert costs.is_known
    assert 50 <= costs.mean(1) <= 100 <= costs.mean(4) <= 200


def test_the_mean_and_the_99th_percentile_of_noise_are_found():
    costs, chance = BatchCosts(1), random.Random(1)
    seen = [chance.lognormvariate(0, 0.4) * 1e6 for _ in range(6000)]
    above = 0
    for i, duration in enumerate(seen):
        above += i >= 2000 and duration > costs.p99(1)
        costs.observe(1, duration)
    assert costs.mean(1) == pytest.approx(sum(seen) / len(seen), rel=0.1)
    assert 0.004 <= above / 4000 <= 0.02


def follow(costs, speed, factor, batches, sizes=(1, 2, 4, 8)):
    for i in range(batches):
        rows = sizes[i % len(sizes)]
        ratio = costs.observe(rows, factor * (90 + 10 * rows) / speed.factor)
        if ratio is not None:
            speed.observe(ratio * speed.factor)


@pytest.mark.parametrize("factor", [0.6, 1.7, 3.0])
def test_a_throttled_engine_is_followed_within_twenty_batches_at_every_size(factor):
    latency_profile = tuple((rows, 90 + 10 * rows) for rows in (1, 2, 4, 8))
    costs, speed = BatchCosts(8, latency_profile), Speed()
    follow(costs, speed, 1.0, 60)
    follow(costs, speed, factor, 20, sizes=(1,))  # only small ones run, and the large ones are known too
    for rows in (1, 8):
        assert costs.mean(rows) * speed.factor == pytest.approx(factor * (90 + 10 * rows), rel=0.15)
    follow(costs, speed, 1.0, 20)
    assert costs.mean(4) * speed.factor == pytest.approx(130, rel=0.15)


def test_one_hiccup_of_a_hundredfold_changes_little():
    latency_profile = tuple((rows, 90 + 10 * rows) for rows in (1, 2, 4, 8))
    costs, speed = BatchCosts(8, latency_profile), Speed()
    follow(costs, speed, 1.0, 60)
    follow(costs, speed, 100.0, 1)
    assert costs.mean(1) * speed.factor < 140
    follow(costs, speed, 1.0, 12)
    assert costs.mean(1) * speed.factor == pytest.approx(100, rel=0.05)
