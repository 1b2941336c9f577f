from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.escalation.breaker import Breaker, BreakerLimits, BreakerState
from edge_runtime.core.escalation.roundtrip import RoundTrip
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words

LIMITS = BreakerLimits(window_ns=100, min_count=4, fault_rate=0.5, open_ns=50)


def run(breaker, now_ns, outcomes):
    for outcome in outcomes:
        permit = breaker.permit(now_ns)
        assert permit is not None
        if outcome == "x":
            breaker.failed(permit, now_ns)
        elif outcome == ".":
            breaker.succeeded(permit, now_ns)
        else:
            breaker.abandoned(permit)


def test_opens_on_the_rate_with_a_minimum_count():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "xxx")
    assert breaker.state(0) is BreakerState.CLOSED  # three of three, but three is too few
    run(breaker, 1, "x")
    assert breaker.state(1) is BreakerState.OPEN
    assert breaker.permit(1) is None


def test_a_low_rate_keeps_it_closed():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "..x." * 10)
    assert breaker.state(0) is BreakerState.CLOSED


def test_old_faults_leave_the_window():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "xxx")
    run(breaker, 100, "x")
    assert breaker.state(100) is BreakerState.CLOSED


def test_what_says_nothing_never_opens_it():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "----------")
    assert breaker.state(0) is BreakerState.CLOSED


def test_half_open_lets_exactly_one_probe_through():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "xxxx")
    assert breaker.permit(49) is None
    assert breaker.state(50) is BreakerState.HALF_OPEN
    probe = breaker.permit(50)
    assert probe is not None
    assert breaker.permit(50) is None
    assert breaker.state(50) is BreakerState.OPEN  # for everybody else
    breaker.succeeded(probe, 60)
    assert breaker.state(60) is BreakerState.CLOSED


def test_a_failed_probe_opens_it_for_the_whole_time_again():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "xxxx")
    probe = breaker.permit(50)
    breaker.failed(probe, 60)
    assert breaker.permit(109) is None
    assert breaker.permit(110) is not None


def test_an_abandoned_probe_is_given_to_the_next():
    breaker = Breaker(LIMITS)
    run(breaker, 0, "xxxx")
    breaker.abandoned(breaker.permit(50))
    assert breaker.permit(50) is not None


def test_outcomes_from_before_a_change_are_ignored():
    breaker = Breaker(LIMITS)
    old = breaker.permit(0)
    run(breaker, 0, "xxxx")
    probe = breaker.permit(50)
    breaker.succeeded(old, 50)
    breaker.abandoned(old)
    assert breaker.permit(50) is None  # the probe is still out
    breaker.succeeded(probe, 51)
    breaker.failed(old, 52)
    run(breaker, 52, "xxx")
    assert breaker.state(52) is BreakerState.CLOSED


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("x.-")), max_size=200))
def test_never_two_probes_and_never_stuck(events):
    breaker = Breaker(LIMITS)
    now_ns = 0
    for step_ns, outcome in events:
        now_ns += step_ns
        permit = breaker.permit(now_ns)
        if permit is None:
            assert breaker.state(now_ns) is BreakerState.OPEN
            continue
        if permit.is_probe:
            assert breaker.permit(now_ns) is None
        {"x": breaker.failed, ".": breaker.succeeded, "-": lambda p, _: breaker.abandoned(p)}[outcome](
            permit, now_ns
        )
    assert breaker.permit(now_ns + LIMITS.open_ns) is not None


def test_round_trip_is_pessimistic_and_forgets():
    trip = RoundTrip()
    assert trip.p95_ns(0) == 0
    for at in range(100):
        trip.observe(at, 1000 if at % 2 else 2000)
    estimate = trip.p95_ns(100)
    assert 2000 <= estimate <= 5000
    assert trip.p95_ns(100 + 61_000_000_000) == estimate // 4


def test_reason_codes_have_words_and_classes():
    assert classify(0x00) is ReasonClass.OK
    assert classify(0x10) is ReasonClass.ABSENT
    assert classify(0x86) is ReasonClass.CONFIGURATION
    assert classify(0x95) is ReasonClass.PERMANENT
    assert classify(0xFE) is ReasonClass.RETRY
    assert "password" in in_words(0x86)
    assert "0x86" in in_words(0x86)
