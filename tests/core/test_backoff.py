import random

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.backoff import Backoff


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_stays_between_zero_and_the_doubling_bound(attempt, seed):
    delay_s = Backoff(base_s=0.5, cap_s=60.0).delay_s(attempt, random.Random(seed).random)
    assert 0.0 <= delay_s <= min(60.0, 0.5 * 2.0 ** min(attempt, 32))


def test_the_bound_doubles_up_to_the_cap():
    almost_one = lambda: 0.999999  # noqa: E731
    delays = [round(Backoff(0.5, 4.0).delay_s(n, almost_one), 3) for n in range(5)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_spreads_over_the_whole_range():
    source = random.Random(7).random
    delays = [Backoff(1.0, 8.0).delay_s(3, source) for _ in range(1000)]
    assert min(delays) < 0.5
    assert max(delays) > 7.5
