"""Batching rules of other systems, reimplemented, and the simplest rule as a check of the loop.

They serve one lane in order of arrival and know neither tenants nor priorities.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from edge_runtime.core.errors import RefusalKind
from edge_runtime.core.scheduling.scheduler import NORMAL, Action, Dispatch, Refuse
from tools.simulation.engine import Engine

#: How often BentoML looks at its queue.
_TICK_NS = 1_000_000


@dataclass(slots=True)
class _Waiting:
    id: int
    since_ns: int
    deadline_ns: int | None


class Natural:
    """An idle engine takes what waits, at most `max_batch`."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.queue: deque[_Waiting] = deque()
        self.is_running = False
        self._batches = 0

    def submit(
        self,
        now_ns: int,
        request_id: int,
        lane: Hashable,  # noqa: ARG002 - there is one
        *,
        deadline_ns: int | None = None,
        tenant: str = "",  # noqa: ARG002
        priority: int = NORMAL,  # noqa: ARG002
    ) -> Refuse | None:
        self.queue.append(_Waiting(request_id, now_ns, deadline_ns))
        return None

    def poll(self, now_ns: int) -> list[Action]:  # noqa: ARG002 - nothing here is timed
        return [] if self.is_running or not self.queue else [self.dispatch(self.max_batch)]

    def dispatch(self, rows: int) -> Dispatch:
        taken = [self.queue.popleft() for _ in range(min(rows, len(self.queue)))]
        return self.start([waiting.id for waiting in taken])

    def start(self, ids: list[int]) -> Dispatch:
        self.is_running = True
        self._batches += 1
        return Dispatch(self._batches, "lane", tuple(ids))

    def batch_done(self, now_ns: int, batch_id: int, duration_ns: int | None = None) -> None:  # noqa: ARG002
        self.is_running = False

    def next_wakeup_ns(self) -> int | None:
        return None


class Bento(Natural):
    """BentoML's `CorkDispatcher` (marshal/dispatcher.py): wait while that seems to cost less than usual.

    Of n waiting, the newest since `wn`, it waits on while n * (wn + tick + c) <= 0.95 of the mean wait of the last 50
    batches, looking once a millisecond, also while the engine runs; it takes the newest first, and gives up
    the oldest when its wait with t(n) = c*n + a reaches the limit. It is favoured over the original: it starts
    with the true a and c instead of its training phase, and fits them again every 50 batches instead of every 5 s.
    """

    def __init__(self, engine: Engine, limit_ns: int) -> None:
        super().__init__(engine.max_batch)
        self._limit_ns = limit_ns
        self._fixed, self._marginal = float(engine.fixed_ns), float(engine.marginal_ns)
        self._mean_wait = 10_000_000.0
        self._kept: deque[tuple[int, int, int]] = deque(maxlen=50)  # rows, duration, wait
        self._unread = 0
        self._running = (0, 0)  # rows, wait
        self._tick_ns: int | None = None

    def poll(self, now_ns: int) -> list[Action]:
        actions: list[Action] = []
        if self._tick_ns is not None and now_ns < self._tick_ns:
            return actions
        self._tick_ns = None
        while queue := self.queue:
            count, oldest_ns = len(queue), now_ns - queue[0].since_ns
            is_hopeless = oldest_ns + self._marginal * count + self._fixed >= self._limit_ns
            if (count > 1 and is_hopeless) or (
                count == 1 and self.is_running and oldest_ns >= self._limit_ns
            ):
                actions.append(Refuse(queue.popleft().id, RefusalKind.LATE))
                continue
            newest_ns = now_ns - queue[-1].since_ns
            is_cheap = count * (newest_ns + _TICK_NS + self._marginal) <= 0.95 * self._mean_wait
            if self.is_running or (count < self.max_batch and is_cheap):
                self._tick_ns = now_ns + _TICK_NS
                break
            taken = [queue.pop() for _ in range(min(count, self.max_batch))]
            self._running = len(taken), now_ns - taken[-1].since_ns
            actions.append(self.start([waiting.id for waiting in taken]))
        return actions

    def batch_done(self, now_ns: int, batch_id: int, duration_ns: int | None = None) -> None:
        super().batch_done(now_ns, batch_id)
        rows, wait_ns = self._running
        self._kept.append((rows, duration_ns or 0, wait_ns))
        self._unread += 1
        if self._unread >= 50:
            self._unread = 0
            kept = np.array(self._kept, np.float64)
            sides = np.stack([kept[:, 0], np.ones(len(kept))], axis=1)
            (marginal, fixed), *_ = np.linalg.lstsq(sides, kept[:, 1], rcond=None)
            self._marginal, self._fixed = max(float(marginal), 1000.0), max(float(fixed), 0.0)
            self._mean_wait = float(kept[:, 2].mean())

    def next_wakeup_ns(self) -> int | None:
        return self._tick_ns


class Clipper(Natural):
    """Clipper's adaptive batch size (NSDI 2017, section 4.3.1): additive increase, multiplicative decrease.

    The largest batch grows by one for each full one that ends within the target and shrinks by a tenth for each that
    does not; requests whose deadline has passed are dropped when a batch is formed. It never waits for company.
    """

    def __init__(self, engine: Engine, target_ns: int) -> None:
        super().__init__(engine.max_batch)
        self._target_ns = target_ns
        self._size = 1.0
        self._rows = 0

    def poll(self, now_ns: int) -> list[Action]:
        actions: list[Action] = []
        queue = self.queue
        if self.is_running:
            return actions
        while queue and (deadline_ns := queue[0].deadline_ns) is not None and deadline_ns <= now_ns:
            actions.append(Refuse(queue.popleft().id, RefusalKind.LATE))
        if queue:
            batch = self.dispatch(int(self._size))
            self._rows = len(batch.ids)
            actions.append(batch)
        return actions

    def batch_done(self, now_ns: int, batch_id: int, duration_ns: int | None = None) -> None:
        super().batch_done(now_ns, batch_id)
        if (duration_ns or 0) > self._target_ns:
            self._size = max(self._size * 0.9, 1.0)
        elif self._rows >= int(self._size):
            self._size = min(self._size + 1, float(self.max_batch))
