"""The scheduler's invariants under any sequence of calls; `tests/guards/lines/scheduling.py` shows that each can fail."""

import os
import random
from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.scheduling.scheduler import PRIORITIES, Policy, QueueLimits, Refuse, Scheduler

MAX_BATCH, MAX_WAITING, MAX_BYTES = 4, 10, 100
LADDER = ((1, 10), (2, 13), (4, 19))
STEPS = {"taken": 0}
#: Calls of the scheduler for each example of the profile: 100,000 in `make test`; with the cache's machine 200,000.
LEAST_STEPS = 2_500 * settings.default.max_examples
POLICIES = (
    Policy(window_ns=0),
    Policy(),
    Policy(window_ns=15),
    Policy(window_ns=0, duty_target=0.3, duty_wait_ns=60),
)


class Member:
    """What this file knows of a request."""

    def __init__(self, lane, tenant, flow, priority, size, deadline):
        self.lane, self.tenant, self.flow, self.priority = lane, tenant, flow, priority
        self.size, self.deadline = size, deadline
        self.is_staying = False


class SchedulerMachine(RuleBasedStateMachine):
    """Twins get the same calls; whatever one says is checked against a plain account of who waits and runs."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        engines=st.sampled_from([(1,), (2,), (1, 2)]),
        latency_profile=st.booleans(),
    )
    def begin(self, policy, engines, latency_profile):
        limits = QueueLimits(MAX_BATCH, MAX_WAITING, MAX_BYTES, tenant_max_waiting=6)
        self.policy, self.slots = policy, sum(engines)
        self.depths, self.load = engines, [0] * len(engines)
        self.twins = [
            Scheduler(limits, policy, engines=engines, latency_profile=LADDER if latency_profile else ())
            for _ in range(2)
        ]
        self.now, self.next_id = 10**10, 0
        self.waiting, self.running, self.paused = {}, {}, {}
        self.admitted, self.abandoned, self.exits = set(), set(), {}
        self.reserved = []  # the tenant of each row that room is kept for
        self.newcomer = None  # what was admitted to a full queue, until its victims are reported

    def both(self, call):
        STEPS["taken"] += 1
        first, second = (call(twin) for twin in self.twins)
        assert first == second, "the same calls give the same actions"
        return first

    @rule(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 12))
    def do(self, seed, length):
        chance = random.Random(seed)
        for _ in range(length):
            steps = (
                self.submit, self.reserve, self.cancel, self.poll, self.end, self.urge, self.resume, self.freeze
            )  # fmt: skip
            chance.choices(steps, (10, 1, 2, 6, 6, 2, 1, 0.5))[0](chance)

    def reserve(self, chance):
        """Keep room for a request of some rows, or give it back."""
        tenant, priority, rows = chance.choice("xyz"), chance.randrange(PRIORITIES), chance.randint(2, 5)
        if self.reserved and chance.random() < 0.3:
            tenant = chance.choice(self.reserved)
            self.reserved.remove(tenant)
            self.both(lambda s: s.release(1, tenant))
            return
        kept = self.both(
            lambda s: s.reserve(self.now, self.next_id, rows, tenant=tenant, flow=1, priority=priority)
        )
        self.newcomer = Member("", tenant, 1, priority, 0, None)
        if isinstance(kept, Refuse):
            assert kept.kind in {RefusalKind.FULL, RefusalKind.QUOTA}
            self.newcomer = None
        else:
            assert kept == rows
            self.reserved += [tenant] * rows
            if self.twins[0].waiting == len(self.waiting):
                self.newcomer = None  # nobody was displaced for it
        self.poll(chance)
        staying = sum(m.is_staying for m in self.waiting.values())
        assert len(self.waiting) + len(self.reserved) <= MAX_WAITING + staying, "the queue is bounded"

    def submit(self, chance):
        request_id, self.next_id = self.next_id, self.next_id + 1
        deadline = None if chance.random() < 0.3 else self.now + chance.randint(-2, 90)
        who = Member(
            chance.choice("aab"),
            chance.choice("xyz"),
            chance.choice((None, 1, 2)),
            chance.randrange(PRIORITIES),
            chance.randint(0, 30),
            deadline,
        )
        is_reserved = bool(self.reserved) and chance.random() < 0.5
        if is_reserved:
            who.tenant = self.reserved.pop(chance.randrange(len(self.reserved)))
        answer = self.both(
            lambda s: s.submit(
                self.now, request_id, who.lane, size_bytes=who.size, deadline_ns=who.deadline, tenant=who.tenant,
                flow=who.flow, priority=who.priority, is_reserved=is_reserved,
            )
        )  # fmt: skip
        is_full = (
            len(self.waiting) + len(self.reserved) >= MAX_WAITING
            or sum(m.size for m in self.waiting.values()) + who.size > MAX_BYTES
        )
        if deadline is not None and deadline <= self.now:
            assert answer.kind is RefusalKind.LATE
        elif is_full and answer is not None and answer.kind is RefusalKind.FULL:
            assert not self.is_greediest_elsewhere(who), "a full queue is shared out"
        elif (
            sum(m.tenant == who.tenant for m in self.waiting.values()) + self.reserved.count(who.tenant) >= 6
        ):
            assert answer.kind is RefusalKind.QUOTA, "and each tenant's part of it"
        elif answer is not None:
            assert answer.kind is RefusalKind.LATE
            assert deadline is not None, "only a deadline can be missed"
        else:
            self.newcomer = who if is_full else None
            self.waiting[request_id] = who
            self.admitted.add(request_id)
        if answer is not None:
            assert answer.id == request_id
            assert answer.retry_after_ns is None or answer.retry_after_ns > 0
        if is_full and answer is None:
            # Members of sequences come back to it whatever its limits.
            members = [m.size for m in self.waiting.values() if m.is_staying]
            assert self.twins[0].waiting <= max(MAX_WAITING, len(members) + 1), "the queue is bounded"
            assert self.twins[0].waiting_bytes <= max(MAX_BYTES, sum(members) + who.size)
            self.poll(chance)
            assert self.newcomer is None, "the displaced are refused by the next poll"

    def is_greediest_elsewhere(self, who):
        """Whether one row of a lower priority, or of a tenant that holds far more, could have made room."""
        if (
            len(self.waiting) + len(self.reserved) != MAX_WAITING
            or self.twins[0].waiting_bytes + who.size > MAX_BYTES
        ):
            return False  # it needs bytes, perhaps of several
        tenants = Counter(m.tenant for m in self.waiting.values() if m.priority == who.priority)
        lower = [m for m in self.waiting.values() if m.priority > who.priority]
        own = tenants.pop(who.tenant, 0)
        if any(m.is_staying for m in self.waiting.values()):
            return False  # the greediest may be a sequence, which yields to nobody
        return bool(lower) or max(tenants.values(), default=0) > own + 1

    def urge(self, chance):
        """Raise the priority of a request."""
        if not self.next_id:
            return
        request_id = chance.choice([*self.waiting, *self.paused, chance.randrange(self.next_id)])
        member = self.waiting.get(request_id)
        priority = chance.randrange(PRIORITIES)
        is_raised = member is not None and priority < member.priority
        assert self.both(lambda s: s.raise_priority(self.now, request_id, priority)) == is_raised
        if is_raised:
            member.priority = priority

    def resume(self, chance):
        """A member that paused between two steps takes part again, however full the queue is."""
        if self.paused:
            request_id = chance.choice([*self.paused])
            member = self.waiting[request_id] = self.paused.pop(request_id)
            member.is_staying, member.lane = True, chance.choice("ab")
            self.both(lambda s: s.resume(self.now, request_id, member.lane))

    def freeze(self, chance):
        """The process does not run for a while."""
        gap = chance.choice((5, 10**10))
        self.now += gap
        self.both(lambda s: s.forget_time(self.now, gap))

    def cancel(self, chance):
        if not self.next_id:
            return
        known = [*self.waiting, *self.paused, *(i for batch in self.running.values() for i in batch[1])]
        request_id = (
            chance.choice(known) if known and chance.random() < 0.8 else chance.randrange(self.next_id)
        )
        was_waiting = (self.waiting.pop(request_id, None) or self.paused.pop(request_id, None)) is not None
        assert self.both(lambda s: s.cancel(request_id)) == was_waiting
        if was_waiting:
            self.leave(request_id, "cancelled")
        else:  # it runs, so it leaves with its batch; or it left before, or was never admitted
            self.abandoned.add(request_id)

    def poll(self, chance):
        self.now += chance.choice((0, 0, 1, 3, 10, 40))
        predicted = {
            (lane, rows, engine): self.twins[0].predicted_ns(lane, rows, engine)
            for lane in "ab"
            for rows in range(1, MAX_BATCH + 1)
            for engine in range(len(self.depths))
        }
        fresh = {lane for _, members in self.running.values() for lane in [next(iter(members.values())).lane]}
        most = chance.choice((1, 2, 8, 8))
        actions = self.both(lambda s: s.poll(self.now, most))
        assert self.newcomer is None or any(
            isinstance(action, Refuse) and action.kind is RefusalKind.FULL for action in actions
        ), "a full queue has room for a new request only in the place of another"
        for action in actions:
            if isinstance(action, Refuse):
                self.dropped(action)
            else:
                self.dispatched(action, predicted, action.lane in fresh)
        self.newcomer = None
        batches = sum(not isinstance(action, Refuse) for action in actions)
        assert batches <= most, "a poll is bounded"
        if batches == most and self.waiting and len(self.running) < self.slots:
            assert self.both(lambda s: s.next_wakeup_ns()) <= self.now, "and the next one is due at once"
        else:
            self.settled()

    def dropped(self, action):
        member = self.waiting.pop(action.id)
        if action.kind is RefusalKind.FULL:
            assert self.newcomer is not None, "only a new request displaces others"
            assert member.priority >= self.newcomer.priority, "and none of a higher priority"
            assert not member.is_staying, "nor a member between two steps"
        else:
            assert action.kind is RefusalKind.LATE
            assert member.deadline is not None
        self.leave(action.id, "refused")

    def dispatched(self, action, predicted, is_fresh):
        assert 1 <= len(action.ids) <= MAX_BATCH, "a batch is bounded"
        assert len(set(action.ids)) == len(action.ids)
        staying = [i for i, m in self.waiting.items() if m.is_staying and m.lane == action.lane]
        assert set(staying) <= set(action.ids) or len(action.ids) == MAX_BATCH, (
            "members stay in their lane's steps"
        )
        members = {}
        for request_id in action.ids:
            member = members[request_id] = self.waiting.pop(request_id)
            member.is_staying = False
            assert member.lane == action.lane, "a batch has one lane"
            assert request_id not in self.exits, "each leaves once"
        ends = self.now + predicted[action.lane, len(action.ids), action.engine]
        if is_fresh:
            assert all(m.deadline is None or m.deadline >= int(ends) for m in members.values()), "in time"
        self.load[action.engine] += 1
        assert self.load[action.engine] <= self.depths[action.engine], "an engine takes its depth at most"
        assert action.batch_id not in self.running
        self.running[action.batch_id] = (action.engine, members)

    def settled(self):
        """After a poll: no free engine beside work except in a window, and a wake-up that comes in time."""
        wakeup = self.both(lambda s: s.next_wakeup_ns())
        assert self.twins[0].waiting == len(self.waiting)
        assert self.twins[0].waiting_bytes == sum(m.size for m in self.waiting.values())
        assert self.twins[0].running_batches == len(self.running)
        deadlines = [m.deadline for m in self.waiting.values() if m.deadline is not None]
        if deadlines:
            assert wakeup is not None, "nobody waits unseen"
            assert wakeup <= min(deadlines)
        if self.waiting and len(self.running) < self.slots:
            has_window = self.policy.window_ns != 0 or self.policy.duty_target is not None
            assert has_window, "an engine never idles beside work"
            assert wakeup is not None
            assert wakeup > self.now
            if self.policy.duty_target is None:
                assert len({m.lane for m in self.waiting.values()}) == 1
                assert len(self.waiting) < MAX_BATCH, "nobody waits for a full batch"
        assert all(m.deadline is None or m.deadline > self.now for m in self.waiting.values()), (
            "the late are told"
        )

    def end(self, chance):
        if not self.running:
            return
        batch_id = chance.choice([*self.running])
        engine, members = self.running.pop(batch_id)
        self.load[engine] -= 1
        self.now += chance.choice((0, 1, 5, 12))
        duration = chance.choice((None, 8, 10, 12, 20, 30))
        stay = {i: chance.choice((m.lane, *"ab")) for i, m in members.items()
                if i not in self.abandoned and chance.random() < 0.25}  # fmt: skip
        pause = {i for i in members if i not in stay and i not in self.abandoned and chance.random() < 0.1}
        self.both(lambda s: s.batch_done(self.now, batch_id, duration, staying=stay, paused=pause))
        for request_id, member in members.items():
            if request_id in pause:
                self.paused[request_id] = member
            elif request_id in stay:
                member.is_staying, member.lane = True, stay[request_id]  # its rows may have grown
                self.waiting[request_id] = member
            else:
                self.leave(request_id, "served")

    def leave(self, request_id, way):
        assert request_id in self.admitted, "only what was admitted leaves"
        assert request_id not in self.exits, "each leaves once"
        self.exits[request_id] = way

    def teardown(self):
        """After a drain, every request that is left is served or refused in bounded time."""
        if not hasattr(self, "twins"):
            return
        self.both(lambda s: s.drain())
        chance = random.Random(0)
        for _ in range(200):
            if not self.waiting and not self.running and not self.paused:
                break
            self.resume(chance)
            for batch_id in [*self.running]:
                engine, members = self.running.pop(batch_id)
                self.load[engine] -= 1
                for request_id in members:
                    self.leave(request_id, "served")
                self.both(lambda s, b=batch_id: s.batch_done(self.now, b, 10))
            self.now += 5
            self.poll(chance)
        assert not self.waiting, "nobody starves"
        ways = Counter(self.exits.values())
        assert ways["served"] + ways["refused"] + ways["cancelled"] == len(self.admitted), "each leaves once"
        assert self.exits.keys() == self.admitted
        for twin in self.twins:
            assert (twin.waiting, twin.waiting_bytes, twin.running_batches) == (0, 0, 0), "nothing is kept"


SchedulerMachine.TestCase.settings = settings(
    settings.default,  # the profiles differ in more than the number of examples
    max_examples=10 * settings.default.max_examples,
    stateful_step_count=50,
    deadline=None,
    derandomize=os.environ.get("EDGE_RUNTIME_TESTS")
    != "soak",  # the same steps in every run, new ones in a soak
    print_blob=True,
)
TestScheduler = SchedulerMachine.TestCase


def test_enough_steps_were_taken():
    assert STEPS["taken"] >= LEAST_STEPS
