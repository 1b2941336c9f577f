"""A full queue, callers of one tenant, requests that wait for several callers, and time that did not run."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.scheduling.scheduler import Dispatch, Policy, QueueLimits, Refuse, Scheduler
from edge_runtime.core.scheduling.virtual_time import VirtualTime

MS = 1_000_000
PROFILE = tuple((rows, int((0.9 + 0.1 * rows) * MS)) for rows in (1, 2, 4, 8))


def full(max_waiting=8, **how):
    """A scheduler whose engine runs request 0 and whose queue is full of one caller's requests, 1 and later."""
    scheduler = Scheduler(QueueLimits(max_batch=8, max_waiting=max_waiting), latency_profile=PROFILE)
    scheduler.submit(0, 0, "L")
    scheduler.poll(0)
    for request_id in range(1, max_waiting + 1):
        assert scheduler.submit(0, request_id, "L", flow="bulk", **how) is None
    return scheduler


def displaced(scheduler, now=0):
    actions = scheduler.poll(now)
    assert all(action.kind is RefusalKind.FULL and action.retry_after_ns > 0 for action in actions)
    return [action.id for action in actions]


# A full queue


def test_a_full_queue_gives_up_the_newest_of_the_greediest_flow():
    scheduler = full()
    assert scheduler.submit(0, 100, "L", flow="single") is None
    assert scheduler.waiting == 8
    assert scheduler.next_wakeup_ns() <= 0  # its caller is waiting for the refusal
    assert displaced(scheduler) == [8]
    assert displaced(scheduler) == []


def test_flows_share_a_full_queue_and_then_displace_nobody():
    scheduler = full()
    kinds = [scheduler.submit(0, 100 + i, "L", flow="other") for i in range(6)]
    assert [kind and (kind.id, kind.kind) for kind in kinds] == [
        None, None, None, None, (104, RefusalKind.FULL), (105, RefusalKind.FULL),
    ]  # fmt: skip
    assert displaced(scheduler) == [8, 7, 6, 5]


def request(scheduler, first_id, rows, now=0, **how):
    """Submit a request of many rows: all of them, or the refusal of the whole."""
    kept = scheduler.reserve(now, first_id, rows, **how)
    if isinstance(kept, Refuse):
        return kept
    for request_id in range(first_id, first_id + kept):
        assert scheduler.submit(now, request_id, "L", is_reserved=True, **how) is None
    return kept


def test_a_request_of_many_rows_is_admitted_whole_or_refused_as_a_whole():
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    assert request(scheduler, 0, 30, flow=1) == 30
    assert request(scheduler, 100, 30, flow=2) == 30
    refused = request(scheduler, 200, 30, flow=3)
    assert (refused.id, refused.kind) == (200, RefusalKind.FULL)
    assert (scheduler.waiting, scheduler.poll(0)) == (60, [])


def test_room_that_is_kept_is_taken_by_nobody_else():
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    assert scheduler.reserve(0, 0, 50, flow=1) == 50
    assert scheduler.reserve(0, 100, 50, flow=2).kind is RefusalKind.FULL
    assert [scheduler.submit(0, i, "L", flow=i) is None for i in range(200, 240)] == [True] * 30 + [
        False
    ] * 10
    for request_id in range(50):
        assert scheduler.submit(0, request_id, "L", flow=1, is_reserved=True) is None
    assert scheduler.poll(0) == []
    assert scheduler.waiting == 80


def test_room_that_is_kept_outlives_a_drain_and_can_be_given_back():
    scheduler = Scheduler(QueueLimits(max_waiting=8, tenant_max_waiting=8), engines=(0,))
    assert scheduler.reserve(0, 0, 8, tenant="a") == 8
    assert scheduler.submit(0, 0, "L", tenant="a", is_reserved=True) is None
    scheduler.release(4, "a")
    assert request(scheduler, 100, 1, tenant="b") == 1
    scheduler.drain()
    assert scheduler.submit(0, 1, "L", tenant="a", is_reserved=True) is None
    assert scheduler.reserve(0, 200, 1).kind is RefusalKind.DRAINING
    scheduler.release(2, "a")
    assert scheduler._reserved_by == {}
    assert scheduler._reserved == 0


