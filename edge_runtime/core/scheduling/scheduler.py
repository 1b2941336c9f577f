"""The scheduler that both tiers share: which requests run together, on which engine, when, and which are refused.

An idle engine takes the waiting requests at once. While it is busy, arrivals accumulate and leave together when it has
room again (Inoue, arXiv 1912.06322, analyses this policy). A request waits beside an idle engine only where a policy
says so (`windows`). The order is: strict priority classes with ageing, flows in turns of engine time, earliest deadline
first (`queueing`). A request that is predicted to miss its deadline is refused before it takes a place in the queue,
or engine time if it was admitted already; predictions come from measured batches (`batch_costs`, `forecast`).

The scheduler holds ids, sizes and deadlines, never payloads. Each call takes `now_ns` from any monotonic clock; `poll`
returns what to do, `next_wakeup_ns` when to call it again. The `lane` of a request is any hashable value; requests with
equal lanes may share a batch. Not thread-safe: one owner makes all calls.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.messages import LatencyProfile
from edge_runtime.core.scheduling.deadlines import Fit
from edge_runtime.core.scheduling.displacement import Newcomer, victims
from edge_runtime.core.scheduling.engine_pool import EnginePool
from edge_runtime.core.scheduling.forecast import Forecast, Place
from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Entry, Flow, PriorityClass, Queue
from edge_runtime.core.scheduling.quotas import EngineQuotas
from edge_runtime.core.scheduling.windows import Policy, Windows

#: Priorities are the integers from 0 (served first) to PRIORITIES - 1.
PRIORITIES = 3
NORMAL = 1

_SECOND = 1_000_000_000
#: A poll returns at most this many batches, unless its caller says otherwise. To form eight batches of 32 rows takes
#: about a millisecond, the resolution of an event loop's timers; then other work of the loop has its turn.
BATCHES_PER_POLL = 8
#: This part of the queue is left to single rows; see `reserve`.
_PART_OF_SINGLES = 8
#: A priority class rises by one after this many full batches without a turn, but not before a millisecond.
_AGEING_BATCHES = 16
_LEAST_AGEING_NS = 1_000_000
#: A request is ordered as if its deadline were at most this far away. So one without a deadline does not wait for ever
#: behind deadlines, and one with a distant deadline (ten seconds are the default of requests over HTTP) does not wait
#: longer than one without.
_PATIENCE_NS = 10 * _SECOND
#: A prediction that no batch has confirmed for so long refuses nothing, because refused requests cannot correct it.
_STALE_NS = _SECOND
#: A flow that had less than its part of the engine may catch up by so many full batches.
_CREDIT_BATCHES = 2
#: After a refusal for lack of time the queue counts as overloaded for so many full batches.
_OVERLOAD_BATCHES = 8


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a batch in rows, and of the waiting requests: of all lanes together, and of one tenant.

    `tenant_engine_share`: engine seconds that a tenant may use per second, with a burst of one second; None: no limit.
    """

    max_batch: int = 32
    max_waiting: int = 1024
    max_waiting_bytes: int = 64 << 20
    tenant_max_waiting: int | None = None
    tenant_engine_share: float | None = None


class Dispatch(NamedTuple):  # as is Refuse: a frozen dataclass takes three times as long to make
    """Run these requests together, in this order, on this engine, then report the end with `batch_done`."""

    batch_id: int
    lane: Hashable
    ids: tuple[int, ...]
    engine: int = 0


class Refuse(NamedTuple):
    """Refuse this request; its id is forgotten. `retry_after_ns`: when there may be room; None: not known."""

    id: int
    kind: RefusalKind
    retry_after_ns: int | None = None


Action = Dispatch | Refuse


#: No member stays: what `batch_done` is told of one-shot models.
_NOBODY: Mapping[int, Hashable] = {}


class _Batch(NamedTuple):
    engine: int
    lane: Lane
    entries: list[Entry]


