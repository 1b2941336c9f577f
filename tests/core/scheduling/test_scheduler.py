"""The scheduler under a fake clock: tables of events. `test_scheduler_machine` holds its invariants."""

import pytest

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.scheduling.scheduler import Dispatch, Policy, QueueLimits, Refuse, Scheduler

MS = 1_000_000
#: A batch of 1 takes 1 ms, of 8 takes 1.7 ms.
LADDER = tuple((rows, int((0.9 + 0.1 * rows) * MS)) for rows in (1, 2, 4, 8))
LIMITS = QueueLimits(max_batch=8)


def ids(actions):
    return [action.ids for action in actions if isinstance(action, Dispatch)]


def refused(actions):
    return {action.id: action.kind for action in actions if isinstance(action, Refuse)}


def busy(scheduler, now=0, request_id=0, **how):
    """Let the engine run one request; return its batch."""
    scheduler.submit(now, request_id, "L", **how)
    (batch,) = scheduler.poll(now)
    return batch.batch_id


def test_an_idle_engine_takes_a_lone_request_at_once():
    scheduler = Scheduler(LIMITS)
    assert scheduler.submit(0, 1, "lane") is None
    assert scheduler.poll(0) == [Dispatch(0, "lane", (1,))]


def test_a_busy_engine_accumulates_and_then_takes_all():
    scheduler = Scheduler(LIMITS)
    batch = busy(scheduler)
    for request_id in (2, 3, 4):
        scheduler.submit(1, request_id, "L")
        assert scheduler.poll(1) == []
    scheduler.batch_done(2, batch, 2)
    assert ids(scheduler.poll(2)) == [(2, 3, 4)]


def test_a_batch_never_mixes_lanes_and_a_misfit_holds_up_nobody():
    scheduler = Scheduler(LIMITS)
    for request_id, lane in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
        scheduler.submit(request_id, request_id, lane)
    first = scheduler.poll(5)
    assert ids(first) == [(1, 3)]
    scheduler.batch_done(6, first[0].batch_id, 1)
    assert ids(scheduler.poll(6)) == [(2, 4)]


def test_several_engines_take_several_batches_and_the_fastest_goes_first():
    scheduler = Scheduler(QueueLimits(max_batch=2), engines=(1, 2), latency_profile=((1, MS), (2, MS)))
    for request_id in range(8):
        scheduler.submit(0, request_id, "L")
    first = scheduler.poll(0)
    assert [(batch.engine, batch.ids) for batch in first] == [(0, (0, 1)), (1, (2, 3)), (1, (4, 5))]
    for turn in range(60):  # engine 1 proves to be three times as slow
        for batch in first:
            scheduler.batch_done(0, batch.batch_id, MS if batch.engine == 0 else 3 * MS)
        for i in range(6):
            scheduler.submit(0, 100 + 6 * turn + i, "L")
        first = scheduler.poll(0)
    assert scheduler.speed(1) > 1.5 * scheduler.speed(0)
    assert scheduler.predicted_ns("L", 2, 1) == pytest.approx(3 * MS, rel=0.3)


def test_a_lane_with_a_wrong_cost_recovers_while_others_keep_the_engine_busy():
    scheduler = Scheduler(QueueLimits(max_batch=1), latency_profile=((1, 100 * MS),))
    now, admitted = 10_000 * MS, []
    for request_id in range(0, 400, 2):
        scheduler.submit(now, request_id, "long")
        (batch,) = scheduler.poll(now)
        now += 100 * MS
        scheduler.batch_done(now, batch.batch_id, 100 * MS)
        admitted.append(scheduler.submit(now, request_id + 1, "short", deadline_ns=now + 50 * MS) is None)
        for batch in scheduler.poll(now):
            now += 5 * MS
            scheduler.batch_done(now, batch.batch_id, 5 * MS)
    assert all(admitted[40:])


def test_a_cost_that_was_measured_on_a_busy_machine_is_forgotten_within_twenty_batches():
    scheduler = Scheduler(LIMITS, latency_profile=((1, 20 * MS), (8, 60 * MS)))
    now = 10_000 * MS
    for request_id in range(20):
        scheduler.submit(now, request_id, "L")
        (batch,) = scheduler.poll(now)
        now += 5 * MS
        scheduler.batch_done(now, batch.batch_id, 5 * MS)
    assert scheduler.submit(now, 99, "L", deadline_ns=now + 12 * MS) is None


