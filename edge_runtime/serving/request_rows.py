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
- A leader's time ends while the cloud is asked, and the follower's does not: the follower gets the edge's answer, looks
  again, and asks the cloud for itself; the other followers join it. If the follower's time ends then, it has that answer.
- A more urgent request runs a row that is in flight (`_race`), and that flight lands first: its own run is cancelled, which
  takes its row out of the queue, or leaves its place in a running batch empty.
- Equal rows in one request: the first goes its way and the others take its outcome at the end. They never wait for
  a flight of their own request.
- The model is replaced while the request runs: its outcomes are not kept, since no new request could ask for them.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from edge_runtime.caching.two_level import TwoLevelCache
from edge_runtime.core.caching.keys import KeyPrefix
from edge_runtime.core.errors import RefusalKind, Refused, refusal
from edge_runtime.core.messages import Origin
from edge_runtime.core.outcome import Outcome
from edge_runtime.processing import Question
from edge_runtime.serving.cascade import Cascade, Ended, Pending, RequestContext
from edge_runtime.serving.counters import Counters
from edge_runtime.serving.earlier import Earlier
from edge_runtime.serving.in_flight import RowResult
from edge_runtime.serving.registry import Registry, ServedModel
from edge_runtime.serving.single_flight import Flight, SingleFlight, Waiter


@dataclass(frozen=True, slots=True)
class Shared:
    """What the requests of one service share."""

    registry: Registry
    cascade: Cascade
    flights: SingleFlight
    cache: TwoLevelCache | None
    counters: Counters


class _Todo(Enum):
    """What is to be done with a row that was looked up."""

    RUN = "run"
    NOTHING = "nothing"  # it has its outcome, or takes that of an equal row of this request


@dataclass(frozen=True, slots=True)
class _Race:
    """The row is to be run beside the flight of a less urgent request, whose outcome may come first."""

    flight: Flight
    waiter: Waiter


#: What the look-up of a row says; a waiter is that of another request's flight.
_Step: TypeAlias = _Todo | Pending | _Race | Waiter


