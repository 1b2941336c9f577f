"""The scheduler both tiers share: which requests run together, on which engine, when, and who is refused.

Rule: an idle engine takes what waits at once; while it is busy, arrivals accumulate, and leave together when it
frees (Inoue, arXiv 1912.06322, analyses this policy). A window is waited only by policy (`windows`). Order: strict
priorities that age, tenants in turns of engine time, earliest deadline first (`queueing`). What cannot be done
by its deadline is refused before it costs anything, by what batches were measured to take (`latency`).

It holds ids, sizes and deadlines, never payloads. Each call takes `now_ns` from any monotonic clock; `poll`
returns what to do and `next_wakeup_ns` when to ask again. What may share a batch is said by the `lane` of
each request: any hashable value, equal for co-batchable requests. Not thread-safe; one owner calls it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_runtime.core.errors import InvalidRequest, RefusalKind
from edge_runtime.core.messages import LatencyProfile
from edge_runtime.core.scheduling.deadlines import Fit
from edge_runtime.core.scheduling.engine_pool import EnginePool
from edge_runtime.core.scheduling.forecast import Forecast, Place
from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Entry, Flow, PriorityClass, Queue
from edge_runtime.core.scheduling.quotas import EngineQuotas
from edge_runtime.core.scheduling.windows import Policy, Windows

#: Priorities are 0 (first) to LEVELS - 1.
LEVELS = 3
NORMAL = 1

#: What a request's parameter `priority` may say; the numbers are Triton's, where 0 is the default.
_PRIORITIES = {"high": 0, "normal": 1, "low": 2, 1: 0, 2: 1, 3: 2, 0: NORMAL}

_SECOND = 1_000_000_000
#: A level is one higher after waiting so many full batches (or a millisecond, whichever is longer) without a turn.
_AGEING_BATCHES = 16
_LEAST_AGEING_NS = 1_000_000
#: Requests without a deadline are ordered as if they had this one, so that none waits for ever behind those that do.
_PATIENCE_NS = _SECOND
#: Predictions that nothing confirmed for so long refuse nobody: what they refuse could never correct them.
_STALE_NS = _SECOND
#: A tenant that had less than its part of the engine may catch up by so many full batches.
_CREDIT_BATCHES = 2
#: After a refusal for want of time the queue counts as overloaded for so many full batches.
_OVERLOAD_BATCHES = 8


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one batch, and of what waits over all lanes and of one tenant.

    `tenant_engine_share` is the engine time a tenant may use per time, with a burst of a second; None: no limit.
    """

    max_batch: int = 32
    max_waiting: int = 1024
    max_waiting_bytes: int = 64 << 20
    tenant_max_waiting: int | None = None
    tenant_engine_share: float | None = None


class Dispatch(NamedTuple):  # as is Refuse: a frozen dataclass takes three times as long to make
    """Run these requests together, in this order, on that engine; report with `batch_done`."""

    batch_id: int
    lane: Hashable
    ids: tuple[int, ...]
    engine: int = 0


class Refuse(NamedTuple):
    """Tell this caller no; the id is forgotten. `retry_after_ns`: when there may be room; None: not known."""

    id: int
    kind: RefusalKind
    retry_after_ns: int | None = None


Action = Dispatch | Refuse


class _Batch(NamedTuple):
    engine: int
    lane: Lane
    entries: list[Entry]


