import random

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.backoff import Backoff


@given(st.floats(0, 10**9), st.integers(0, 2**32))
def test_stays_between_zero_and_a_bound_that_grows_with_the_outage(out_s, seed):
    delay_s = Backoff(base_s=0.5, cap_s=60.0).delay_s(out_s, random.Random(seed).random)
    assert 0.0 <= delay_s <= min(60.0, max(0.5, out_s / 4))


def test_the_bound_grows_from_the_base_up_to_the_cap():
    almost_one = lambda: 0.999999  # noqa: E731
    delays = [round(Backoff(0.5, 4.0).delay_s(out_s, almost_one), 3) for out_s in (0, 2, 4, 10, 16, 10**9)]
    assert delays == [0.5, 0.5, 1.0, 2.5, 4.0, 4.0]


def test_after_ten_seconds_away_the_next_try_comes_within_three():
    """Both ends must be back before the cloud answers again: 3 s after an outage of ten."""
    assert Backoff().delay_s(10.0, lambda: 0.999999) < 3.0


def test_spreads_over_the_whole_range():
    source = random.Random(7).random
    delays = [Backoff(1.0, 8.0).delay_s(100.0, source) for _ in range(1000)]
    assert min(delays) < 0.5
    assert max(delays) > 7.5


def test_where_a_person_must_act_the_bound_is_the_cap_at_once():
    assert Backoff(0.5, 30.0).longest_s(lambda: 0.5) == 15.0
