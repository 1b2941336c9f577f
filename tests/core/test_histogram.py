"""A histogram counts each value once, below the smallest limit that holds it."""

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.messages import LATENCY_LIMITS, Histogram


def test_a_value_is_counted_at_its_limit_and_beyond():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.1):
        histogram.add(value)
    assert histogram.cumulative() == [(1.0, 2), (2.0, 4), (float("inf"), 5)]
    assert histogram.total == 7.1


@given(st.lists(st.floats(0, 100)))
def test_each_value_is_counted_once(values):
    histogram = Histogram(LATENCY_LIMITS)
    for value in values:
        histogram.add(value)
    for limit, count in histogram.cumulative():
        assert count == sum(value <= limit for value in values)