class Scheduler:
    """Decides for interchangeable engines, each of which takes `depth` batches at a time.

    Invariants (held by property tests): each admitted id leaves exactly once, by Dispatch (the last of its steps),
    Refuse or cancel; a batch has one lane and at most `max_batch` ids; no batch is dispatched that is predicted to
    end after a member's deadline; after `poll`, a free engine and a waiting request coexist only during a
    window; nobody starves; the same calls give the same actions.
    """

    def __init__(
        self,
        limits: QueueLimits,
        policy: Policy | None = None,
        *,
        engines: Sequence[int] = (1,),
        latency_profile: LatencyProfile = (),
        pads: bool = True,
    ) -> None:
        """`engines` are their depths; `latency_profile` is what batches were measured to cost, until lanes know better.

        `pads`: engines pad a batch to the next power of two, as ours do, so the sizes between cost as much.
        """
        self._limits = limits
        policy = policy or Policy()
        self._windows = Windows(policy)
        self._pool = EnginePool(engines)
        self._levels = [PriorityClass() for _ in range(LEVELS)]
        self._forecast = Forecast(
            self._pool, lambda key: Lane(key, limits.max_batch, latency_profile, policy.tick_ns, pads=pads)
        )
        self._waiting: dict[int, Entry] = {}
        self._waiting_bytes = 0
        self._batches: dict[int, _Batch] = {}
        self._next_batch_id = 0
        self._is_draining = False
        share = limits.tenant_engine_share
        self._quotas = None if share is None else EngineQuotas(share)
        self._has_quotas = share is not None or limits.tenant_max_waiting is not None
        self._window_ends_ns: int | None = None
        self._late_bound_ns: float = float("inf")  # no deadline among those that wait is earlier
        self._overloaded_until_ns: float = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """The size of what waits."""
        return self._waiting_bytes

    @property
    def running_batches(self) -> int:
        """How many batches are dispatched and not yet reported done."""
        return len(self._batches)

    @property
    def lanes(self) -> int:
        """How many lanes are remembered."""
        return len(self._forecast.lanes)

    def speed(self, engine: int = 0) -> float:
        """How much longer than usual batches take on an engine just now."""
        return self._pool.speed_of(engine)

    def predicted_ns(self, lane: Hashable, rows: int, engine: int = 0) -> float:
        """How long a batch would take; 0 while nothing is known."""
        return self._forecast.costs(lane).mean(rows) * self._pool.speed_of(engine)

    def submit(
        self,
        now_ns: int,
        request_id: int,
        lane: Hashable,
        *,
        size_bytes: int = 0,
        deadline_ns: int | None = None,
        tenant: str = "",
        priority: int = NORMAL,
    ) -> Refuse | None:
        """Queue a request whose id was never used before, or return the refusal. Ask `poll` what to run.

        A deadline is for the end of the work. `priority` is 0 (first) to LEVELS - 1.
        """
        # The way of every request: look-ups and places are written out, since each call here costs a twentieth of it.
        if self._is_draining:
            return Refuse(request_id, RefusalKind.DRAINING)
        if deadline_ns is not None and deadline_ns <= now_ns:
            return Refuse(request_id, RefusalKind.LATE)
        waiting, limits = self._waiting, self._limits
        if len(waiting) >= limits.max_waiting or self._waiting_bytes + size_bytes > limits.max_waiting_bytes:
            return Refuse(request_id, RefusalKind.FULL, self._forecast.half_served_ns(now_ns))
        if self._has_quotas and (refused := self._over_quota(now_ns, request_id, tenant)):
            return refused
        forecast = self._forecast
        state = forecast.lanes.get(lane) or forecast.new_lane(lane)
        level = self._levels[priority]
        share = level.shares.get(tenant)
        queue = None if share is None else share.queues.get(state)
        if queue is None:
            queue = level.queue(tenant, state)
        key_ns = now_ns + _PATIENCE_NS if deadline_ns is None else deadline_ns
        keys = queue.keys
        at = len(keys) if not keys or key_ns >= keys[-1] else bisect_right(keys, key_ns)
        if deadline_ns is not None:
            # Most have time for everything that waits; only the others are looked at closely.
            busy_ns = self._pool.busy_until_ns
            left_ns = deadline_ns - (busy_ns if busy_ns > now_ns else now_ns)
            if left_ns < len(waiting) * forecast.row_ns + forecast.batch_ns and (
                refused := self._too_late(now_ns, request_id, deadline_ns, queue, at, priority)
            ):
                return refused
            if deadline_ns < self._late_bound_ns:
                self._late_bound_ns = deadline_ns
        if not state.waiting:
            self._windows.began(now_ns, state, finds_idle=self._pool.free > 0 and not waiting)
        elif state.linger.began_ns is not None:
            state.linger.arrived(now_ns, opens=False)
        if not level.waiting:
            level.since_ns = now_ns
        entry = waiting[request_id] = Entry(request_id, queue, size_bytes, key_ns, deadline_ns is not None)
        self._waiting_bytes += size_bytes
        queue.insert(at, entry)
        return None

    def cancel(self, request_id: int) -> bool:
        """Forget a waiting request and return True; False if it already left the queue.

        A request that is running keeps its place in its batch: its neighbours must not notice.
        The owner drops its result, and leaves it out of `staying`.
        """
        entry = self._waiting.get(request_id)
        if entry is None:
            return False
        self._remove(entry)
        return True

    def drain(self) -> None:
        """Refuse every later submission; what waits is still served."""
        self._is_draining = True

    def poll(self, now_ns: int) -> list[Action]:
        """Return what to do now: refusals of what cannot be done in time, then a batch for each free engine."""
        actions: list[Action] = []
        self._window_ends_ns = None
        while self._waiting:
            if self._late_bound_ns <= self._pool.free_from(now_ns) + self._forecast.single_ns:
                self._drop_late(now_ns, actions)
            if not self._pool.free or not self._waiting or self._is_held(now_ns):
                break
            queue = self._next_queue(now_ns)
            actions += self._dispatch(now_ns, queue)
        return actions

    def batch_done(
        self,
        now_ns: int,
        batch_id: int,
        duration_ns: int | None = None,
        staying: Collection[int] = (),
    ) -> None:
        """Report that a dispatched batch ended; its engine has room again.

        `duration_ns` teaches what batches cost; None where it says nothing (it failed). `staying` are members
        that need another step: they are in the lane's next batch, before any newcomer.
        """
        batch = self._batches.pop(batch_id)
        batch.lane.running -= 1
        ratio = None
        if duration_ns is not None and duration_ns > 0:
            batch.lane.confirmed_ns = now_ns
            speed = self._pool.speed_of(batch.engine)
            ratio = batch.lane.costs.observe(len(batch.entries), duration_ns / speed)
        self._pool.end(batch.engine, ratio)
        self._forecast.refresh()
        if staying:
            for entry in batch.entries:
                if entry.id in staying:
                    self._requeue(now_ns, entry)
                    batch.lane.staying[entry.id] = None

    def engine_down(self, engine: int) -> None:
        """Dispatch nothing to this engine any more; what it runs must still be reported done."""
        self._pool.set_up(engine, is_up=False)

    def engine_up(self, engine: int) -> None:
        """Use an engine again, with a speed to be learned afresh."""
        self._pool.set_up(engine, is_up=True)

    def next_wakeup_ns(self) -> int | None:
        """When `poll` must be called although nothing else happened; None: not needed. Early at times, never late."""
        window_ns, late_ns = self._window_ends_ns, self._late_bound_ns
        if not self._waiting or late_ns == float("inf"):
            return window_ns
        return int(late_ns) if window_ns is None else min(int(late_ns), window_ns)

    # Admission

    def _over_quota(self, now_ns: int, request_id: int, tenant: str) -> Refuse | None:
        """Refuse what would be more than a tenant's part of the queue, or of the engine's time."""
        most = self._limits.tenant_max_waiting
        if most is not None:
            shares = [level.shares[tenant] for level in self._levels if tenant in level.shares]
            if sum([share.waiting for share in shares]) >= most:
                return Refuse(request_id, RefusalKind.QUOTA, self._forecast.half_served_ns(now_ns))
        ahead_ns = 0 if self._quotas is None else self._quotas.ahead_ns(now_ns, tenant)
        return Refuse(request_id, RefusalKind.QUOTA, ahead_ns) if ahead_ns else None

    def _too_late(
        self, now_ns: int, request_id: int, deadline_ns: int, queue: Queue, at: int, priority: int
    ) -> Refuse | None:
        """Refuse what is predicted to end after its deadline, behind all that is served before it."""
        if _is_stale(now_ns, queue.lane):
            return None
        above = sum([higher.waiting for higher in self._levels[:priority]])
        is_overloaded = now_ns < self._overloaded_until_ns
        place = Place(queue, above, len(self._waiting))
        finish_ns = self._forecast.finish_ns(now_ns, place, at, is_overloaded=is_overloaded)
        retry_ns: int | None = int(finish_ns - deadline_ns) + 1
        if finish_ns <= deadline_ns:
            if not is_overloaded or not self._forecast.displaces(now_ns, place, at):
                return None
            retry_ns = self._forecast.half_served_ns(now_ns)
        self._overloaded_until_ns = now_ns + _OVERLOAD_BATCHES * self._forecast.batch_ns
        return Refuse(request_id, RefusalKind.LATE, retry_ns)

    # What waits

    def _requeue(self, now_ns: int, entry: Entry) -> None:
        """Let a request that was taken out wait again, at the place its deadline gives it."""
        level = entry.queue.share.level
        entry.queue = queue = level.queue(entry.queue.share.tenant, entry.queue.lane)
        if not level.waiting:
            level.since_ns = now_ns
        queue.insert(bisect_left(queue.keys, entry.key_ns), entry)  # before equal ones, which came later
        self._waiting[entry.id] = entry
        self._waiting_bytes += entry.size_bytes
        if entry.has_deadline:
            self._late_bound_ns = min(self._late_bound_ns, entry.key_ns)

    def _leave(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            del self._waiting[entry.id]
            self._waiting_bytes -= entry.size_bytes

    def _remove(self, entry: Entry) -> None:
        self._leave([entry])
        entry.queue.lane.staying.pop(entry.id, None)
        entry.queue.remove(entry)

    def _drop_late(self, now_ns: int, actions: list[Action]) -> None:
        """Refuse what cannot end in time even if it ran alone as soon as an engine is free."""
        start_ns = self._pool.free_from(now_ns)
        late: list[Entry] = []
        bound_ns = float("inf")
        for level in self._levels:
            for queue in level.queues():
                speed = 0.0 if _is_stale(now_ns, queue.lane) else self._pool.speed
                limit_ns = max(start_ns + queue.lane.costs.means[0] * speed, now_ns + 1)
                for key_ns, entry in zip(queue.keys, queue.entries, strict=True):
                    if key_ns >= limit_ns:
                        bound_ns = min(bound_ns, key_ns)
                        break
                    if entry.has_deadline:
                        late.append(entry)
        for entry in late:
            self._remove(entry)
            actions.append(Refuse(entry.id, RefusalKind.LATE))
        self._late_bound_ns = bound_ns
        if late:
            self._overloaded_until_ns = now_ns + _OVERLOAD_BATCHES * self._forecast.batch_ns

    # Forming batches

    def _is_held(self, now_ns: int) -> bool:
        """Whether a window keeps the only lane that waits; if so `next_wakeup_ns` knows until when."""
        lane = next(iter(self._waiting.values())).queue.lane
        if lane.waiting < len(self._waiting) and not self._windows.has_duty:
            return False  # a window is for engines that have nothing else to do
        until_ns = self._windows.until(now_ns, lane, self._pool.speed)
        if until_ns <= now_ns:
            return False
        # One more row than now must still be served in time.
        rows = min(lane.waiting + 1, self._limits.max_batch)
        slack_ns = self._late_bound_ns - lane.costs.p99(rows) * self._pool.speed
        if slack_ns < until_ns:
            until_ns = int(slack_ns)
        if until_ns <= now_ns:
            return False
        self._window_ends_ns = until_ns
        return True

    def _next_queue(self, now_ns: int) -> Queue:
        """Whose turn it is: level, then tenant, then its most urgent lane."""
        for level in self._levels:  # a generator here costs a request alone a fourteenth more
            if level.waiting:
                break
        if level.waiting < len(self._waiting):
            level = self._next_level(now_ns)
        level.since_ns = now_ns
        level.credit_ns = _CREDIT_BATCHES * self._forecast.batch_ns
        share = level.turn()
        queue = share.most_urgent()
        if queue.lane.version != queue.lane.costs.version:
            queue.lane.refresh()
            self._forecast.refresh()
        return queue

    def _next_level(self, now_ns: int) -> PriorityClass:
        """The first level that waits, or a later one that has aged up to it."""
        ageing_ns = max(_AGEING_BATCHES * self._forecast.batch_ns, _LEAST_AGEING_NS)
        ranks = [
            (max(rank - (now_ns - level.since_ns) // ageing_ns, 0), level.since_ns, rank)
            for rank, level in enumerate(self._levels)
            if level.waiting
        ]
        return self._levels[min(ranks)[2]]

    def _staying(self, lane: Lane) -> list[Entry]:
        """Take out those that must be in the lane's next step."""
        stay = [self._waiting[request_id] for request_id in list(lane.staying)[: self._limits.max_batch]]
        for entry in stay:
            del lane.staying[entry.id]
            entry.queue.remove(entry)
        self._leave(stay)
        return stay

    def _newcomers(self, first: Queue, rows: int) -> list[Entry]:
        """Take out `rows` entries of one lane: the level and tenant whose turn it is, then all in equal parts by level."""
        lane = first.lane
        if rows <= 0 or not lane.waiting:
            return []
        # One tenant at one level, as on most devices: there is nothing to part.
        is_whole = lane.waiting == len(first.keys)
        taken = first.cut(rows) if is_whole else self._parted(first, rows)
        self._leave(taken)
        return taken

    def _parted(self, first: Queue, rows: int) -> list[Entry]:
        lane = first.lane
        taken: list[Entry] = []
        own = first.share.level
        levels = self._levels if own is self._levels[0] else [own, *self._levels]
        for level in levels:
            while len(taken) < rows and (queues := level.in_turn(lane)):
                each = -(-(rows - len(taken)) // len(queues))
                for queue in queues[: rows - len(taken)]:
                    taken += queue.cut(min(each, rows - len(taken)))
        return taken

    def _dispatch(self, now_ns: int, queue: Queue) -> list[Action]:
        pool, lane = self._pool, queue.lane
        rows = lane.split.batch(lane.waiting)
        lane.is_filling = lane.waiting >= lane.split.most
        members = self._staying(lane) if lane.staying else []
        newcomers = self._newcomers(queue, rows - len(members))
        members += newcomers
        index = pool.choose()
        speed = pool.speed_of(index)
        actions: list[Action] = []
        predicted_ns = lane.costs.mean(len(members)) * speed
        earliest_ns = members[0].key_ns if len(members) == 1 else min([entry.key_ns for entry in members])
        if earliest_ns < now_ns + predicted_ns:
            may_shrink = now_ns >= self._overloaded_until_ns
            fit = Fit(now_ns, lane, speed, is_stale=_is_stale(now_ns, lane))
            late, back = fit.apply(members, newcomers, may_shrink=may_shrink)
            # Others take the places of who is refused, else half of each batch runs empty at twice the load that can
            # be served.
            while late and not may_shrink and (others := self._newcomers(queue, rows - len(members))):
                members += others
                late += fit.apply(members, others, may_shrink=False)[0]
            actions = [Refuse(entry.id, RefusalKind.LATE) for entry in late]
            for entry in back:
                self._requeue(now_ns, entry)
            if not members:
                return actions
            predicted_ns = lane.costs.mean(len(members)) * speed
        self._charge(now_ns, members, predicted_ns / len(members))
        pool.start(index, now_ns, predicted_ns)
        lane.running += 1
        self._windows.spend(predicted_ns)
        batch_id = self._next_batch_id
        self._next_batch_id = batch_id + 1
        self._batches[batch_id] = _Batch(index, lane, members)
        actions.append(Dispatch(batch_id, lane.key, tuple([entry.id for entry in members]), index))
        return actions

    def _charge(self, now_ns: int, members: Sequence[Entry], each_ns: float) -> None:
        if self._quotas is not None:
            self._quotas.spend(now_ns, [entry.queue.share.tenant for entry in members], each_ns)
        if len(members) == 1:
            share = members[0].queue.share
            share.level.charge(share, each_ns)
            return
        counts: dict[Flow, int] = {}
        for entry in members:
            share = entry.queue.share
            counts[share] = counts.get(share, 0) + 1
        for share, count in counts.items():
            share.level.charge(share, count * each_ns)


def _is_stale(now_ns: int, lane: Lane) -> bool:
    return not lane.running and now_ns - lane.confirmed_ns > _STALE_NS


def priority_of(word: object) -> int:
    """The level of a request's parameter; None: NORMAL. Raises InvalidRequest."""
    if word is None:
        return NORMAL
    if isinstance(word, str | int) and not isinstance(word, bool) and word in _PRIORITIES:
        return _PRIORITIES[word]
    raise InvalidRequest('Parameter priority must be "high", "normal" or "low", or a number from 0 to 3.')