def test_an_eighth_of_the_queue_is_left_to_single_rows_unless_nothing_waits():
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    assert request(scheduler, 0, 40, flow=1) == 40
    assert request(scheduler, 100, 31, flow=2).kind is RefusalKind.FULL
    assert request(scheduler, 100, 30, flow=2) == 30
    for request_id in range(200, 210):
        assert scheduler.submit(0, request_id, "L", flow="single") is None
    assert scheduler.poll(0) == []  # nothing was displaced
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    assert request(scheduler, 0, 200, flow=1) == 80


def test_of_two_equal_bulk_requests_the_first_is_served_whole():
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    assert request(scheduler, 0, 80, flow=1) == 80
    assert request(scheduler, 100, 80, flow=2).kind is RefusalKind.FULL
    assert scheduler.poll(0) == []


def test_a_request_displaces_a_flow_that_holds_twice_as_much_by_all_it_needs_at_once():
    scheduler = Scheduler(QueueLimits(max_waiting=80), engines=(0,))
    for first in range(1000, 1070, 10):
        assert request(scheduler, first, 10, flow=1) == 10
    assert request(scheduler, 0, 25, flow=2).kind is RefusalKind.FULL  # 45 would be left, and 50 is twice 25
    assert request(scheduler, 0, 20, flow=2) == 20
    assert displaced_ids(scheduler) == list(range(1069, 1049, -1))
    assert request(scheduler, 100, 20, flow=2).kind is RefusalKind.FULL  # it would hold 40 beside 30
    assert scheduler.waiting == 70


def test_the_quota_of_a_tenant_holds_for_the_rows_of_a_request_together():
    scheduler = Scheduler(QueueLimits(max_waiting=100, tenant_max_waiting=20), engines=(0,))
    assert request(scheduler, 0, 15, tenant="a", flow=1) == 15
    assert request(scheduler, 100, 6, tenant="a", flow=2).kind is RefusalKind.QUOTA
    assert scheduler.reserve(0, 100, 5, tenant="a", flow=2) == 5
    assert scheduler.submit(0, 300, "L", tenant="a", flow=3).kind is RefusalKind.QUOTA
    assert scheduler.submit(0, 100, "L", tenant="a", flow=2, is_reserved=True) is None


def test_a_tenant_gains_no_room_by_more_connections():
    scheduler = Scheduler(QueueLimits(max_waiting=8), engines=(0,))
    for request_id in range(8):
        scheduler.submit(0, request_id, "L", tenant="many", flow=request_id)
    for request_id in range(100, 104):
        assert scheduler.submit(0, request_id, "L", tenant="one", flow=0) is None
    assert scheduler.submit(0, 104, "L", tenant="one", flow=0).kind is RefusalKind.FULL
    assert len(displaced_ids(scheduler)) == 4


def displaced_ids(scheduler):
    return [action.id for action in scheduler.poll(0) if isinstance(action, Refuse)]


def test_a_full_queue_gives_up_the_lowest_priority_first_and_never_a_higher_one():
    scheduler = Scheduler(QueueLimits(max_waiting=4), engines=(0,))
    for request_id, priority in enumerate((1, 2, 2, 0)):
        scheduler.submit(0, request_id, "L", flow=request_id, priority=priority)
    assert scheduler.submit(0, 10, "L", flow="x", priority=2).kind is RefusalKind.FULL
    for request_id in (11, 12, 13):
        assert scheduler.submit(0, request_id, "L", flow="x", priority=0) is None
    assert displaced_ids(scheduler) == [1, 2, 0]
    assert scheduler.submit(0, 14, "L", flow="y", priority=1).kind is RefusalKind.FULL
    assert scheduler.submit(0, 15, "L", flow="y", priority=0) is None  # x holds three of four
    assert displaced_ids(scheduler) == [13]