class RequestRows:
    """Answers the rows of one request. Used once."""

    __slots__ = (
        "_cache", "_context", "_first", "_group", "_has_failed", "_led", "_outcomes", "_prefix",
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
        found = cache.memory.get(looked_ns, key)
        pending: Pending | None = None
        if found is not None:
            judged = shared.cascade.judge_cached(self._served, self._context, cache.cached_form(key, found))
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
        priority, deadline_ns = self._context.priority, self._context.deadline_ns
        flight = shared.flights.find(key)
        if flight is not None and not flight.would_delay(priority, deadline_ns):
            shared.counters.coalesced += 1
            return flight.join()
        statistics.cache_miss.add(time.monotonic_ns() - looked_ns)
        self._first[key] = index
        led = self._led[index] = shared.flights.lead(key, looked_ns, priority, deadline_ns)
        if pending is not None:
            led.awaits_model = False
            return pending
        return _Todo.RUN if flight is None else _Race(flight, flight.join())

    async def _go_on(self, index: int, step: _Step) -> None:
        """Bring one row to its outcome, by itself."""
        try:
            answered: Pending | None = None  # the edge's answer, from a leader whose own time has ended
            while isinstance(step, asyncio.Future):
                taken = await self._take(step, answered)
                if isinstance(taken, Ended):
                    self._end(index, taken)
                    return
                answered = taken or answered
                step = self._look_up(index)
            if step is _Todo.NOTHING:
                return
            earlier = None
            if index in self._led and self._cache is not None:
                earlier = Earlier(self._cache, self._led[index].key, self._served.info.digest)
            judged: Ended | Pending
            if isinstance(step, Pending):
                judged = step
            elif answered is not None:
                judged = self._judge_again(answered)
            elif isinstance(step, _Race):
                judged = await self._race(index, step, earlier)
            else:
                judged = await self._judge_alone(index, earlier)
            await self._conclude(index, judged, earlier)
        except Exception as error:
            self._has_failed = True
            self._end_flight(index, error)
            raise

    async def _take(self, waiter: Waiter, answered: Pending | None) -> Ended | Pending | None:
        """Return what the flight of another request comes to.

        Where the time ends before, the outcome is a degraded one of `answered`, the edge's answer. Raises EngineFailed,
        and Refused where the time ends with nothing to answer.
        """
        patience_ns = self._context.deadline_ns - time.monotonic_ns()
        try:
            async with asyncio.timeout(patience_ns / 1e9):
                taken = await waiter
        except TimeoutError:
            if answered is None or answered.kept is None:
                raise refusal(RefusalKind.LATE) from None
            return self._shared.cascade.give_up(self._served, answered)
        return Ended(taken) if isinstance(taken, Outcome) else taken

    def _judge_again(self, answered: Pending) -> Ended | Pending:
        judged = self._shared.cascade.judge_again(self._served, self._context, answered)
        return Ended(judged) if isinstance(judged, Outcome) else judged

    async def _race(self, index: int, race: _Race, earlier: Earlier | None) -> Ended | Pending:
        """Run a row that is more urgent than the flight it found, and take whichever result comes first.

        The flight may be done soon (its batch runs already), or late (it waits behind others): neither is known here.
        """
        waiter = race.waiter
        own = asyncio.get_running_loop().create_task(
            self._judge_alone(index, earlier), name=f"urgent-row-{index}"
        )
        either: set[asyncio.Future[Any]] = {own, waiter}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            judged: Pending | None = None
            if own.done() and not isinstance(own.exception(), Refused):
                result = own.result()
                if isinstance(result, Ended) or race.flight.awaits_model:
                    return result
                judged = result
            if not own.done() and waiter.exception() is not None:
                return await own
            # The flight has landed, or asks the cloud already, or is all that is left to a row that was refused.
            taken = await self._take(waiter, judged)
            if taken is None:
                return judged or await own
            self._shared.counters.coalesced += 1
            return self._judge_again(taken) if isinstance(taken, Pending) else taken
        finally:
            waiter.cancel()
            own.cancel()
            await asyncio.gather(own, return_exceptions=True)

    async def _conclude(self, index: int, judged: Ended | Pending, earlier: Earlier | None) -> None:
        """Await what is left to be awaited, and end the row."""
        led = self._led.get(index)
        if led is not None:
            led.awaits_model = False
        while isinstance(judged, Pending) and judged.kept is not None and led is not None:
            other = self._shared.flights.find(led.key)
            if other is None or other is led or other.awaits_model:
                break
            # A more urgent request asks the cloud for this row already: one question is enough.
            taken = await self._take(other.join(), judged)
            judged = taken if isinstance(taken, Ended) else self._judge_again(taken or judged)
        if isinstance(judged, Pending):
            judged = await self._shared.cascade.finish(
                self._served, self._context, self._questions[index], judged, earlier
            )
        self._end(index, judged)

    async def _judge_alone(self, index: int, earlier: Earlier | None) -> Ended | Pending:
        """Answer a row from disk or by running it alone. Raises Refused and EngineFailed."""
        cascade, served, context = self._shared.cascade, self._served, self._context
        if earlier is not None and self._reads_disk_first():
            found = await earlier.find()
            kept = None if found is None else cascade.judge_cached(served, context, found)
            if kept is not None:
                return Ended(kept) if isinstance(kept, Outcome) else kept
        (result,) = await served.runner.run_rows(
            [self._questions[index]],
            deadline_ns=context.deadline_ns, tenant=context.tenant, priority=context.priority,
        )  # fmt: skip
        judged = cascade.judge(served, context, result, has_earlier=earlier is not None)
        if isinstance(judged, Pending):
            return judged
        if isinstance(judged, Outcome):
            return Ended(judged)
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
                self._end(index, Ended(judged))
            elif isinstance(judged, Pending):
                if index in self._led:
                    self._led[index].awaits_model = False
                if not self._has_failed:
                    self._group.create_task(self._go_on(index, judged), name=f"row-{index}")
            else:
                self._fail(index, judged)
        except Exception as error:  # noqa: BLE001 - a defect ends this request alone
            self._fail(index, error)

    def _reads_disk_first(self) -> bool:
        return self._cache is not None and self._cache.is_disk_worthwhile(self._served.row_ns)

    def _end(self, index: int, ended: Ended) -> None:
        """Note the outcome of a row, give it to its followers, and keep it if it is final."""
        shared, served, outcome = self._shared, self._served, ended.outcome
        self._outcomes[index] = outcome
        if outcome.origin is Origin.CLOUD and shared.cache is not None:
            shared.cache.note_cloud_version(served.info.digest, outcome.cloud_version)
        flight = self._led.pop(index, None)
        if flight is None:
            return
        if ended.own is None:
            shared.flights.land(flight, outcome)
        else:
            shared.flights.pass_on(flight, ended.own)
        is_final = outcome.origin is not Origin.CACHE and not outcome.is_degraded
        if outcome.origin is Origin.CLOUD and not shared.cascade.may_keep_cloud_answers:
            is_final = False
        # A model that was replaced meanwhile would fill the cache with answers that no request can ask for.
        if is_final and shared.cache is not None and shared.registry.is_current(served):
            shared.cache.put(
                flight.started_ns, flight.key, served.info.digest, served.row_ns, outcome,
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
