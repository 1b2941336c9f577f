"""Pad or split, against trying every way there is."""

from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_runtime.core.scheduling.splitting import Split

SIZES = (1, 2, 4, 8)


def cheapest(rows, costs):
    """The least total over all ways to serve `rows`."""

    @cache
    def total(n):
        if n <= 0:
            return 0
        return min(cost + total(n - size) for size, cost in zip(SIZES, costs, strict=True))

    return total(rows)


@given(st.lists(st.integers(1, 1000), min_size=4, max_size=4))
def test_no_way_to_split_is_more_than_a_little_cheaper(costs):
    split = Split(SIZES, costs)
    for rows in range(9):
        assert split.total[rows] <= cheapest(rows, costs) * 1.02**rows + 1e-9
        assert split.total[rows] >= cheapest(rows, costs) - 1e-9
        if rows:
            assert 1 <= split.batch(rows) <= rows
    assert 1 <= split.batch(100) <= 8


@pytest.mark.parametrize(
    ("costs", "waiting", "rows"),
    [
        ((10, 11, 12, 13), 5, 5),  # padding is nearly free
        ((10, 12, 15, 90), 5, 4),  # the next size costs more than two batches
        ((10, 12, 15, 90), 8, 4),
        ((10, 12, 15, 90), 50, 4),  # and a long queue is served by the size that is cheapest for each row
        ((10, 30, 60, 120), 3, 1),  # batches do not pay at all
    ],
)
def test_the_next_batch_is_the_one_that_pays(costs, waiting, rows):
    assert Split(SIZES, costs).batch(waiting) == rows


def test_a_long_queue_takes_as_long_as_its_batches():
    split = Split(SIZES, (10, 12, 16, 24))
    assert split.drain(0) == 0
    assert split.drain(8) == 24
    assert split.drain(80) == 240
    assert split.drain(81) == 250
    assert [split.drain(n + 1) >= split.drain(n) for n in range(100)] == [True] * 100


def test_time_outside_the_engine_speaks_for_large_batches_and_is_no_part_of_the_engine_s_time():
    costs = (10, 22, 46, 95)  # each size costs a little more than two of the one below it
    alone = Split(SIZES, costs)
    assert (alone.batch(8), alone.batch(100), alone.total[8]) == (1, 1, 80)
    split = Split(SIZES, costs, overhead_ns=5)
    assert (split.batch(8), split.batch(100), split.total[8]) == (8, 8, 95)
    assert split.per_row == 10