def test_a_queue_full_of_bytes_gives_up_what_frees_enough_and_no_more_than_a_bounded_number():
    scheduler = Scheduler(QueueLimits(max_waiting_bytes=1000), engines=(0,))
    for request_id in range(100):
        scheduler.submit(0, request_id, "L", size_bytes=10, flow="bulk")
    assert scheduler.submit(0, 200, "L", size_bytes=35, flow="x") is None
    assert displaced_ids(scheduler) == [99, 98, 97, 96]
    assert scheduler.waiting_bytes == 995
    assert scheduler.submit(0, 201, "L", size_bytes=500, flow="y").kind is RefusalKind.FULL
    assert scheduler.submit(0, 202, "L", size_bytes=170, flow="y").kind is RefusalKind.FULL  # 17 requests
    assert scheduler.submit(0, 203, "L", size_bytes=160, flow="y") is None
    assert len(displaced_ids(scheduler)) == 16


@pytest.mark.parametrize("how", [{"deadline_ns": MS // 2}, {"tenant": "greedy"}])
def test_a_request_that_is_refused_for_another_reason_displaces_nobody(how):
    limits = QueueLimits(max_batch=8, max_waiting=8, tenant_max_waiting=2)
    scheduler = Scheduler(limits, latency_profile=PROFILE)
    scheduler.submit(0, 0, "L", tenant="z")
    scheduler.poll(0)
    for request_id in range(1, 9):
        tenant = ("a", "b", "c", "greedy")[(request_id - 1) // 2]
        assert scheduler.submit(0, request_id, "L", tenant=tenant, priority=2, flow=tenant) is None
    refused = scheduler.submit(0, 100, "L", flow="x", priority=0, **{"tenant": "new", **how})
    assert refused.kind is (RefusalKind.LATE if "deadline_ns" in how else RefusalKind.QUOTA)
    assert scheduler.waiting == 8
    assert scheduler.poll(0) == []
    scheduler.batch_done(MS, 0, MS)
    (batch,) = scheduler.poll(MS)
    assert set(batch.ids) == set(range(1, 9))


def test_a_request_that_displaced_nobody_leaves_the_order_as_it_was():
    def order(newcomer):
        scheduler = full(8, deadline_ns=90 * MS)
        if newcomer:
            assert scheduler.submit(0, 100, "L", flow="x", deadline_ns=MS // 2).kind is RefusalKind.LATE
        scheduler.batch_done(MS, 0, MS)
        return scheduler.poll(MS)

    assert order(newcomer=True) == order(newcomer=False)


def test_a_member_between_two_steps_is_never_displaced():
    scheduler = Scheduler(QueueLimits(max_batch=2, max_waiting=2))
    for request_id in (1, 2):
        scheduler.submit(0, request_id, "L", flow="stream", priority=2)
    (step,) = scheduler.poll(0)
    scheduler.engine_down(0)
    scheduler.batch_done(1, step.batch_id, 1, staying={1: "L", 2: "L"})
    assert scheduler.submit(1, 3, "L", flow="x", priority=0).kind is RefusalKind.FULL
    assert scheduler.poll(1) == []


def test_a_displaced_request_that_is_cancelled_before_its_refusal_is_not_refused():
    scheduler = full()
    scheduler.submit(0, 100, "L", flow="single")
    assert scheduler.cancel(8)
    assert not scheduler.cancel(8)
    assert displaced(scheduler) == []


FLOWS = st.tuples(st.sampled_from("ab"), st.integers(0, 3))


@given(st.lists(st.tuples(FLOWS, st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=60))
def test_no_request_is_displaced_by_a_lower_priority_or_by_a_greedier_flow(requests):
    scheduler = Scheduler(QueueLimits(max_waiting=8, max_waiting_bytes=150), engines=(0,))
    waiting = {}
    for request_id, ((tenant, flow), priority, size) in enumerate(requests):
        before = dict(waiting)
        refused = scheduler.submit(
            0, request_id, "L", tenant=tenant, flow=flow, priority=priority, size_bytes=size
        )
        left = displaced_ids(scheduler)
        if refused is not None:
            assert (refused.id, left) == (request_id, [])
            continue
        waiting[request_id] = (tenant, flow, priority, size)
        for gone in left:
            del waiting[gone]
            assert before[gone][2] >= priority
        assert len({before[gone][:3] for gone in left}) <= 1, "one flow yields at a time"
        same = [gone for gone in left if before[gone][2] == priority]
        if same:
            by_tenant = before[same[0]][0] != tenant
            by_bytes = sum(s for *_, s in before.values()) + size > 150

            amounts = Counter()
            for *of, its_priority, its_size in waiting.values():
                if its_priority == priority:
                    amounts[tuple(of[: 1 if by_tenant else 2])] += its_size if by_bytes else 1
            theirs = before[same[0]][: 1 if by_tenant else 2]
            own = (tenant, flow)[: 1 if by_tenant else 2]
            assert amounts[theirs] >= amounts[own], "a flow that yields holds no less than the new one"
        assert len(waiting) <= 8
        assert sum(size for *_, size in waiting.values()) <= 150
    assert scheduler.waiting == len(waiting)
    assert scheduler.waiting_bytes == sum(size for *_, size in waiting.values())


# Callers of one tenant


def engine_time(scheduler, callers, batches=400):
    """Each (tenant, caller) always has a batch waiting; return its rows in so many batches."""
    numbers, owner, rows = iter(range(10**6)), {}, dict.fromkeys(callers, 0)
    waiting = dict.fromkeys(callers, 0)
    for now in range(batches):
        for tenant, caller in callers:
            while waiting[tenant, caller] < 8:
                request_id = next(numbers)
                owner[request_id] = (tenant, caller)
                assert scheduler.submit(now * MS, request_id, "L", tenant=tenant, flow=caller) is None
                waiting[tenant, caller] += 1
        (batch,) = scheduler.poll(now * MS)
        for request_id in batch.ids:
            rows[owner[request_id]] += 1
            waiting[owner[request_id]] -= 1
        scheduler.batch_done((now + 1) * MS, batch.batch_id, MS)
    return rows


@pytest.mark.parametrize("connections", [2, 7, 30])
def test_a_tenant_gains_no_engine_time_by_more_connections(connections):
    callers = [("many", i) for i in range(connections)] + [("one", 0)]
    rows = engine_time(Scheduler(QueueLimits(max_batch=8)), callers)
    many = sum(count for (tenant, _), count in rows.items() if tenant == "many")
    assert many == pytest.approx(rows["one", 0], rel=0.05)
    each = [count for (tenant, _), count in rows.items() if tenant == "many"]
    assert max(each) - min(each) <= 16


def test_a_single_request_is_in_the_next_batch_beside_a_bulk_of_the_same_tenant():
    scheduler = Scheduler(QueueLimits(max_batch=8))
    scheduler.submit(0, 0, "L", tenant="local", flow=1)
    scheduler.poll(0)
    for request_id in range(1, 500):
        scheduler.submit(0, request_id, "L", tenant="local", flow=1)
    scheduler.submit(0, 999, "L", tenant="local", flow=2)
    scheduler.batch_done(1, 0, 1)
    (batch,) = scheduler.poll(1)
    assert 999 in batch.ids
    assert len(batch.ids) == 8


def test_callers_of_a_tenant_get_equal_engine_time_in_lanes_of_different_cost():
    scheduler = Scheduler(QueueLimits(max_batch=4))
    numbers, used, now = iter(range(10**6)), {"x": 0, "y": 0}, 0
    costs = {"x": 9 * MS, "y": MS}
    for _ in range(400):
        for caller in "xy":
            if scheduler._classes[1].flow("local", caller) is None:
                for _ in range(4):
                    scheduler.submit(now, next(numbers), caller, tenant="local", flow=caller)
        (batch,) = scheduler.poll(now)
        now += costs[batch.lane]
        used[batch.lane] += costs[batch.lane]
        scheduler.batch_done(now, batch.batch_id, costs[batch.lane])
    assert used["x"] == pytest.approx(used["y"], abs=40 * MS)


def test_the_quota_of_a_tenant_counts_all_its_callers():
    scheduler = Scheduler(QueueLimits(tenant_max_waiting=3), engines=(0,))
    kinds = [scheduler.submit(0, i, "L", tenant="a", flow=i, priority=i % 3) for i in range(4)]
    assert [refusal and refusal.kind for refusal in kinds] == [None, None, None, RefusalKind.QUOTA]
    assert scheduler.submit(0, 10, "L", tenant="b", flow=0) is None
    assert scheduler.cancel(1)
    assert scheduler.submit(0, 11, "L", tenant="a", flow=9) is None


def test_callers_that_come_and_go_keep_no_memory():
    scheduler = Scheduler(QueueLimits(max_batch=8))
    for request_id in range(5000):
        scheduler.submit(request_id * MS, request_id, "L", tenant="local", flow=request_id)
        (batch,) = scheduler.poll(request_id * MS)
        scheduler.batch_done(request_id * MS + 1, batch.batch_id, 1)
    classes = scheduler._classes
    assert sum(len([*waits.flows()]) + len(waits.tenants) + len(waits.by_lane) for waits in classes) == 0
    assert max(len(waits.time._absent) for waits in classes) <= 1024


def test_flows_that_left_are_forgotten_in_the_order_in_which_they_left():
    time = VirtualTime()
    for key in range(3000):
        time.leave(key, 1.0)
    assert time.enter(0) == 0.0
    assert time.enter(2999) == 1.0
    assert len(time._absent) <= 1024


def test_a_deadline_is_judged_by_the_turns_of_tenants_and_their_callers():
    """One caller of one tenant beside 30 connections of another: every second row is its own."""
    scheduler = Scheduler(QueueLimits(max_batch=1), latency_profile=((1, MS),))
    scheduler.submit(0, 0, "L", tenant="one", flow=0)
    scheduler.poll(0)
    for request_id in range(1, 301):
        scheduler.submit(0, request_id, "L", tenant="many", flow=request_id % 30)
    for request_id in range(400, 406):
        assert scheduler.submit(0, request_id, "L", tenant="one", flow=0, deadline_ns=14 * MS) is None
    assert scheduler.submit(0, 406, "L", tenant="one", flow=0, deadline_ns=14 * MS).kind is RefusalKind.LATE
    now, ended = MS, {}
    scheduler.batch_done(now, 0, MS)
    while len(ended) < 6:
        (batch,) = scheduler.poll(now)
        now += MS
        scheduler.batch_done(now, batch.batch_id, MS)
        if batch.ids[0] >= 400:
            ended[batch.ids[0]] = now
    assert max(ended.values()) <= 14 * MS


# Deadlines beside requests without any


def served_at(deadline_ns, flood_deadline_ns=None):
    """When one request of a caller is served that floods as well, at twice the capacity."""
    scheduler = Scheduler(QueueLimits(max_batch=1, max_waiting=100_000))
    numbers = iter(range(1, 10**6))
    for now in range(3000):
        for _ in range(2):
            late = None if flood_deadline_ns is None else now * MS + flood_deadline_ns
            scheduler.submit(now * MS, next(numbers), "L", deadline_ns=late)
        if now == 1000:
            assert (
                scheduler.submit(now * MS, 0, "L", deadline_ns=deadline_ns and now * MS + deadline_ns) is None
            )
        for action in scheduler.poll(now * MS):
            if isinstance(action, Dispatch):
                if action.ids == (0,):
                    return now
                scheduler.batch_done((now + 1) * MS, action.batch_id, None)
    return None


def test_a_distant_deadline_is_no_worse_than_none_beside_a_flood_without_any():
    without = served_at(None)
    assert without is not None
    for seconds in (1, 5, 10, 60, 3600):
        assert served_at(seconds * 1000 * MS) <= without


def test_a_distant_deadline_is_kept_to_the_end():
    scheduler, seconds = Scheduler(QueueLimits(max_batch=1), latency_profile=((1, MS),)), 1000 * MS
    scheduler.submit(0, 0, "L")
    scheduler.poll(0)
    for request_id, deadline in ((1, 60), (2, 20), (3, None)):
        scheduler.submit(0, request_id, "L", deadline_ns=deadline and deadline * seconds)
    assert scheduler.poll(15 * seconds) == []
    assert scheduler.next_wakeup_ns() <= 20 * seconds
    assert scheduler.poll(20 * seconds) == [Refuse(2, RefusalKind.LATE)]
    scheduler.batch_done(21 * seconds, 0, MS)
    assert [action.ids for action in scheduler.poll(21 * seconds)] == [(1,)]
    scheduler.batch_done(22 * seconds, 1, MS)
    assert [action.ids for action in scheduler.poll(22 * seconds)] == [(3,)]


@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 4, 8]))
def test_a_quiet_tenant_waits_for_what_runs_and_for_its_own_batch_beside_any_flood(flood, floods, most):
    scheduler = Scheduler(QueueLimits(max_batch=most), latency_profile=PROFILE[: most.bit_length()])
    numbers = iter(range(1, 10**6))

    def refill(now):
        while scheduler.waiting < flood * most:
            i = next(numbers)
            scheduler.submit(now, i, "L", tenant=f"flood {i % floods}", flow=i % 7)

    now = 0
    for _ in range(50):  # until the flood's virtual time is far ahead
        refill(now)
        (batch,) = scheduler.poll(now)
        now += MS
        scheduler.batch_done(now, batch.batch_id, MS)
    refill(now)
    (running,) = scheduler.poll(now)
    scheduler.submit(now, 0, "L", tenant="quiet")
    scheduler.batch_done(now + MS, running.batch_id, MS)
    (batch,) = scheduler.poll(now + MS)
    assert 0 in batch.ids


# Requests that wait for several callers


def test_a_waiting_request_is_raised_to_the_priority_of_a_more_urgent_caller():
    scheduler = Scheduler(QueueLimits(max_batch=1))
    scheduler.submit(0, 0, "L")
    (batch,) = scheduler.poll(0)
    for request_id in range(1, 101):
        scheduler.submit(0, request_id, "L", priority=2)
    assert scheduler.raise_priority(0, 100, 0)
    assert not scheduler.raise_priority(0, 100, 0), "it waits there already"
    assert not scheduler.raise_priority(0, 100, 2), "a priority is never lowered"
    assert not scheduler.raise_priority(0, 0, 0), "it runs"
    assert not scheduler.raise_priority(0, 999, 0), "nobody knows it"
    scheduler.batch_done(1, batch.batch_id, 1)
    assert [action.ids for action in scheduler.poll(1)] == [(100,)]
    assert scheduler.waiting == 99


def test_a_member_of_a_sequence_that_is_raised_stays_in_its_steps():
    scheduler = Scheduler(QueueLimits(max_batch=2), engines=(1, 1))
    scheduler.submit(0, 1, "L", priority=2)
    (step,) = scheduler.poll(0)
    scheduler.batch_done(1, step.batch_id, 1, staying={1: "L"})
    assert scheduler.raise_priority(1, 1, 0)
    (step,) = scheduler.poll(1)
    assert step.ids == (1,)
    scheduler.batch_done(2, step.batch_id, 1)
    assert scheduler.waiting == 0


# Time that did not run


GAP = 34_000 * MS


def warm(policy=None):
    """A scheduler that has served 50 batches of 1 ms; return it and the time."""
    scheduler = Scheduler(QueueLimits(max_batch=8), policy, latency_profile=PROFILE)
    now = 10_000 * MS
    for request_id in range(50):
        scheduler.submit(now, request_id, "L")
        (batch,) = [a for a in scheduler.poll(now + 20 * MS) if isinstance(a, Dispatch)]
        now += 21 * MS
        scheduler.batch_done(now, batch.batch_id, MS)
    return scheduler, now


@pytest.mark.parametrize("reported", [1, 35_000])
def test_a_batch_that_ran_while_this_process_did_not_teaches_nothing(reported):
    scheduler, now = warm()
    scheduler.submit(now, 100, "L")
    (batch,) = scheduler.poll(now)
    scheduler.submit(now, 101, "L")
    before = scheduler.predicted_ns("L", 1), scheduler.speed()
    now += GAP
    scheduler.forget_time(now, GAP)
    scheduler.batch_done(now + MS, batch.batch_id, reported * MS)
    assert (scheduler.predicted_ns("L", 1), scheduler.speed()) == before
    (batch,) = scheduler.poll(now + MS)
    scheduler.batch_done(now + 9 * MS, batch.batch_id, 8 * MS)  # and the next one does again
    assert scheduler.predicted_ns("L", 1) > before[0]


def test_predictions_do_not_get_stale_while_this_process_does_not_run():
    scheduler, now = warm()
    scheduler.forget_time(now + GAP, GAP)
    assert scheduler.submit(now + GAP, 100, "L", deadline_ns=now + GAP + MS // 2).kind is RefusalKind.LATE
    scheduler, now = warm()
    assert scheduler.submit(now + GAP, 100, "L", deadline_ns=now + GAP + MS // 2) is None


def test_a_window_does_not_end_while_this_process_does_not_run():
    scheduler, now = warm(Policy(window_ns=20 * MS))
    scheduler.submit(now, 100, "L")
    assert scheduler.poll(now + 5 * MS) == []
    scheduler.forget_time(now + 5 * MS + GAP, GAP)
    assert scheduler.poll(now + 5 * MS + GAP) == []
    assert scheduler.next_wakeup_ns() == now + GAP + 20 * MS


def test_no_engine_time_is_saved_while_this_process_does_not_run():
    def waits(gap, forgets):
        policy = Policy(window_ns=0, duty_target=0.01, duty_wait_ns=10**12)
        scheduler = Scheduler(QueueLimits(max_batch=8), policy, latency_profile=PROFILE)
        now = 10_000 * MS
        for request_id in range(30):  # deadlines that leave no choice, until there is a debt
            scheduler.submit(now, request_id, "L", deadline_ns=now + 2 * MS)
            for action in scheduler.poll(now + MS // 2):
                scheduler.batch_done(now + MS, action.batch_id, MS)
            now += MS
        scheduler.submit(now, 100, "L")
        scheduler.poll(now)
        now += gap
        if forgets:
            scheduler.forget_time(now, gap)
        scheduler.poll(now)
        return scheduler.waiting

    assert waits(GAP, forgets=True) == 1
    assert waits(GAP, forgets=False) == 0


def test_a_low_priority_does_not_age_while_this_process_does_not_run():
    scheduler, now = warm()
    scheduler.submit(now, 100, "L", priority=2)
    scheduler.engine_down(0)
    scheduler.poll(now)
    now += GAP
    scheduler.forget_time(now, GAP)
    scheduler.submit(now, 101, "other", priority=0)
    scheduler.engine_up(0)
    assert [action.ids for action in scheduler.poll(now)] == [(101,)]


def test_a_priority_that_begins_to_wait_after_a_gap_ages_from_then_on():
    scheduler, now = warm()
    now += GAP
    numbers = iter(range(1000, 10**6))
    scheduler.submit(now, next(numbers), "L", priority=0)
    (batch,) = scheduler.poll(now)
    scheduler.submit(now, 100, "L", priority=2)
    scheduler.forget_time(now + MS, GAP)
    for _ in range(80):
        while scheduler.waiting < 40:
            scheduler.submit(now, next(numbers), "L", priority=0)
        now += 2 * MS
        scheduler.batch_done(now, batch.batch_id, 2 * MS)
        (batch,) = scheduler.poll(now)
        if 100 in batch.ids:
            return
    pytest.fail("a low priority waits behind a flood for as long as the gap was")


@given(st.integers(0, 5 * MS), st.booleans())
def test_calls_between_the_end_of_a_gap_and_its_report_are_not_put_off(delay, is_fixed):
    """The report comes from a timer, and sockets may be read before it."""
    scheduler, now = warm(Policy(window_ns=20 * MS) if is_fixed else Policy())
    now += GAP
    scheduler.submit(now, 100, "L", priority=2)
    running = scheduler.poll(now)
    scheduler.forget_time(now + delay, GAP)
    scheduler.submit(now + delay, 101, "L", priority=0)
    served, at = {i for batch in running for i in batch.ids}, now + delay
    for batch in running:
        scheduler.batch_done(at, batch.batch_id, MS)
    while len(served) < 2 and at < now + 100 * MS:
        for action in scheduler.poll(at):
            if isinstance(action, Dispatch):
                served |= set(action.ids)
                scheduler.batch_done(at + MS, action.batch_id, MS)
        at += MS
    assert served >= {100, 101}