class Scheduler:
    """Decides for interchangeable engines, each of which takes `depth` batches at a time.

    Invariants, held by property tests:

    - Each admitted id leaves exactly once: by its last Dispatch, by Refuse, or by cancel.
    - A batch has one lane and at most `max_batch` ids.
    - No batch is dispatched that is predicted to end after a member's deadline.
    - After `poll`, a request waits beside an engine with room only during a window, or until the next poll, which is
      then due at once.
    - No request starves. The same calls return the same actions.
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
        """`engines` are the depths of the engines; a new lane starts with the costs of `latency_profile`.

        `pads`: the engines pad a batch to the next prepared size, as this project's do, so the sizes between cost as
        much as that size.
        """
        self._limits = limits
        policy = policy or Policy()
        self._windows = Windows(policy)
        self._pool = EnginePool(engines)
        self._classes = [PriorityClass(rank) for rank in range(PRIORITIES)]
        self._forecast = Forecast(
            self._pool,
            lambda key: Lane(
                key, limits.max_batch, latency_profile, policy.tick_ns,
                overhead_ns=policy.overhead_ns, pads=pads,
            ),
        )  # fmt: skip
        self._waiting: dict[int, Entry] = {}
        self._waiting_bytes = 0
        self._reserved = 0  # rows that `reserve` has kept room for and that were not submitted
        self._reserved_by: dict[str, int] = {}  # of them, of each tenant
        self._paused: dict[int, Entry] = {}
        self._displaced: dict[int, Refuse] = {}  # taken out of the queue, to be reported by the next poll
        self._batches: dict[int, _Batch] = {}
        self._unmeasured: set[int] = set()  # batches during which this process did not run for some time
        self._next_batch_id = 0
        self._is_draining = False
        share = limits.tenant_engine_share
        self._quotas = None if share is None else EngineQuotas(share)
        self._has_quotas = share is not None or limits.tenant_max_waiting is not None
        self._polled_ns = 0
        self._window_ends_ns: int | None = None
        self._late_bound_ns: float = float("inf")  # no waiting request has an earlier deadline
        self._overloaded_until_ns: float = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the waiting requests."""
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
        """How many times as long as learned a batch takes on an engine at present; 1.0 is as learned."""
        return self._pool.speed_of(engine)

    def predicted_ns(self, lane: Hashable, rows: int, engine: int = 0) -> float:
        """The predicted duration of a batch in nanoseconds; 0 while nothing is known."""
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
        flow: Hashable = None,
        priority: int = NORMAL,
        is_reserved: bool = False,
    ) -> Refuse | None:
        """Admit a request, or return its refusal. Then ask `poll` what to run.

        `request_id` must not be one that waits or runs. The work must end by `deadline_ns`. `priority` is 0 (served first)
        to PRIORITIES - 1. `flow` tells the connections of a tenant apart; they share its part fairly. `is_reserved`:
        `reserve` has kept room for it.

        A full queue is shared out: the new request displaces one of a lower priority, or of a flow that holds more of the
        queue. The next `poll` refuses the displaced one.
        """
        # Every request comes this way. Look-ups are written out, because each function call would add 5 %.
        if is_reserved:
            self.release(1, tenant)
        elif self._is_draining:
            return Refuse(request_id, RefusalKind.DRAINING)
        if deadline_ns is None:
            key_ns = now_ns + _PATIENCE_NS
        else:
            left_ns = deadline_ns - now_ns
            if left_ns <= 0:
                return Refuse(request_id, RefusalKind.LATE)
            key_ns = deadline_ns if left_ns < _PATIENCE_NS else now_ns + _PATIENCE_NS
        waiting, limits = self._waiting, self._limits
        displaced: Sequence[Entry] = ()
        if (
            len(waiting) + self._reserved >= limits.max_waiting
            or self._waiting_bytes + size_bytes > limits.max_waiting_bytes
        ):
            excess = len(waiting) + self._reserved + 1 - limits.max_waiting
            excess_bytes = self._waiting_bytes + size_bytes - limits.max_waiting_bytes
            asked = Flow(self._classes[priority], tenant, flow)
            displaced = victims(self._classes, Newcomer(asked, size_bytes, 1, excess, excess_bytes))
            if not displaced:
                return Refuse(request_id, RefusalKind.FULL, self._forecast.half_served_ns(now_ns))
        if self._has_quotas and (refused := self._over_quota(now_ns, request_id, tenant)):
            return refused
        forecast = self._forecast
        state = forecast.lanes.get(lane) or forecast.new_lane(lane)
        priority_class = self._classes[priority]
        present = priority_class.unnamed.get(tenant) if flow is None else priority_class.flow(tenant, flow)
        queue = None if present is None else present.queues.get(state)
        if queue is None:
            queue = Queue(
                present or Flow(priority_class, tenant, flow), state
            )  # attached by its first insert
        keys = queue.keys
        at = len(keys) if not keys or key_ns >= keys[-1] else bisect_right(keys, key_ns)
        if deadline_ns is not None:
            # Most deadlines leave time for everything that waits; only the others need an exact prediction.
            busy_ns = self._pool.busy_until_ns
            if busy_ns > now_ns:
                left_ns -= int(busy_ns) - now_ns
            if left_ns < len(waiting) * forecast.row_ns + forecast.batch_ns and (
                refused := self._too_late(now_ns, request_id, deadline_ns, queue, at, priority)
            ):
                return refused
            if deadline_ns < self._late_bound_ns:
                self._late_bound_ns = deadline_ns
        if displaced:
            self._displace(now_ns, displaced)
        if not state.waiting:
            self._windows.began(now_ns, state, finds_idle=self._pool.free > 0 and not waiting)
        elif state.linger.began_ns is not None:
            state.linger.arrived(now_ns, opens=False)
        if not priority_class.waiting:
            priority_class.since_ns = now_ns
        entry = waiting[request_id] = Entry(request_id, queue, size_bytes, key_ns, deadline_ns)
        self._waiting_bytes += size_bytes
        queue.insert(at, entry)
        return None

    def reserve(
        self,
        now_ns: int,
        request_id: int,
        rows: int,
        *,
        tenant: str = "",
        flow: Hashable = None,
        priority: int = NORMAL,
    ) -> int | Refuse:
        """Keep room for the rows of one request, or return its refusal as a whole, in the name of `request_id`.

        Returns how many rows have room: all of them, or as many as the queue takes. Each must be submitted with
        `is_reserved`, or released. So a request is not refused in the middle, when its first rows have cost engine time
        for nothing. An eighth of the queue is left to single rows, or each of them would displace a row of such a request.
        """
        if self._is_draining:
            return Refuse(request_id, RefusalKind.DRAINING)
        if self._has_quotas and (refused := self._over_quota(now_ns, request_id, tenant, rows)):
            return refused
        most = self._limits.max_waiting
        rows = min(rows, most)
        taken = len(self._waiting) + self._reserved
        excess = taken + rows - (most - most // _PART_OF_SINGLES if taken else most)
        if excess > 0:
            asked = Flow(self._classes[priority], tenant, flow)
            displaced = victims(self._classes, Newcomer(asked, 0, rows, excess, 0))
            if not displaced:
                return Refuse(request_id, RefusalKind.FULL, self._forecast.half_served_ns(now_ns))
            self._displace(now_ns, displaced)
        self._reserved += rows
        self._reserved_by[tenant] = self._reserved_by.get(tenant, 0) + rows
        return rows

    def release(self, rows: int, tenant: str = "") -> None:
        """Give back the room of reserved rows that are not submitted."""
        self._reserved -= rows
        self._reserved_by[tenant] -= rows
        if not self._reserved_by[tenant]:
            del self._reserved_by[tenant]

    def cancel(self, request_id: int) -> bool:
        """Forget a waiting or paused request and return True; return False if it has left the queue.

        A running request keeps its place in its batch, so that its neighbours do not notice. The owner drops its result
        and leaves its id out of `staying`.
        """
        entry = self._waiting.get(request_id)
        if entry is None:
            return (
                self._paused.pop(request_id, None) is not None
                or self._displaced.pop(request_id, None) is not None
            )
        self._remove(entry)
        return True

    def raise_priority(self, now_ns: int, request_id: int, priority: int) -> bool:
        """Move a waiting request to a higher priority; return False if it does not wait, or waits there or higher.

        Its deadline and its place in its flow stay the same. For a request for which a more urgent caller waits as well.
        """
        entry = self._waiting.get(request_id)
        if entry is None or entry.queue.flow.priority_class.rank <= priority:
            return False
        lane = entry.queue.lane
        entry.queue.remove(entry)
        self._place(now_ns, entry, self._classes[priority], lane)
        return True

    def drain(self) -> None:
        """Refuse every later submission. Waiting requests are still served."""
        self._is_draining = True

    def poll(self, now_ns: int, most_batches: int = BATCHES_PER_POLL) -> list[Action]:
        """Return what to do now: refusals of requests that cannot end in time, and a batch for each engine with room.

        If more than `most_batches` could be dispatched, `next_wakeup_ns` says that the next poll is due at once.
        """
        actions: list[Action] = []
        if self._displaced:
            actions += self._displaced.values()
            self._displaced.clear()
        self._polled_ns = now_ns
        self._window_ends_ns = None
        end_id = self._next_batch_id + most_batches
        while self._waiting and self._next_batch_id < end_id:
            busy_ns = self._pool.busy_until_ns
            if self._late_bound_ns <= (busy_ns if busy_ns > now_ns else now_ns) + self._forecast.single_ns:
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
        staying: Mapping[int, Hashable] = _NOBODY,
        paused: Collection[int] = (),
    ) -> None:
        """Report that a dispatched batch has ended; its engine has room again. Then ask `poll` what to run.

        `duration_ns` teaches what batches cost; None if the batch failed. `staying` maps each member that needs another
        step to the lane of that step, which differs from the last one if its rows grow. Staying members are in the next
        batch of their lane, before any newcomer. Those of `paused` need another step too, but do not wait for it until
        `resume`.
        """
        batch = self._batches.pop(batch_id)
        if self._unmeasured and batch_id in self._unmeasured:
            self._unmeasured.remove(batch_id)
            duration_ns = None
        ratio = None
        if duration_ns is not None and duration_ns > 0:
            batch.lane.confirmed_ns = now_ns
            speed = self._pool.speed_of(batch.engine)
            ratio = batch.lane.costs.observe(len(batch.entries), duration_ns / speed)
        self._pool.end(batch.engine, ratio)
        self._forecast.refresh()
        if staying or paused:
            for entry in batch.entries:
                if entry.id in staying:
                    self._stay(now_ns, entry, staying[entry.id])
                elif entry.id in paused:
                    self._paused[entry.id] = entry
        self._window_ends_ns = None  # a poll is due
        batch.lane.running -= 1  # not before: a new lane above must not push this one out of the forecast

    def resume(self, now_ns: int, request_id: int, lane: Hashable) -> None:
        """Let a paused member wait for its next step, in `lane`. Then ask `poll` what to run.

        It was admitted once, so no limit refuses it here, nor does `drain`; `poll` refuses it if its deadline has passed.
        """
        self._stay(now_ns, self._paused.pop(request_id), lane)
        self._window_ends_ns = None  # a poll is due

    def forget_time(self, now_ns: int, gap_ns: int) -> None:
        """Record that this process, and its engines, did not run for `gap_ns` until now (stopped, or frozen by the system).

        Running batches teach nothing about costs, predictions do not get stale, windows and ageing do not count the gap.
        Deadlines stay as they are, since the time of the callers went on.
        """
        # Only what began before the gap is moved: calls may have come between its end and this one.
        start_ns = now_ns - gap_ns
        self._unmeasured.update(self._batches)
        self._windows.forget_time(start_ns, gap_ns)
        for lane in self._forecast.lanes.values():
            lane.forget_time(start_ns, gap_ns)
        for priority_class in self._classes:
            if priority_class.since_ns <= start_ns:
                priority_class.since_ns += gap_ns
        self._window_ends_ns = None  # a poll is due

    def engine_down(self, engine: int) -> None:
        """Dispatch nothing more to this engine. The batches that it has must still be reported with `batch_done`."""
        self._pool.set_up(engine, is_up=False)

    def engine_up(self, engine: int) -> None:
        """Use an engine again, with the speed factor 1."""
        self._pool.set_up(engine, is_up=True)

    def next_wakeup_ns(self) -> int | None:
        """When `poll` must be called if no other call comes before; None: not needed. May be too early, never late.

        The time of the last poll, so a poll is due at once, where requests wait, an engine has room and no window holds
        them: the last poll reached its bound, or a batch has ended since.
        """
        window_ns, late_ns = self._window_ends_ns, self._late_bound_ns
        if self._displaced:
            return self._polled_ns
        if not self._waiting:
            return None
        if window_ns is None and self._pool.free:
            return self._polled_ns
        if late_ns == float("inf"):
            return window_ns
        return int(late_ns) if window_ns is None else min(int(late_ns), window_ns)

    # Admission

    def _over_quota(self, now_ns: int, request_id: int, tenant: str, rows: int = 1) -> Refuse | None:
        """Refuse rows beyond the tenant's quota of waiting requests, or of engine time."""
        most = self._limits.tenant_max_waiting
        if most is not None:
            waiting = sum([waits.waiting_of(tenant) for waits in self._classes])
            if waiting + self._reserved_by.get(tenant, 0) + min(rows, most) > most:
                return Refuse(request_id, RefusalKind.QUOTA, self._forecast.half_served_ns(now_ns))
        ahead_ns = 0 if self._quotas is None else self._quotas.ahead_ns(now_ns, tenant)
        return Refuse(request_id, RefusalKind.QUOTA, ahead_ns) if ahead_ns else None

    def _too_late(
        self, now_ns: int, request_id: int, deadline_ns: int, queue: Queue, at: int, priority: int
    ) -> Refuse | None:
        """Refuse a request that is predicted to end after its deadline, behind everything that is served before it."""
        if _is_stale(now_ns, queue.lane):
            return None
        above = sum([higher.waiting for higher in self._classes[:priority]])
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

    def _displace(self, now_ns: int, entries: Sequence[Entry]) -> None:
        retry_after_ns = self._forecast.half_served_ns(now_ns)
        for entry in entries:
            self._remove(entry)
            self._displaced[entry.id] = Refuse(entry.id, RefusalKind.FULL, retry_after_ns)

    # The waiting requests

    def _requeue(self, now_ns: int, entry: Entry, lane: Lane) -> None:
        """Return a request to the queue, in a lane and at the place that its deadline gives it."""
        flow = entry.queue.flow
        self._place(now_ns, entry, flow.priority_class, lane)
        self._waiting[entry.id] = entry
        self._waiting_bytes += entry.size_bytes
        if entry.deadline_ns is not None:
            self._late_bound_ns = min(self._late_bound_ns, entry.deadline_ns)

    def _place(self, now_ns: int, entry: Entry, priority_class: PriorityClass, lane: Lane) -> None:
        flow = entry.queue.flow
        entry.queue = queue = priority_class.queue(flow.tenant, flow.name, lane)
        if not priority_class.waiting:
            priority_class.since_ns = now_ns
        queue.insert(bisect_left(queue.keys, entry.key_ns), entry)  # before equal deadlines, which came later

    def _stay(self, now_ns: int, entry: Entry, key: Hashable) -> None:
        """Let a member wait for its next step, before any newcomer of its lane."""
        lane = self._forecast.lanes.get(key) or self._forecast.new_lane(key)
        self._requeue(now_ns, entry, lane)
        lane.staying[entry.id] = None

    def _leave(self, entries: Sequence[Entry]) -> None:
        waiting, freed_bytes = self._waiting, 0
        for entry in entries:
            del waiting[entry.id]
            freed_bytes += entry.size_bytes
        self._waiting_bytes -= freed_bytes

    def _remove(self, entry: Entry) -> None:
        self._leave([entry])
        entry.queue.lane.staying.pop(entry.id, None)
        entry.queue.remove(entry)

    def _drop_late(self, now_ns: int, actions: list[Action]) -> None:
        """Refuse each request that would miss its deadline even alone on the first engine with room."""
        start_ns = self._pool.free_from(now_ns)
        late: list[Entry] = []
        bound_ns = float("inf")
        for priority_class in self._classes:
            for queue in priority_class.queues():
                speed = 0.0 if _is_stale(now_ns, queue.lane) else self._pool.speed
                limit_ns = max(start_ns + queue.lane.costs.means[0] * speed, now_ns + 1)
                for key_ns, entry in zip(queue.keys, queue.entries, strict=True):
                    if key_ns >= limit_ns:
                        bound_ns = min(bound_ns, key_ns)
                        break
                    if entry.deadline_ns is None:
                        continue
                    if entry.deadline_ns < limit_ns:
                        late.append(entry)
                    else:
                        bound_ns = min(bound_ns, entry.deadline_ns)
        for entry in late:
            self._remove(entry)
            actions.append(Refuse(entry.id, RefusalKind.LATE))
        self._late_bound_ns = bound_ns
        if late:
            self._overloaded_until_ns = now_ns + _OVERLOAD_BATCHES * self._forecast.batch_ns

    # Forming batches

    def _is_held(self, now_ns: int) -> bool:
        """Whether a window holds the only lane with waiting requests; if so, set when it ends."""
        lane = next(iter(self._waiting.values())).queue.lane
        if lane.waiting < len(self._waiting) and not self._windows.has_duty:
            return False  # a window must not let an engine idle while other lanes wait
        until_ns = self._windows.until(now_ns, lane, self._pool.speed)
        if until_ns <= now_ns:
            return False
        # A batch with one more row must still end before the earliest deadline.
        rows = min(lane.waiting + 1, self._limits.max_batch)
        slack_ns = self._late_bound_ns - lane.costs.p99(rows) * self._pool.speed
        if slack_ns < until_ns:
            until_ns = int(slack_ns)
        if until_ns <= now_ns:
            return False
        self._window_ends_ns = until_ns
        return True

    def _next_queue(self, now_ns: int) -> Queue:
        """The queue whose turn it is: first the priority class, then the flow, then its most urgent lane."""
        for priority_class in self._classes:  # a generator here would add 7 % to a lone request
            if priority_class.waiting:
                break
        if priority_class.waiting < len(self._waiting):
            priority_class = self._next_class(now_ns)
        priority_class.since_ns = now_ns
        priority_class.time.credit_ns = _CREDIT_BATCHES * self._forecast.batch_ns
        queue = priority_class.turn().most_urgent()
        if queue.lane.version != queue.lane.costs.version:
            queue.lane.refresh()
            self._forecast.refresh()
        return queue

    def _next_class(self, now_ns: int) -> PriorityClass:
        """The highest priority class with waiting requests, or a lower one that has aged up to it."""
        ageing_ns = max(_AGEING_BATCHES * self._forecast.batch_ns, _LEAST_AGEING_NS)
        ranks = [
            (max(rank - (now_ns - waits.since_ns) // ageing_ns, 0), waits.since_ns, rank)
            for rank, waits in enumerate(self._classes)
            if waits.waiting
        ]
        return self._classes[min(ranks)[2]]

    def _staying(self, lane: Lane, rows: int) -> list[Entry]:
        """Remove from the queue, and return, at most `rows` members that must be in the lane's next step."""
        stay = [self._waiting[request_id] for request_id in list(lane.staying)[:rows]]
        for entry in stay:
            del lane.staying[entry.id]
            entry.queue.remove(entry)
        self._leave(stay)
        return stay

    def _newcomers(self, first: Queue, rows: int) -> list[Entry]:
        """Remove from the queue, and return, at most `rows` entries of the lane of `first`.

        Those of the priority class whose turn it is come first, in equal parts of its tenants, and of
        their flows, then those of the others.
        """
        lane = first.lane
        if rows <= 0 or not lane.waiting:
            return []
        # One flow in one priority class, as on most devices: there is nothing to share out.
        is_whole = lane.waiting == len(first.keys)
        taken = first.cut(rows) if is_whole else self._shared_out(first, rows)
        self._leave(taken)
        return taken

    def _shared_out(self, first: Queue, rows: int) -> list[Entry]:
        lane = first.lane
        taken: list[Entry] = []
        own = first.flow.priority_class
        classes = self._classes if own is self._classes[0] else [own, *self._classes]
        for priority_class in classes:
            if lane in priority_class.by_lane:
                taken += priority_class.take(lane, rows - len(taken))
                if len(taken) == rows:
                    break
        return taken

    def _dispatch(self, now_ns: int, queue: Queue) -> list[Action]:
        pool, lane = self._pool, queue.lane
        # Newcomers join a sequence at its next step, whatever smaller batches would cost: the sequence may have a
        # thousand steps, and they would wait for its end.
        rows = self._limits.max_batch if lane.staying else lane.split.batch(lane.waiting)
        lane.is_filling = lane.waiting >= lane.split.most
        members = self._staying(lane, rows) if lane.staying else []
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
            late, postponed = fit.apply(members, newcomers, may_shrink=may_shrink)
            # Other requests take the places of refused ones. Otherwise half of each batch would be empty at twice the
            # load that can be served. Members of sequences beyond the batch come before newcomers here as well.
            while late and not may_shrink:
                left = rows - len(members)
                others = self._staying(lane, left) if lane.staying else self._newcomers(queue, left)
                if not others:
                    break
                members += others
                late += fit.apply(members, others, may_shrink=False)[0]
            actions = [Refuse(entry.id, RefusalKind.LATE) for entry in late]
            for entry in postponed:
                self._requeue(now_ns, entry, lane)
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
            self._quotas.spend(now_ns, [entry.queue.flow.tenant for entry in members], each_ns)
        if len(members) == 1:
            flow = members[0].queue.flow
            flow.priority_class.charge(flow, each_ns)
            return
        counts: dict[Flow, int] = {}
        for entry in members:
            flow = entry.queue.flow
            counts[flow] = counts.get(flow, 0) + 1
        for flow, count in counts.items():
            flow.priority_class.charge(flow, count * each_ns)


def _is_stale(now_ns: int, lane: Lane) -> bool:
    """Whether the lane's predictions are too old to refuse a request."""
    return not lane.running and now_ns - lane.confirmed_ns > _STALE_NS
