"""The batching core both tiers share: natural batching over bounded queues, decided without a clock or a future.

Rule: an idle engine takes what waits at once; while it is busy, arrivals accumulate, and leave together
when it frees. A lone caller therefore never waits for company, and batches grow by themselves exactly
when the engine is the bottleneck (Inoue, arXiv 1912.06322, analyses this policy).

The scheduler holds ids, sizes and deadlines, never payloads. Each call takes `now_ns` from any
monotonic clock; `poll` returns what to do and `next_wakeup_ns` when to ask again. What may share a batch
is said by the `lane` of each request: any hashable value, equal for co-batchable requests.
It is not thread-safe; one owner calls it.
"""

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

from edge_runtime.core.errors import RefusalKind


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of the waiting queue over all lanes, and of one batch."""

    max_batch: int = 32
    max_waiting: int = 1024
    max_waiting_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run these requests together, in this order, on a free engine; report with `batch_done`."""

    batch_id: int
    lane: Hashable
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell this caller no; the id is forgotten."""

    id: int
    kind: RefusalKind


Action = Dispatch | Refuse


@dataclass(slots=True)
class _Waiting:
    lane: Hashable
    size_bytes: int
    deadline_ns: int | None


class Scheduler:
    """Decides which requests run together and when, for `engines` interchangeable engines.

    Invariants (held by property tests): each admitted id leaves exactly once, by Dispatch, Refuse or
    cancel; a batch has one lane and at most `max_batch` ids; an idle engine and a waiting request
    never coexist after `poll`; the same calls give the same actions.
    """

    def __init__(self, limits: QueueLimits, engines: int = 1) -> None:
        self._limits = limits
        self._idle_engines = engines
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()  # in order of arrival
        self._waiting_bytes = 0
        self._lanes: dict[Hashable, OrderedDict[int, None]] = {}  # no lane is ever empty
        self._deadlines: list[tuple[int, int]] = []  # a heap; ids that left stay until they surface
        self._running: set[int] = set()
        self._next_batch_id = 0
        self._is_draining = False

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running_batches(self) -> int:
        """How many batches are dispatched and not yet reported done."""
        return len(self._running)

    def submit(
        self,
        now_ns: int,
        request_id: int,
        lane: Hashable,
        *,
        size_bytes: int = 0,
        deadline_ns: int | None = None,
    ) -> Refuse | None:
        """Queue a request whose id was never used before, or return the refusal. Ask `poll` what to run."""
        if self._is_draining:
            return Refuse(request_id, RefusalKind.DRAINING)
        if deadline_ns is not None and deadline_ns <= now_ns:
            return Refuse(request_id, RefusalKind.LATE)
        is_full = len(self._waiting) >= self._limits.max_waiting
        if is_full or self._waiting_bytes + size_bytes > self._limits.max_waiting_bytes:
            return Refuse(request_id, RefusalKind.FULL)
        self._waiting[request_id] = _Waiting(lane, size_bytes, deadline_ns)
        self._waiting_bytes += size_bytes
        queue = self._lanes.get(lane)
        if queue is None:
            queue = self._lanes[lane] = OrderedDict()
        queue[request_id] = None
        if deadline_ns is not None:
            heapq.heappush(self._deadlines, (deadline_ns, request_id))
        return None

    def cancel(self, request_id: int) -> bool:
        """Forget a waiting request and return True; False if it already left the queue.

        A request that is running keeps its place in its batch: its neighbours must not notice.
        The owner drops its result.
        """
        return self._take(request_id) is not None

    def drain(self) -> None:
        """Refuse every later submission; what waits is still served."""
        self._is_draining = True

    def poll(self, now_ns: int) -> list[Action]:
        """Return what to do now: refusals of what is too late first, then a batch per idle engine."""
        actions: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, request_id = heapq.heappop(self._deadlines)
            if self._take(request_id) is not None:
                actions.append(Refuse(request_id, RefusalKind.LATE))
        while self._idle_engines and self._waiting:
            actions.append(self._dispatch_oldest())
        return actions

    def batch_done(self, batch_id: int) -> None:
        """Report that a dispatched batch ended, well or badly; its engine is free again."""
        self._running.remove(batch_id)
        self._idle_engines += 1

    def next_wakeup_ns(self) -> int | None:
        """When `poll` must be called at the latest although nothing else happened; None: not needed."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _take(self, request_id: int) -> _Waiting | None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return None
        self._waiting_bytes -= waiting.size_bytes
        queue = self._lanes[waiting.lane]
        del queue[request_id]
        if not queue:
            del self._lanes[waiting.lane]
        # Amortised: a stream of cancels behind one long wait must not grow the heap.
        if len(self._deadlines) > 64 + 4 * len(self._waiting):
            self._deadlines = [pair for pair in self._deadlines if pair[1] in self._waiting]
            heapq.heapify(self._deadlines)
        return waiting

    def _dispatch_oldest(self) -> Dispatch:
        """Form a batch in the lane of the request that waits longest, so that no lane starves."""
        oldest = next(iter(self._waiting.values()))
        ids = tuple(islice(self._lanes[oldest.lane], self._limits.max_batch))
        for request_id in ids:
            self._take(request_id)
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        self._idle_engines -= 1
        self._running.add(batch_id)
        return Dispatch(batch_id, oldest.lane, ids)
