"""A distribution counts each duration once, below the smallest bound that holds it."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.messages import BOUNDS_NS, Distribution


def test_a_value_is_counted_at_its_bound_and_beyond():
    distribution = Distribution()
    for ns in (1, BOUNDS_NS[0], BOUNDS_NS[0] + 1, BOUNDS_NS[1], BOUNDS_NS[-1] + 1):
        distribution.add(ns)
    assert (distribution.counts[:3], distribution.counts[-1]) == ([2, 2, 0], 1)
    assert distribution.count == 5


@given(st.lists(st.integers(0, 10**11)))
def test_each_value_is_counted_once(values):
    distribution = Distribution()
    for ns in values:
        distribution.add(ns)
    assert distribution.ns == sum(values)
    for bound, count in zip((*BOUNDS_NS, float("inf")), accumulate(distribution.counts), strict=True):
        assert count == sum(ns <= bound for ns in values)
