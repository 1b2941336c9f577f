"""The rows of one request on their way: looked up, joined to flights or run together, decided, gathered.

Rows that the model must compute are run by one call of the model runner. A row is decided in the turn in which its
result is known (`_settled`), so that followers of early rows do not wait for late ones; a row gets a task of its own
only where it must wait for the cloud, for the disk or for the flight of another request.

Interleavings that the code guards against:
- The request is cancelled, or one of its rows fails: the task group cancels the others, and every flight that the
  request still leads is abandoned on the way out (`answer`), after its tasks have ended.
- A row settles after another row of the request has failed, in the turn before the group is cancelled: no task is
  started any more (`_has_failed`), since a group that is ending takes none.
- A flight lands between the look-up of a row and the start of its task: the row joined when it looked.
- Equal rows in one request: the first goes its way and the others take its outcome at the end. They never wait for
  a flight of their own request.
- The model is replaced while the request runs: its outcomes are not kept, since no new request could ask for them.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from edge_runtime.caching.two_level import DiskHit, TwoLevelCache
from edge_runtime.core.caching.keys import KeyPrefix
from edge_runtime.core.errors import RefusalKind, Refused, refusal
from edge_runtime.core.messages import Origin
from edge_runtime.core.outcome import Outcome
from edge_runtime.processing import Question
from edge_runtime.serving.cascade import Cascade, Pending, RequestContext
from edge_runtime.serving.model_runner import RowResult
from edge_runtime.serving.registry import Registry, ServedModel
from edge_runtime.serving.single_flight import Flight, SingleFlight, Waiter


@dataclass(slots=True)
class Counters:
    """Rows by (model, origin, reason), and rows that took the outcome of an equal row; for metrics and status."""

    outcomes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    coalesced: int = 0

    def count(self, model: str, outcome: Outcome) -> None:
        """Count one answered row."""
        key = (model, str(outcome.origin), str(outcome.reason))
        self.outcomes[key] = self.outcomes.get(key, 0) + 1


@dataclass(frozen=True, slots=True)
class Shared:
    """What the requests of one service share."""

    registry: Registry
    cascade: Cascade
    flights: SingleFlight
    cache: TwoLevelCache | None
    counters: Counters


class _Earlier:
    """The earlier answers of one row; the disk is asked once."""

    __slots__ = ("_cache", "_digest", "_hit", "_is_asked", "_key")

    def __init__(self, cache: TwoLevelCache, key: bytes, digest: str) -> None:
        self._cache, self._key, self._digest = cache, key, digest
        self._hit: DiskHit | None = None
        self._is_asked = False

    async def find(self) -> Outcome | None:
        """See `EarlierAnswers.find`."""
        if not self._is_asked:
            self._is_asked = True
            self._hit = await self._cache.read_disk(self._key, self._digest)
        return self._hit.outcome if self._hit is not None and self._hit.is_fresh else None

    def stale(self) -> Outcome | None:
        """See `EarlierAnswers.stale`."""
        return self._cache.stale_answer(self._key, self._hit)


class _Todo(Enum):
    """What is to be done with a row that was looked up."""

    RUN = "run"
    NOTHING = "nothing"  # it has its outcome, or takes that of an equal row of this request


#: What the look-up of a row says; a waiter is that of another request's flight.
_Step: TypeAlias = _Todo | Pending | Waiter


class RequestRows:
    """Answers the rows of one request. Used once."""

    __slots__ = (
        "_asked_ns", "_cache", "_context", "_first", "_group", "_has_failed", "_led", "_outcomes", "_prefix",
        "_questions", "_repeats", "_served", "_shared",
    )  # fmt: skip

    def __init__(
        self,
        shared: Shared,
        served: ServedModel,
        context: RequestContext,
        questions: Sequence[Question],
        prefix: KeyPrefix | None,
    ) -> None:
        """`prefix` is that of the rows' cache keys; None where the caller or the configuration wants no cache."""
        self._shared, self._served, self._context = shared, served, context
        self._questions, self._prefix = questions, prefix
        self._cache = None if prefix is None else shared.cache
        self._outcomes: list[Outcome | None] = [None] * len(questions)
        self._led: dict[int, Flight] = {}  # flights that this request leads, by the index of their row
        self._first: dict[bytes, int] = {}  # the index of the row that leads a key
        self._repeats: dict[int, int] = {}  # rows that take the outcome of an equal row of this request
        self._asked_ns = (
            0  # when memory was asked first, by the clock of the cache: a kept answer is as old as that
        )
        self._group: asyncio.TaskGroup
        self._has_failed = False

    async def answer(self) -> list[Outcome]:
        """Return the outcome of each row. Raises the first error of a row: Refused, EngineFailed, InvalidRequest."""
        try:
            if len(self._questions) == 1:
                await self._go_on(0, self._look_up(0))
            else:
                await self._answer_many()
        finally:
            for flight in self._led.values():
                self._shared.flights.abandon(flight)
        return [outcome for outcome in self._outcomes if outcome is not None]

    async def _answer_many(self) -> None:
        steps = [(index, self._look_up(index)) for index in range(len(self._questions))]
        to_run = [index for index, step in steps if step is _Todo.RUN]
        alone: list[tuple[int, _Step]] = [
            (index, step) for index, step in steps if not isinstance(step, _Todo)
        ]
        if self._reads_disk_first():  # then the model costs far more than a task for each row
            alone += [(index, _Todo.RUN) for index in to_run]
            to_run = []
        if to_run or alone:
            try:
                async with asyncio.TaskGroup() as self._group:
                    for index, step in alone:
                        self._group.create_task(self._go_on(index, step), name=f"row-{index}")
                    if to_run:
                        await self._run_together(to_run)
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
        for index, first in self._repeats.items():
            self._outcomes[index] = self._outcomes[first]

    def _look_up(self, index: int) -> _Step:
        """Answer a row from memory, or say what is to be done. A row that is to be run or finished leads its key."""
        cache, shared = self._cache, self._shared
        if cache is None or self._prefix is None:
            return _Todo.RUN
        key = self._prefix.key(self._served.processor.canonical(self._questions[index]))
        statistics = self._served.runner.statistics
        looked_ns = time.monotonic_ns()
        if not self._asked_ns:  # a row that looks again must not make the answers of the other rows younger
            self._asked_ns = cache.now_ns()
        found = cache.get(key)
        pending: Pending | None = None
        if found is not None:
            judged = shared.cascade.judge_cached(self._served, self._context, found)
            if isinstance(judged, Outcome):
                statistics.cache_hit.add(time.monotonic_ns() - looked_ns)
                statistics.queue.add(0)  # as Triton counts: load generators look for it
                self._outcomes[index] = judged
                return _Todo.NOTHING
            pending = judged
        if key in self._first:
            shared.counters.coalesced += 1
            self._repeats[index] = self._first[key]
            return _Todo.NOTHING
        flight = shared.flights.find(key)
        if flight is not None:
            shared.counters.coalesced += 1
            return flight.join()
        statistics.cache_miss.add(time.monotonic_ns() - looked_ns)
        self._first[key] = index
        self._led[index] = shared.flights.lead(key)
        return _Todo.RUN if pending is None else pending

    async def _go_on(self, index: int, step: _Step) -> None:
        """Bring one row to its outcome, by itself."""
        try:
            while isinstance(step, asyncio.Future):
                self._outcomes[index] = await self._outcome_of_leader(step)
                step = _Todo.NOTHING if self._outcomes[index] is not None else self._look_up(index)
            if step is _Todo.NOTHING:
                return
            earlier = None
            if index in self._led and self._cache is not None:
                earlier = _Earlier(self._cache, self._led[index].key, self._served.info.digest)
            judged = step if isinstance(step, Pending) else await self._judge_alone(index, earlier)
            if isinstance(judged, Pending):
                judged = await self._shared.cascade.finish(
                    self._served, self._context, self._questions[index], judged, earlier
                )
            self._end(index, judged)
        except Exception as error:
            self._has_failed = True
            self._end_flight(index, error)
            raise

    async def _outcome_of_leader(self, waiter: Waiter) -> Outcome | None:
        """Return the outcome of another request's flight, or None if it was abandoned. Raises Refused, EngineFailed."""
        patience_ns = self._context.deadline_ns - time.monotonic_ns()
        try:
            async with asyncio.timeout(patience_ns / 1e9):
                return await waiter
        except TimeoutError:
            raise refusal(RefusalKind.LATE) from None

    async def _judge_alone(self, index: int, earlier: _Earlier | None) -> Outcome | Pending:
        """Answer a row from disk or by running it alone. Raises Refused and EngineFailed."""
        cascade, served, context = self._shared.cascade, self._served, self._context
        if earlier is not None and self._reads_disk_first():
            found = await earlier.find()
            kept = None if found is None else cascade.judge_cached(served, context, found)
            if kept is not None:
                return kept
        (result,) = await served.runner.run_rows(
            [self._questions[index]],
            deadline_ns=context.deadline_ns, tenant=context.tenant, priority=context.priority,
        )  # fmt: skip
        judged = cascade.judge(served, context, result, has_earlier=earlier is not None)
        if isinstance(judged, Outcome | Pending):
            return judged
        raise judged

    async def _run_together(self, indices: list[int]) -> None:
        """Run rows as one request of the model runner."""
        await self._served.runner.run_rows(
            [self._questions[index] for index in indices],
            deadline_ns=self._context.deadline_ns,
            tenant=self._context.tenant,
            priority=self._context.priority,
            on_row=lambda at, result: self._settled(indices[at], result),
        )

    def _settled(self, index: int, result: RowResult) -> None:
        """Decide a row whose result is known. Called by the model runner, which serves others too: must not raise."""
        try:
            judged = self._shared.cascade.judge(
                self._served, self._context, result, has_earlier=self._cache is not None
            )
            if isinstance(judged, Outcome):
                self._end(index, judged)
            elif isinstance(judged, Pending):
                if not self._has_failed:
                    self._group.create_task(self._go_on(index, judged), name=f"row-{index}")
            else:
                self._fail(index, judged)
        except Exception as error:  # noqa: BLE001 - a defect ends this request alone
            self._fail(index, error)

    def _reads_disk_first(self) -> bool:
        return self._cache is not None and self._cache.is_disk_worthwhile(self._served.row_ns)

    def _end(self, index: int, outcome: Outcome) -> None:
        """Note the outcome of a row, give it to its followers, and keep it if it is final."""
        shared, served = self._shared, self._served
        self._outcomes[index] = outcome
        if outcome.origin is Origin.CLOUD and shared.cache is not None:
            shared.cache.note_cloud_version(served.info.digest, outcome.cloud_version)
        flight = self._led.pop(index, None)
        if flight is None:
            return
        shared.flights.land(flight, outcome)
        is_final = outcome.origin is not Origin.CACHE and not outcome.is_degraded
        # A model that was replaced meanwhile would fill the cache with answers that no request can ask for.
        if is_final and shared.cache is not None and shared.registry.is_current(served):
            shared.cache.put(
                self._asked_ns, flight.key, served.info.digest, served.row_ns, outcome,
                is_private=self._context.is_private,
            )  # fmt: skip

    def _fail(self, index: int, error: Exception) -> None:
        """End the request with the error of a row; the first one counts."""
        self._end_flight(index, error)
        if not self._has_failed:
            self._has_failed = True
            self._group.create_task(_raise(error), name=f"fail-{index}")

    def _end_flight(self, index: int, error: Exception) -> None:
        flight = self._led.pop(index, None)
        if flight is None:
            return
        if isinstance(error, Refused):
            self._shared.flights.abandon(flight)
        else:
            self._shared.flights.fail(flight, error)


async def _raise(error: Exception) -> None:
    raise error
