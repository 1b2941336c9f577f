"""The scheduler under a fake clock: tables of events, then a state machine over its invariants."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_runtime.core.batching import Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.errors import RefusalKind


def ids(actions):
    return [action.ids for action in actions if isinstance(action, Dispatch)]


def test_an_idle_engine_takes_a_lone_request_at_once():
    scheduler = Scheduler(QueueLimits())
    assert scheduler.submit(0, 1, "lane") is None
    assert scheduler.poll(0) == [Dispatch(0, "lane", (1,))]


def test_a_busy_engine_accumulates_and_then_takes_all():
    scheduler = Scheduler(QueueLimits())
    scheduler.submit(0, 1, "lane")
    scheduler.poll(0)
    for request_id in (2, 3, 4):
        scheduler.submit(1, request_id, "lane")
        assert scheduler.poll(1) == []
    scheduler.batch_done(0)
    assert ids(scheduler.poll(2)) == [(2, 3, 4)]


def test_a_batch_never_mixes_lanes_and_the_oldest_lane_goes_first():
    scheduler = Scheduler(QueueLimits())
    for request_id, lane in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
        scheduler.submit(0, request_id, lane)
    assert ids(scheduler.poll(0)) == [(1, 3)]
    scheduler.batch_done(0)
    assert ids(scheduler.poll(0)) == [(2, 4)]


def test_two_engines_take_two_batches():
    scheduler = Scheduler(QueueLimits(max_batch=2), engines=2)
    for request_id in range(5):
        scheduler.submit(0, request_id, "lane")
    assert ids(scheduler.poll(0)) == [(0, 1), (2, 3)]
    scheduler.batch_done(1)
    assert ids(scheduler.poll(0)) == [(4,)]


def test_a_cancelled_request_leaves_its_neighbours_alone():
    scheduler = Scheduler(QueueLimits())
    for request_id in (1, 2, 3):
        scheduler.submit(0, request_id, "lane")
    assert scheduler.cancel(2)
    assert ids(scheduler.poll(0)) == [(1, 3)]
    assert not scheduler.cancel(1)  # already running: its batch keeps its shape
    assert not scheduler.cancel(99)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [(QueueLimits(max_waiting=2), (1, 1, 1)), (QueueLimits(max_waiting_bytes=10), (6, 4, 1))],
)
def test_a_full_queue_refuses_at_once_and_frees_with_cancel(limits, sizes):
    scheduler = Scheduler(limits)
    answers = [scheduler.submit(0, i, "lane", size_bytes=size) for i, size in enumerate(sizes)]
    assert answers == [None, None, Refuse(2, RefusalKind.FULL)]
    scheduler.cancel(0)
    assert scheduler.submit(0, 3, "lane", size_bytes=sizes[2]) is None


def test_a_deadline_is_refused_on_arrival_and_at_its_moment():
    scheduler = Scheduler(QueueLimits())
    assert scheduler.submit(10, 0, "lane", deadline_ns=10) == Refuse(0, RefusalKind.LATE)
    scheduler.submit(10, 1, "lane")
    scheduler.poll(10)
    scheduler.submit(10, 2, "lane", deadline_ns=30)
    scheduler.submit(10, 3, "lane", deadline_ns=20)
    assert scheduler.next_wakeup_ns() == 20
    assert scheduler.poll(19) == []
    assert scheduler.poll(20) == [Refuse(3, RefusalKind.LATE)]
    scheduler.cancel(2)
    assert scheduler.next_wakeup_ns() is None


def test_draining_refuses_the_new_and_serves_the_old():
    scheduler = Scheduler(QueueLimits())
    scheduler.submit(0, 1, "lane")
    scheduler.drain()
    assert scheduler.submit(0, 2, "lane") == Refuse(2, RefusalKind.DRAINING)
    assert ids(scheduler.poll(0)) == [(1,)]


def test_a_stream_of_cancels_behind_a_long_batch_keeps_no_memory():
    scheduler = Scheduler(QueueLimits())
    scheduler.submit(0, 0, "lane")
    scheduler.poll(0)
    scheduler.submit(0, 1, "other", deadline_ns=10**9)
    for request_id in range(2, 5000):
        scheduler.submit(0, request_id, ("shape", request_id), deadline_ns=10**9)
        scheduler.cancel(request_id)
    assert len(scheduler._lanes) == 1
    assert len(scheduler._deadlines) < 100


class SchedulerMachine(RuleBasedStateMachine):
    """Any sequence of calls: everyone leaves once, batches are sound, no engine idles beside work."""

    def __init__(self):
        super().__init__()
        self.limits = QueueLimits(max_batch=3, max_waiting=8, max_waiting_bytes=64)
        self.schedulers = [
            Scheduler(self.limits, engines=2),
            Scheduler(self.limits, engines=2),
        ]  # twins: replay
        self.now = 0
        self.next_id = 0
        self.waiting = {}
        self.running = []
        self.polled = True

    def both(self, call):
        first, second = (call(scheduler) for scheduler in self.schedulers)
        assert first == second
        return first

    @rule(lane=st.sampled_from("abc"), size=st.integers(0, 30), patience=st.none() | st.integers(-1, 20))
    def submit(self, lane, size, patience):
        request_id, self.next_id = self.next_id, self.next_id + 1
        deadline = None if patience is None else self.now + patience
        refused = self.both(
            lambda s: s.submit(self.now, request_id, lane, size_bytes=size, deadline_ns=deadline)
        )
        used = sum(entry[2] for entry in self.waiting.values())
        if deadline is not None and deadline <= self.now:
            assert refused == Refuse(request_id, RefusalKind.LATE)
        elif len(self.waiting) >= 8 or used + size > 64:
            assert refused == Refuse(request_id, RefusalKind.FULL)
        else:
            assert refused is None
            self.waiting[request_id] = (lane, deadline, size)
        self.polled = False

    @rule(data=st.data())
    def cancel(self, data):
        if self.next_id:
            request_id = data.draw(st.integers(0, self.next_id - 1))
            was_waiting = self.waiting.pop(request_id, None) is not None
            assert self.both(lambda s: s.cancel(request_id)) == was_waiting

    @rule(step=st.integers(0, 10))
    def poll(self, step):
        self.now += step
        for action in self.both(lambda s: s.poll(self.now)):
            if isinstance(action, Refuse):
                assert action.kind is RefusalKind.LATE
                assert self.waiting.pop(action.id)[1] <= self.now
            else:
                assert 1 <= len(action.ids) <= 3
                oldest = next(iter(self.waiting.values()))
                assert action.lane == oldest[0]
                for request_id in action.ids:
                    lane, deadline, _ = self.waiting.pop(request_id)
                    assert lane == action.lane
                    assert deadline is None or deadline > self.now
                self.running.append(action.batch_id)
        self.polled = True

    @rule(data=st.data())
    def batch_done(self, data):
        if self.running:
            batch_id = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.both(lambda s: s.batch_done(batch_id))
            self.polled = False

    @invariant()
    def work_conserving(self):
        if self.polled and self.waiting:
            assert len(self.running) == 2
        assert self.schedulers[0].waiting == len(self.waiting)

    @invariant()
    def wakes_for_the_earliest_deadline(self):
        deadlines = [entry[1] for entry in self.waiting.values() if entry[1] is not None]
        assert self.schedulers[0].next_wakeup_ns() == (min(deadlines) if deadlines else None)
        self.schedulers[1].next_wakeup_ns()


TestScheduler = SchedulerMachine.TestCase