def test_members_that_stay_take_turns_where_there_are_more_than_a_batch():
    scheduler = Scheduler(QueueLimits(max_batch=2), engines=(1, 1))
    for request_id in range(4):
        scheduler.submit(0, request_id, "L")
    batches, steps = scheduler.poll(0), dict.fromkeys(range(4), 0)
    scheduler.engine_down(1)
    for now in range(1, 41):
        for batch in batches:
            for request_id in batch.ids:
                steps[request_id] += 1
            scheduler.batch_done(now, batch.batch_id, 1, staying=dict.fromkeys(batch.ids, "L"))
        batches = scheduler.poll(now)
    assert min(steps.values()) >= 19


def test_under_overload_a_member_that_waits_takes_the_place_of_a_late_one_and_stays_a_member():
    scheduler = Scheduler(
        QueueLimits(max_batch=2), engines=(1, 1), latency_profile=((1, MS), (2, 8 * MS // 5))
    )
    for request_id, deadline in ((1, 4), (2, None), (3, None), (4, None)):
        assert scheduler.submit(0, request_id, "L", deadline_ns=deadline and deadline * MS) is None
    first, second = scheduler.poll(0)
    scheduler.engine_down(1)
    assert scheduler.submit(0, 9, "L", deadline_ns=MS // 2).kind is RefusalKind.LATE  # there is an overload
    scheduler.submit(0, 5, "L")
    for batch in (first, second):
        scheduler.batch_done(int(2.5 * MS), batch.batch_id, None, staying=dict.fromkeys(batch.ids, "L"))
    actions = scheduler.poll(int(2.5 * MS))
    assert refused(actions) == {1: RefusalKind.LATE}
    assert ids(actions) == [(2, 3)]
    scheduler.batch_done(4 * MS, 2, MS, staying={2: "L", 3: "L"})
    assert ids(scheduler.poll(4 * MS)) == [(4, 2)]
    assert scheduler.waiting == 2


def test_duty_is_kept_down_however_many_lanes_wait():
    policy = Policy(window_ns=0, duty_target=0.1, duty_wait_ns=10_000 * MS)
    scheduler = Scheduler(LIMITS, policy, latency_profile=LADDER)
    ran, now = 0, 0
    for step in range(2000):
        now = step * MS
        if step % 20 == 0:
            for lane in range(3):
                scheduler.submit(now, 3 * step + lane, lane)
        for batch in scheduler.poll(now):
            if isinstance(batch, Dispatch):
                ran += int((0.9 + 0.1 * len(batch.ids)) * MS)
                scheduler.batch_done(now, batch.batch_id, int((0.9 + 0.1 * len(batch.ids)) * MS))
    assert 0.05 < ran / now < 0.13


def test_an_engine_that_is_down_gets_nothing_until_it_is_up():
    scheduler = Scheduler(LIMITS, engines=(1, 1))
    scheduler.engine_down(0)
    scheduler.submit(0, 1, "L")
    assert [batch.engine for batch in scheduler.poll(0)] == [1]
    scheduler.submit(0, 2, "L")
    assert scheduler.poll(0) == []
    scheduler.engine_up(0)
    assert [batch.engine for batch in scheduler.poll(0)] == [0]


def test_the_only_engine_that_is_down_gets_nothing_until_it_is_up():
    scheduler = Scheduler(LIMITS)
    scheduler.engine_down(0)
    scheduler.submit(0, 1, "L")
    assert scheduler.poll(0) == []
    scheduler.engine_up(0)
    assert ids(scheduler.poll(0)) == [(1,)]


def test_a_cancelled_request_leaves_its_neighbours_alone():
    scheduler = Scheduler(LIMITS)
    for request_id in (1, 2, 3):
        scheduler.submit(0, request_id, "lane", deadline_ns=5 * MS)
    assert scheduler.cancel(2)
    assert ids(scheduler.poll(0)) == [(1, 3)]
    assert not scheduler.cancel(1)  # already running: its batch keeps its shape
    assert not scheduler.cancel(99)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [(QueueLimits(max_waiting=2), (1, 1, 1)), (QueueLimits(max_waiting_bytes=10), (6, 4, 1))],
)
def test_a_full_queue_refuses_at_once_and_frees_with_cancel(limits, sizes):
    scheduler = Scheduler(limits, latency_profile=((1, MS),))
    answers = [scheduler.submit(0, i, "lane", size_bytes=size) for i, size in enumerate(sizes)]
    assert answers[:2] == [None, None]
    assert (answers[2].id, answers[2].kind) == (2, RefusalKind.FULL)
    assert 0 < answers[2].retry_after_ns <= 2 * MS
    scheduler.cancel(0)
    assert scheduler.submit(0, 3, "lane", size_bytes=sizes[2]) is None


def test_a_tenant_fills_its_own_part_of_the_queue_and_no_more():
    scheduler = Scheduler(QueueLimits(tenant_max_waiting=2))
    kinds = [scheduler.submit(0, i, "L", tenant=t, priority=i % 3) for i, t in enumerate("aaab")]
    assert [refusal and refusal.kind for refusal in kinds] == [None, None, RefusalKind.QUOTA, None]
    assert scheduler.cancel(0)
    assert scheduler.submit(0, 9, "L", tenant="a") is None


def test_a_tenant_with_a_quota_of_engine_time_is_refused_until_time_has_passed():
    scheduler = Scheduler(QueueLimits(max_batch=1, tenant_engine_share=0.001), latency_profile=((1, MS),))
    now = 0
    for request_id in range(2):  # the second begins within the burst, and ends beyond it
        assert scheduler.submit(now, request_id, "L", tenant="a") is None
        (batch,) = scheduler.poll(now)
        scheduler.batch_done(now, batch.batch_id, MS)
    late = scheduler.submit(now, 2, "L", tenant="a")
    assert late.kind is RefusalKind.QUOTA
    assert scheduler.submit(now, 3, "L", tenant="b") is None
    assert scheduler.submit(now + late.retry_after_ns, 4, "L", tenant="a") is None


def test_a_deadline_is_refused_on_arrival_and_at_its_moment():
    scheduler = Scheduler(LIMITS)
    assert scheduler.submit(10, 0, "lane", deadline_ns=10) == Refuse(0, RefusalKind.LATE)
    busy(scheduler, 10, 1)
    scheduler.submit(10, 2, "lane", deadline_ns=30)
    scheduler.submit(10, 3, "lane", deadline_ns=20)
    assert scheduler.next_wakeup_ns() == 20
    assert scheduler.poll(19) == []
    assert scheduler.poll(20) == [Refuse(3, RefusalKind.LATE)]
    scheduler.cancel(2)
    assert scheduler.next_wakeup_ns() is None


def test_what_cannot_end_in_time_is_refused_before_it_costs_anything():
    scheduler = Scheduler(LIMITS, latency_profile=LADDER)
    busy(scheduler)  # until 1 ms
    soon = scheduler.submit(0, 1, "L", deadline_ns=int(1.5 * MS))
    assert soon.kind is RefusalKind.LATE
    assert 0 < soon.retry_after_ns < 2 * MS
    assert scheduler.submit(0, 2, "L", deadline_ns=3 * MS) is None


def test_a_tight_deadline_goes_before_those_with_time():
    scheduler = Scheduler(QueueLimits(max_batch=2), latency_profile=LADDER[:2])
    batch = busy(scheduler)
    for request_id, deadline in ((1, 90), (2, None), (3, 50), (4, 3), (5, 70)):
        assert scheduler.submit(0, request_id, "L", deadline_ns=deadline and deadline * MS) is None
    order = []
    now = 0
    for _ in range(3):
        now += MS
        scheduler.batch_done(now, batch, MS)
        (action,) = scheduler.poll(now)
        order += action.ids
        batch = action.batch_id
    assert order == [4, 3, 5, 1, 2]


def test_what_became_hopeless_while_waiting_is_dropped_when_that_is_known():
    scheduler = Scheduler(LIMITS, latency_profile=LADDER)
    batch = busy(scheduler)
    assert scheduler.submit(0, 1, "L", deadline_ns=3 * MS) is None
    scheduler.batch_done(int(2.5 * MS), batch, int(2.5 * MS))  # a hiccup: it took longer
    assert refused(scheduler.poll(int(2.5 * MS))) == {1: RefusalKind.LATE}


def test_a_batch_shrinks_to_what_its_earliest_deadline_allows():
    scheduler = Scheduler(LIMITS, latency_profile=LADDER)
    batch = busy(scheduler)
    for request_id in range(1, 8):
        deadline = 3 * MS if request_id == 1 else 50 * MS
        assert scheduler.submit(0, request_id, "L", deadline_ns=deadline) is None
    scheduler.batch_done(MS, batch, MS)
    (first,) = scheduler.poll(int(1.85 * MS))  # 1.15 ms are left to the first: for a batch of 2
    assert first.ids == (1, 2)
    scheduler.batch_done(3 * MS, first.batch_id, int(1.1 * MS))
    assert ids(scheduler.poll(3 * MS)) == [(3, 4, 5, 6, 7)]


def test_predictions_that_nothing_confirms_refuse_nobody():
    scheduler = Scheduler(LIMITS, latency_profile=LADDER)
    batch = busy(scheduler)
    scheduler.batch_done(10 * MS, batch, 500 * MS)  # one terrible hiccup
    for _ in range(20):  # and another, until everything looks hopeless
        batch = busy(scheduler, 10 * MS, 100 + _)
        scheduler.batch_done(10 * MS, batch, 500 * MS)
    assert scheduler.submit(11 * MS, 1, "L", deadline_ns=20 * MS).kind is RefusalKind.LATE
    later = 2_000 * MS
    assert scheduler.submit(later, 2, "L", deadline_ns=later + 10 * MS) is None
    assert ids(scheduler.poll(later)) == [(2,)]


def test_draining_refuses_the_new_and_serves_the_old():
    scheduler = Scheduler(LIMITS)
    scheduler.submit(0, 1, "lane")
    scheduler.drain()
    assert scheduler.submit(0, 2, "lane") == Refuse(2, RefusalKind.DRAINING)
    assert ids(scheduler.poll(0)) == [(1,)]


def overloaded():
    """A scheduler that just refused for want of time, with a full batch of 1.7 ms running from 0 on."""
    scheduler = Scheduler(LIMITS, latency_profile=LADDER)
    for request_id in range(8):
        scheduler.submit(0, request_id, "L")
    assert len(ids(scheduler.poll(0))[0]) == 8
    assert scheduler.submit(0, 8, "L", deadline_ns=2 * MS).kind is RefusalKind.LATE
    return scheduler


def test_under_overload_others_take_the_places_of_who_would_shrink_a_batch():
    scheduler = overloaded()
    for request_id in range(10, 14):  # fit at first, and no more when the running batch ends late
        assert scheduler.submit(0, request_id, "L", deadline_ns=int(4.5 * MS)) is None
    for request_id in range(20, 30):
        assert scheduler.submit(0, request_id, "L", deadline_ns=9 * MS) is None
    scheduler.batch_done(3 * MS, 0, None)
    actions = scheduler.poll(3 * MS)
    assert refused(actions) == dict.fromkeys(range(10, 14), RefusalKind.LATE)
    assert ids(actions) == [tuple(range(20, 28))]


def test_under_overload_a_request_is_judged_by_the_full_batches_before_it():
    scheduler = overloaded()
    for request_id in range(10, 18):
        assert scheduler.submit(0, request_id, "L", deadline_ns=int(5.5 * MS)) is None
    # The ninth waits for what runs and for a full batch, and is in one: 3 * 1.7 ms, its own by the 99th percentile.
    assert scheduler.submit(0, 30, "L", deadline_ns=int(5.6 * MS)).kind is RefusalKind.LATE
    assert scheduler.submit(0, 31, "L", deadline_ns=int(5.8 * MS)) is None


def test_under_overload_nobody_pushes_out_who_was_admitted():
    scheduler = overloaded()
    for request_id in range(10, 26):  # two full batches: the last of them ends at 5.1 ms, or by 5.74
        assert scheduler.submit(0, request_id, "L", deadline_ns=6 * MS) is None
    refusal = scheduler.submit(0, 30, "L", deadline_ns=5 * MS)  # itself in time
    assert refusal.kind is RefusalKind.LATE
    assert refusal.retry_after_ns > MS
    assert scheduler.submit(0, 31, "L", deadline_ns=8 * MS) is None  # pushes nobody
    calm = Scheduler(LIMITS, latency_profile=LADDER)
    busy(calm)
    for request_id in range(10, 26):
        assert calm.submit(0, request_id, "L", deadline_ns=6 * MS) is None
    assert calm.submit(0, 30, "L", deadline_ns=5 * MS) is None


def test_a_fixed_window_is_waited_from_the_first_arrival_and_ends_early_when_full():
    scheduler = Scheduler(QueueLimits(max_batch=3), Policy(window_ns=2 * MS), latency_profile=LADDER[:2])
    scheduler.submit(0, 1, "L")
    assert scheduler.poll(0) == []
    assert scheduler.next_wakeup_ns() == 2 * MS
    scheduler.submit(MS, 2, "L")
    assert scheduler.poll(MS) == []
    assert ids(scheduler.poll(2 * MS)) == [(1, 2)]
    scheduler.batch_done(3 * MS, 0, MS)
    for request_id in (3, 4, 5):
        scheduler.submit(3 * MS, request_id, "L")
    assert ids(scheduler.poll(3 * MS)) == [(3, 4, 5)]


def test_a_window_leaves_time_for_the_work_and_yields_to_other_lanes():
    scheduler = Scheduler(LIMITS, Policy(window_ns=10 * MS), latency_profile=LADDER)
    scheduler.submit(0, 1, "L", deadline_ns=5 * MS)
    assert scheduler.poll(0) == []
    wakeup = scheduler.next_wakeup_ns()
    assert 2 * MS < wakeup < 4 * MS
    assert ids(scheduler.poll(wakeup)) == [(1,)]
    scheduler.batch_done(wakeup, 0, MS)
    scheduler.submit(wakeup, 2, "L")
    scheduler.submit(wakeup, 3, "other")
    assert len(ids(scheduler.poll(wakeup))) == 1


def test_without_a_window_none_is_ever_learned():
    assert _burst_batches(Policy(window_ns=0)) == {1, 4}


def test_a_window_is_learned_from_bursts_and_unlearned_after_them():
    assert _burst_batches(Policy()) == {5}


def _burst_batches(policy):
    """Sizes of the batches of the last of many bursts of five, 0.1 ms apart, on an engine of 4 + 0.5 ms."""
    latency_profile = tuple((rows, int((4 + 0.5 * rows) * MS)) for rows in (1, 2, 4, 8))
    scheduler = Scheduler(LIMITS, policy, latency_profile=latency_profile)
    now, request_id, sizes = 0, 0, []
    for _ in range(200):
        sizes = []
        arrivals = [now + i * MS // 10 for i in range(5)]
        ends = []
        while arrivals or ends or scheduler.waiting:
            wakeup = scheduler.next_wakeup_ns()
            now = min([*arrivals[:1], *(end for end, _ in ends), *([wakeup] if wakeup is not None else [])])
            if arrivals and arrivals[0] == now:
                scheduler.submit(arrivals.pop(0), request_id, "L")
                request_id += 1
            for end, batch in [pair for pair in ends if pair[0] == now]:
                ends.remove((end, batch))
                scheduler.batch_done(now, batch.batch_id, int((4 + 0.5 * len(batch.ids)) * MS))
            for batch in scheduler.poll(now):
                sizes.append(len(batch.ids))
                ends.append((now + int((4 + 0.5 * len(batch.ids)) * MS), batch))
        now += 50 * MS
    return set(sizes)


def test_duty_is_kept_down_within_the_slack_of_deadlines():
    policy = Policy(window_ns=0, duty_target=0.1, duty_wait_ns=50 * MS)
    scheduler = Scheduler(LIMITS, policy, latency_profile=LADDER)
    scheduler.submit(0, 1, "L")
    assert scheduler.poll(0) == []
    assert scheduler.next_wakeup_ns() == pytest.approx(10 * MS, rel=0.01)  # 1 ms of work is a tenth of 10
    wakeup = scheduler.next_wakeup_ns()
    assert ids(scheduler.poll(wakeup)) == [(1,)]
    scheduler.batch_done(wakeup, 0, MS)
    assert scheduler.submit(wakeup, 2, "L", deadline_ns=wakeup + 4 * MS) is None
    assert scheduler.poll(wakeup) == []
    assert scheduler.next_wakeup_ns() < wakeup + 3 * MS  # its deadline allows no more


def test_five_rows_run_as_four_and_one_where_eight_cost_more():
    scheduler = Scheduler(LIMITS, latency_profile=((1, 20), (2, 22), (4, 25), (8, 90)))
    batch = busy(scheduler)
    for request_id in range(1, 6):
        scheduler.submit(0, request_id, "L")
    scheduler.batch_done(20, batch, 20)
    assert ids(scheduler.poll(20)) == [(1, 2, 3, 4)]


def test_members_of_a_step_lane_stay_and_newcomers_join_at_any_step():
    scheduler = Scheduler(QueueLimits(max_batch=3))
    for request_id in (1, 2):
        scheduler.submit(0, request_id, "L")
    (step,) = scheduler.poll(0)
    scheduler.submit(1, 3, "L", deadline_ns=50)
    scheduler.submit(1, 4, "L", deadline_ns=50)
    scheduler.batch_done(2, step.batch_id, 2, staying={1: "L", 2: "L"})
    (step,) = scheduler.poll(2)
    assert set(step.ids) == {1, 2, 3}  # no newcomer takes the place of one that stays, however urgent
    assert not scheduler.cancel(2)
    scheduler.batch_done(3, step.batch_id, 1, staying={1: "L", 3: "L"})  # 2 was cancelled while it ran
    assert scheduler.cancel(3)  # between two steps
    (step,) = scheduler.poll(3)
    assert set(step.ids) == {1, 4}
    scheduler.batch_done(4, step.batch_id, 1)
    assert scheduler.poll(4) == []
    assert scheduler.waiting == 0


def test_members_whose_rows_grow_follow_their_shapes_and_never_mix_them():
    scheduler = Scheduler(QueueLimits(max_batch=4))
    for request_id in (1, 2, 3):
        scheduler.submit(0, request_id, "short", deadline_ns=500)
    (step,) = scheduler.poll(0)
    scheduler.submit(1, 4, "long")
    # 1 has grown, 2 has not, 3 has ended; 4 is a newcomer of the lane that 1 has reached.
    scheduler.batch_done(2, step.batch_id, 2, staying={1: "long", 2: "short"})
    (step,) = scheduler.poll(2)
    assert (step.lane, step.ids) == ("long", (1, 4))
    scheduler.batch_done(3, step.batch_id, 1, staying={1: "longest"})
    lanes = {}
    for now in (3, 4):
        (step,) = scheduler.poll(now)
        lanes[step.lane] = step.ids
        scheduler.batch_done(now + 1, step.batch_id, 1)
    assert lanes == {"short": (2,), "longest": (1,)}
    assert scheduler.poll(5) == []
    assert scheduler.waiting == 0


def test_members_that_grow_teach_each_lane_its_own_costs():
    scheduler = Scheduler(QueueLimits(max_batch=1))
    scheduler.submit(0, 0, 0)
    for length in range(200):  # more lanes than are remembered
        (step,) = scheduler.poll(length)
        assert step.lane == length
        scheduler.batch_done(length + 1, step.batch_id, 1000 + length, staying={0: length + 1})
    assert scheduler.lanes <= 64
    assert scheduler.predicted_ns(199, 1) == 1199
    assert scheduler.predicted_ns(198, 1) == 1198
    assert scheduler.cancel(0)
    assert scheduler.poll(201) == []


def test_a_new_lane_of_one_member_does_not_cost_the_lane_of_another_what_it_learned():
    scheduler = Scheduler(QueueLimits(max_batch=2))
    for request_id, lane in ((100, "x"), (101, "x"), *((i, i) for i in range(63))):
        scheduler.submit(request_id, request_id, lane)
    for now in range(64):
        (batch,) = scheduler.poll(now)
        stays = {100: "new", 101: "x"} if batch.lane == "x" else {}
        scheduler.batch_done(now, batch.batch_id, 777 if stays else 5, staying=stays)
    assert scheduler.predicted_ns("x", 2) == 777


def test_newcomers_join_a_sequence_although_two_small_batches_would_cost_less():
    profile = ((1, MS), (2, 5 * MS), (4, 9 * MS), (8, 20 * MS))
    scheduler = Scheduler(LIMITS, latency_profile=profile)
    scheduler.submit(0, 0, "L")
    (step,) = scheduler.poll(0)
    scheduler.submit(1, 1, "L")
    scheduler.batch_done(MS, step.batch_id, MS, staying={0: "L"})
    (step,) = scheduler.poll(MS)
    assert set(step.ids) == {0, 1}


def test_a_paused_member_waits_for_nothing_until_it_is_resumed_and_is_then_refused_by_no_limit():
    scheduler = Scheduler(QueueLimits(max_batch=2, max_waiting=1, tenant_max_waiting=1))
    scheduler.submit(0, 1, "L", size_bytes=9)
    (step,) = scheduler.poll(0)
    scheduler.batch_done(1, step.batch_id, 1, paused=[1])
    assert scheduler.poll(1) == []
    assert (scheduler.waiting, scheduler.waiting_bytes, scheduler.next_wakeup_ns()) == (0, 0, None)
    scheduler.submit(1, 2, "M")  # the queue is full, and so is the quota
    scheduler.drain()
    scheduler.resume(2, 1, "L")
    assert (scheduler.waiting, scheduler.waiting_bytes) == (2, 9)
    batches = {}
    for now in (3, 5):
        (step,) = scheduler.poll(now)
        batches[step.lane] = step.ids
        scheduler.batch_done(now + 1, step.batch_id, 1)
    assert batches == {"L": (1,), "M": (2,)}


def test_a_resumed_member_comes_before_newcomers_and_a_late_one_is_refused():
    scheduler = Scheduler(QueueLimits(max_batch=1))
    scheduler.submit(0, 1, "L")
    (step,) = scheduler.poll(0)
    scheduler.batch_done(1, step.batch_id, 1, paused=[1])
    scheduler.submit(1, 2, "L", deadline_ns=50)
    scheduler.resume(2, 1, "L")
    assert scheduler.next_wakeup_ns() <= 2, "a poll is due"
    (step,) = scheduler.poll(2)
    assert step.ids == (1,)
    scheduler.batch_done(3, step.batch_id, 1)
    (step,) = scheduler.poll(3)
    scheduler.batch_done(4, step.batch_id, 1, paused=[2])
    scheduler.resume(60, 2, "L")
    assert refused(scheduler.poll(60)) == {2: RefusalKind.LATE}


def test_a_paused_member_can_be_cancelled_once():
    scheduler = Scheduler(LIMITS)
    batch = busy(scheduler)
    scheduler.batch_done(1, batch, 1, paused=[0])
    assert scheduler.cancel(0)
    assert not scheduler.cancel(0)
    with pytest.raises(KeyError):
        scheduler.resume(2, 0, "L")


def test_a_poll_returns_a_bounded_number_of_batches_and_the_next_one_is_due_at_once():
    scheduler = Scheduler(QueueLimits(max_batch=1), engines=[1] * 20)
    for request_id in range(20):
        scheduler.submit(7, request_id, "L")
    polls = []
    while scheduler.waiting:
        assert scheduler.next_wakeup_ns() <= 7
        polls.append(len(scheduler.poll(7)))
    assert polls == [8, 8, 4]
    assert scheduler.next_wakeup_ns() is None


def test_a_poll_is_due_at_once_when_an_engine_has_room_again_beside_waiting_requests():
    scheduler = Scheduler(QueueLimits(max_batch=1))
    batch = busy(scheduler, 5)
    scheduler.submit(6, 1, "L")
    assert scheduler.poll(6) == []
    assert scheduler.next_wakeup_ns() is None  # the end of the batch comes first
    scheduler.batch_done(9, batch, 4)
    assert scheduler.next_wakeup_ns() <= 9
    assert ids(scheduler.poll(9)) == [(1,)]
    assert scheduler.next_wakeup_ns() is None


def test_a_stream_of_cancels_behind_a_long_batch_keeps_no_memory():
    scheduler = Scheduler(LIMITS)
    busy(scheduler)
    scheduler.submit(0, 1, "other", deadline_ns=10**9)
    for request_id in range(2, 3000):
        scheduler.submit(0, request_id, ("shape", request_id), deadline_ns=10**9, tenant=str(request_id))
        scheduler.cancel(request_id)
    assert scheduler.lanes <= 64
    assert sum(len([*waits.flows()]) + len(waits.by_lane) for waits in scheduler._classes) == 2


def serve(scheduler, arrivals, cost_ns, until_ns):
    """Run `arrivals` (a function of the time and the last dispatch) against one engine; return (time, batch) pairs."""
    now, done = 0, []
    while now < until_ns:
        arrivals(now)
        batches = [a for a in scheduler.poll(now) if isinstance(a, Dispatch)]
        assert len(batches) == 1
        now += cost_ns(batches[0])
        done.append((now, batches[0]))
        scheduler.batch_done(now, batches[0].batch_id, cost_ns(batches[0]))
    return done


def test_the_lowest_priority_is_served_within_its_bound_under_a_flood_of_the_highest():
    scheduler = Scheduler(QueueLimits(max_batch=4), latency_profile=((1, MS), (2, MS), (4, MS)))
    scheduler.submit(0, -1, "L", priority=2)
    numbers = iter(range(10**6))

    def flood(now):
        while scheduler.waiting < 40:
            scheduler.submit(now, next(numbers), "L", priority=0)

    done = serve(scheduler, flood, lambda batch: MS, 100 * MS)
    (served,) = [now for now, batch in done if -1 in batch.ids]
    assert 16 * MS <= served <= 2 * 16 * MS * 1.5 + 2 * MS


def test_strict_priority_goes_first_and_lower_classes_fill_the_rest_of_a_batch():
    scheduler = Scheduler(QueueLimits(max_batch=4))
    batch = busy(scheduler)
    for request_id, priority in ((1, 2), (2, 1), (3, 0), (4, 0), (5, 2)):
        scheduler.submit(0, request_id, "L", priority=priority)
    scheduler.batch_done(1, batch, 1)
    assert ids(scheduler.poll(1)) == [(3, 4, 2, 1)]


@pytest.mark.parametrize("costs", [{"x": 1, "y": 1}, {"x": 9, "y": 1}, {"x": 2, "y": 5}])
def test_tenants_in_lanes_of_different_cost_get_equal_engine_time(costs):
    scheduler = Scheduler(QueueLimits(max_batch=4))
    numbers = iter(range(10**6))
    used = {"x": 0, "y": 0}

    def flood(now):
        for name in "xy":
            if scheduler._classes[1].flow(name, None) is None:  # y keeps one batch waiting, and never more
                for _ in range(4):
                    scheduler.submit(now, next(numbers), name, tenant=name)

    def cost(batch):
        return costs[batch.lane] * MS

    for _, batch in serve(scheduler, flood, cost, 600 * MS):
        used[batch.lane] += costs[batch.lane]
    assert used["x"] == pytest.approx(used["y"], abs=40)


def test_one_request_of_a_quiet_tenant_is_in_the_next_batch_beside_a_flood():
    scheduler = Scheduler(LIMITS)
    batch = busy(scheduler)
    for request_id in range(1, 200):
        scheduler.submit(0, request_id, "L", tenant="loud", deadline_ns=10 * MS)
    scheduler.submit(0, 999, "L", tenant="quiet", deadline_ns=90 * MS)
    scheduler.batch_done(1, batch, 1)
    (batch,) = scheduler.poll(1)
    assert 999 in batch.ids
    assert len(batch.ids) == 8


def test_the_same_calls_give_the_same_actions():
    def log():
        scheduler = Scheduler(LIMITS, latency_profile=LADDER, engines=(1, 2))
        out, running, now = [], [], 0
        for i in range(3000):
            now += (i * 7919) % 400_000
            out.append(
                scheduler.submit(
                    now, i, "ab"[i % 2], tenant=str(i % 5), priority=i % 3,
                    deadline_ns=None if i % 4 else now + (i % 11) * MS,
                )
            )  # fmt: skip
            if i % 13 == 0:
                out.append(scheduler.cancel(i - 5))
            if i % 3 == 0 and running:
                scheduler.batch_done(now, running.pop(0), (i % 7) * MS // 4)
            actions = scheduler.poll(now)
            running += [a.batch_id for a in actions if isinstance(a, Dispatch)]
            out.append((actions, scheduler.next_wakeup_ns()))
        return out

    assert log() == log()
