from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.escalation.breaker import Breaker, BreakerLimits, BreakerState
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words

LIMITS = BreakerLimits(
    silences=3, window_ns=100, min_count=4, fault_rate=0.5,
    probe_ns=10, probe_cap_ns=40, idle_probe_ns=500, reopen_cap_ns=160,
)  # fmt: skip


def report(breaker, now_ns, outcomes):
    """ "x": answered with a fault, ".": answered, "s": silent; each asked and reported at `now_ns`."""
    for outcome in outcomes:
        if outcome == "x":
            breaker.failed(now_ns, now_ns)
        elif outcome == ".":
            breaker.succeeded(now_ns)
        else:
            breaker.silent(now_ns, now_ns)


def opened(outcomes="sss", now_ns=0):
    breaker = Breaker(LIMITS)
    report(breaker, now_ns, outcomes)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_opens_on_the_rate_of_faults_with_a_minimum_count():
    breaker = Breaker(LIMITS)
    report(breaker, 0, "xxx")
    assert breaker.state is BreakerState.CLOSED  # three of three, but three is too few
    report(breaker, 1, "x")
    assert breaker.state is BreakerState.OPEN


def test_a_low_rate_keeps_it_closed():
    breaker = Breaker(LIMITS)
    report(breaker, 0, "..x." * 10)
    assert breaker.state is BreakerState.CLOSED


def test_old_faults_leave_the_window():
    breaker = Breaker(LIMITS)
    report(breaker, 0, "xxx")
    report(breaker, 100, "x")
    assert breaker.state is BreakerState.CLOSED


def test_silence_counts_per_answer_and_not_per_time():
    """One caller in a long while meets the same silent peer as a crowd."""
    breaker = Breaker(LIMITS)
    for hour in range(3):
        assert breaker.state is BreakerState.CLOSED
        report(breaker, hour * 10**9, "s")
    assert breaker.state is BreakerState.OPEN


def test_any_reply_ends_a_row_of_silences():
    for heard in ".x":
        breaker = Breaker(LIMITS)
        for at in range(0, 10_000, 1000):
            report(breaker, at, "ss" + heard)
        assert breaker.state is BreakerState.CLOSED


def test_a_lost_message_says_nothing_while_the_peer_answers_later_ones():
    """One of two workers died with what it had; the other answers."""
    breaker = Breaker(BreakerLimits(silences=2, min_count=100))
    for at in range(0, 100, 10):
        breaker.succeeded(at + 9)
        breaker.silent(at, at + 9)
        breaker.silent(at + 1, at + 9)
    assert breaker.state is BreakerState.CLOSED


def test_a_late_reply_closes_it_after_silence():
    breaker = opened("sss")
    breaker.succeeded(5)
    assert breaker.state is BreakerState.CLOSED
    report(breaker, 6, "ss")
    assert breaker.state is BreakerState.CLOSED  # nothing of the former row counts


def test_a_late_reply_does_not_excuse_a_peer_that_answers_with_faults():
    breaker = opened("xxxx")
    breaker.succeeded(5)
    assert breaker.state is BreakerState.OPEN


def test_an_answered_probe_lets_callers_through_and_their_success_closes_it():
    breaker = opened()
    breaker.probe_sent(10)
    breaker.probe_answered(12)
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.next_probe_ns() is None
    report(breaker, 13, ".")
    assert breaker.state is BreakerState.CLOSED


def test_after_a_probe_the_first_fault_opens_it_for_longer():
    for fault in "xs":
        breaker = opened()
        waits = []
        at = 0
        for _ in range(6):
            waits.append(breaker.next_probe_ns() - at)
            at = breaker.next_probe_ns()
            breaker.probe_sent(at)
            breaker.probe_answered(at)
            report(breaker, at, fault)
            assert breaker.state is BreakerState.OPEN
        assert waits == [10, 20, 40, 80, 160, 160]


def test_a_success_forgets_how_often_it_opened():
    breaker = opened()
    for at in (10, 50):
        breaker.probe_sent(at)
        breaker.probe_answered(at)
        report(breaker, at, "s")
    breaker.probe_sent(300)
    breaker.probe_answered(300)
    report(breaker, 301, ".")
    report(breaker, 302, "sss")
    assert breaker.next_probe_ns() == 312


def test_probes_are_rarer_and_rarer_while_callers_ask_and_much_rarer_while_none_does():
    breaker = opened()
    waits, at = [], 0
    for _ in range(16):
        breaker.turned_away()
        waits.append(breaker.next_probe_ns() - at)
        at += waits[-1]
        breaker.probe_sent(at)
    assert waits == [10, 10, 10, 10, 10, 12, 15, 19, 24, 30, 37, 40, 40, 40, 40, 40]
    assert breaker.next_probe_ns() == at + 500
    breaker.turned_away()
    assert breaker.next_probe_ns() == at + 40


def test_a_new_connection_is_probed_at_once():
    breaker = opened()
    breaker.probe_sent(10)
    breaker.link_renewed(1000)
    assert breaker.next_probe_ns() == 1000


def test_what_was_asked_before_a_change_says_nothing_about_now():
    breaker = opened("sss", now_ns=100)
    report(breaker, 101, "sx")
    breaker.probe_answered(110)
    breaker.silent(99, 111)
    breaker.failed(99, 111)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.succeeded(112)
    for _ in range(9):
        breaker.silent(111, 113)
        breaker.failed(111, 113)
    assert breaker.state is BreakerState.CLOSED


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xs.-pP")), max_size=200))
def test_it_never_sticks_and_always_knows_when_to_probe(events):
    breaker = Breaker(LIMITS)
    now_ns = 0
    for step_ns, event in events:
        now_ns += step_ns
        if event == "p" and breaker.state is BreakerState.OPEN:
            breaker.probe_sent(now_ns)
        elif event == "P":
            breaker.probe_answered(now_ns)
        elif event == "-":
            breaker.turned_away()
        elif event in "xs.":
            report(breaker, now_ns, event)
        due_ns = breaker.next_probe_ns()
        assert (due_ns is not None) == (breaker.state is BreakerState.OPEN)
        assert due_ns is None or due_ns <= now_ns + LIMITS.idle_probe_ns
    breaker.probe_answered(now_ns)
    breaker.succeeded(now_ns)
    assert breaker.state is BreakerState.CLOSED or not breaker._is_silence


def test_reason_codes_have_words_and_classes():
    assert classify(0x00) is ReasonClass.OK
    assert classify(0x10) is ReasonClass.ABSENT
    assert classify(0x86) is ReasonClass.CONFIGURATION
    assert classify(0x95) is ReasonClass.PERMANENT
    assert classify(0xFE) is ReasonClass.RETRY
    assert "password" in in_words(0x86)
    assert "0x86" in in_words(0x86)
