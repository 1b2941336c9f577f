import random

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.escalation.roundtrip import RoundTrip

MS = 1_000_000


def trip_of(*took_ns):
    trip = RoundTrip()
    for at, took in enumerate(took_ns):
        trip.observe(at, took)
    return trip


def test_it_is_pessimistic_and_forgets():
    trip = RoundTrip()
    assert trip.p95_ns(0) == 0
    for at in range(100):
        trip.observe(at, 1000 if at % 2 else 2000)
    estimate = trip.p95_ns(100)
    assert 2000 <= estimate <= 5000
    assert trip.p95_ns(100 + 61_000_000_000) == estimate // 4


def test_one_slow_reply_does_not_own_it():
    for ordinary in range(1, 20):
        trip = trip_of(*[50 * MS] * ordinary, 1500 * MS)
        assert trip.p95_ns(ordinary) == 50 * MS
        trip = trip_of(1500 * MS, *[50 * MS] * ordinary)
        assert trip.p95_ns(ordinary) == 50 * MS


def test_a_slow_peer_is_believed():
    assert trip_of(50 * MS, *[1500 * MS] * 3).p95_ns(4) == 1500 * MS
    assert trip_of(1500 * MS).p95_ns(1) == 1500 * MS


def test_old_replies_are_forgotten_by_number():
    assert trip_of(*[1500 * MS] * 40, *[50 * MS] * 32).p95_ns(72) == 50 * MS


def test_some_callers_try_against_it_more_while_little_is_known():
    source = random.Random(3)
    for known, share in ((1, 0.5), (32, 0.125)):
        trip = trip_of(*[MS] * known)
        tried = sum(trip.is_worth_a_try(source.random()) for _ in range(10_000))
        assert abs(tried / 10_000 - share) < 0.02


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=80))
def test_it_is_one_of_the_newest_replies_and_not_above_all_others(took):
    trip = trip_of(*took)
    newest = sorted(took[-32:])
    estimate = trip.p95_ns(len(took))
    assert estimate in newest
    assert len(newest) == 1 or estimate <= newest[-2]
