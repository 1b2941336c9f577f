"""What is learned of a model's workers from what came back and what did not. Times in nanoseconds."""

from edge_runtime.core.escalation.breaker import BreakerLimits, BreakerState
from edge_runtime.core.escalation.health import Health
from edge_runtime.core.escalation.outstanding import Outstanding
from edge_runtime.core.escalation.resend import MAX_SENDS, ResendBudget, resend_after_ns

S, MS = 1_000_000_000, 1_000_000


def test_silence_counts_after_a_fair_time_whatever_the_callers_did():
    health = Health(S)
    health.sent(b"1", 0)
    health.sent(b"2", 0)
    assert health.next_tick_ns(0) == S
    health.tick(S - 1)
    assert not health.is_open
    health.tick(S)
    assert health.is_open
    assert health.silent_since_ns == 0


def test_a_reply_within_the_fair_time_is_a_success_however_late_for_its_caller():
    health = Health(S)
    for number in range(20):
        health.sent(b"%d" % number, number)
        health.answered(b"%d" % number, number + 50 * MS, is_fault=False)
    health.tick(100 * S)
    assert health.breaker.state is BreakerState.CLOSED
    assert health.roundtrip.p95_ns(S) == 50 * MS
    assert health.silent_since_ns is None


def test_the_fair_time_grows_with_what_replies_take():
    health = Health(S)
    for number in range(3):
        health.sent(b"%d" % number, 0)
        health.answered(b"%d" % number, 4 * S, is_fault=False)
    health.sent(b"x", 4 * S)
    health.tick(7 * S)
    assert health.silent_since_ns is None
    health.tick(8 * S)
    assert health.silent_since_ns == 4 * S


def test_a_late_reply_closes_the_breaker_and_teaches():
    health = Health(S)
    for name in (b"1", b"2"):
        health.sent(name, 0)
    health.tick(S)
    assert health.is_open
    assert health.knows(b"1")
    health.answered(b"1", 3 * S, is_fault=False)
    assert not health.is_open
    assert health.roundtrip.p95_ns(3 * S) == 3 * S
    assert not health.knows(b"1")


def test_what_the_link_or_the_broker_stopped_is_nobodys_silence():
    health = Health(S)
    health.sent(b"1", 0)
    health.link_lost()
    health.sent(b"2", 0)
    health.withdrawn(b"2")
    health.sent(b"3", 0)
    health.absent(b"3", 5)
    assert health.next_tick_ns(0) is None
    health.tick(10 * S)
    assert health.breaker.state is BreakerState.CLOSED
    assert health.silent_since_ns is None
    assert health.absent_since_ns == 5
    health.delivered()
    assert health.absent_since_ns is None


def test_a_broker_that_says_nobody_listens_and_delivers_is_not_believed_again():
    health = Health(S)
    health.sent(b"1", 0)
    health.absent(b"1", 1)
    assert health.is_absence_true
    health.answered(b"1", 2, is_fault=False)
    assert not health.is_absence_true
    assert health.absent_since_ns is None


def test_time_in_which_this_process_did_not_run_is_forgiven():
    health = Health(S)
    health.sent(b"1", 0)
    health.forgive(3600 * S)
    health.tick(3600 * S + S // 2)
    assert health.silent_since_ns is None
    health.answered(b"1", 3600 * S + S // 2, is_fault=False)
    assert health.roundtrip.p95_ns(3600 * S + S) == S // 2


def test_a_probe_is_due_while_it_is_open():
    health = Health(S, BreakerLimits(silences=1, probe_ns=2 * S))
    health.sent(b"1", 0)
    assert not health.tick(S)
    assert health.next_tick_ns(S) == 3 * S
    assert health.tick(3 * S)
    health.breaker.probe_sent(3 * S)
    assert not health.tick(3 * S)
    health.probe_answered(4 * S)
    assert health.breaker.state is BreakerState.HALF_OPEN
    assert health.silent_since_ns is None


def test_asking_again_does_not_give_the_peer_more_time():
    known = Outstanding()
    known.sent(b"1", 0)
    known.sent(b"1", S // 2)
    assert known.silent(S, S) == [0]
    known.sent(b"1", S)
    assert known.silent(9 * S, S) == []
    asked = known.answered(b"1")
    assert (asked.first_ns, asked.last_ns) == (0, S)
    assert known.answered(b"1") is None


def test_memory_is_bounded():
    known = Outstanding(max_kept=10)
    for number in range(1000):
        known.sent(b"%d" % number, number)
    assert len(known) == 10
    known.withdraw_all()
    for number in range(1000, 2000):
        known.sent(b"%d" % number, number)
        known.withdraw(b"%d" % number)
    assert len(known._over) == 10


def test_asking_again_waits_twice_the_round_trip_and_doubles():
    assert resend_after_ns(1, 300 * MS, S, 9 * S, 0.0) == 600 * MS
    assert resend_after_ns(2, 300 * MS, S, 9 * S, 0.0) == 1200 * MS
    assert resend_after_ns(1, 1 * MS, S, 9 * S, 0.0) == 200 * MS
    assert resend_after_ns(1, 0, S, 9 * S, 0.0) == S // 2
    assert resend_after_ns(1, 0, S, 9 * S, 0.999) > 0.6 * S
    assert resend_after_ns(MAX_SENDS, 300 * MS, S, 9 * S, 0.0) is None


def test_nobody_asks_again_for_a_reply_that_would_be_too_late():
    assert resend_after_ns(1, 300 * MS, S, 900 * MS, 0.0) is None
    assert resend_after_ns(1, 300 * MS, S, 901 * MS, 0.0) == 600 * MS


def test_resends_have_a_budget_over_all_callers():
    budget = ResendBudget()
    assert sum(budget.take(0) for _ in range(100)) == 20
    assert sum(budget.take(at * S // 20) for at in range(1, 101)) == 50  # ten a second
    for _ in range(100):
        budget.earn()
    assert sum(budget.take(5 * S) for _ in range(100)) == 10  # a tenth of the requests


def test_lost_copies_do_not_stretch_the_estimate():
    """Every first copy is lost: measured from it, each round would double the time to the next resend."""
    health = Health(S)
    now = 0
    for number in range(50):
        name = b"%d" % number
        health.sent(name, now)
        now += resend_after_ns(1, health.roundtrip.p95_ns(now), S, 9 * S, 0.0)
        health.sent(name, now)
        now += 50 * MS
        health.answered(name, now, is_fault=False)
    assert health.roundtrip.p95_ns(now) == 50 * MS


def test_a_cloud_slower_than_the_resends_is_measured_all_the_same():
    health = Health(S)
    now = 0
    for number in range(40):
        name = b"%d" % number
        health.sent(name, now)
        resend_ns = resend_after_ns(1, health.roundtrip.p95_ns(now), S, 9 * S, 0.0)
        if resend_ns < 1500 * MS:
            health.sent(name, now + resend_ns)
        now += 1500 * MS
        health.answered(name, now, is_fault=False)
    assert health.roundtrip.p95_ns(now) == 1500 * MS
