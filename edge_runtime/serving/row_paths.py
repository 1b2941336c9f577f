"""The ways of a request's rows to their outcomes, each row by itself: memory, a flight, the disk, the model, the cloud.

    look_up ──┬── memory has it ─────────────────────────────────────────────────────► end
              ├── a flight of another request ── take ──┬── its outcome ─────────────► end
              │                                         └── the edge's answer, nothing ── look_up again
              ├── a flight of a less urgent request ── race: run beside it ─┐
              └── nothing: lead a flight ── disk? ── run ── judge ──────────┴─ conclude ── cloud? ──► end

Errors that a row may end with (Refused, EngineFailed) are values here and are raised in one place, by `request_rows`. An
exception that was raised holds the frames it passed, and a frame that holds the exception, or a future or a flight with
it, is a cycle that keeps the request's tensors until a garbage collection.

Interleavings that the code guards against:
- A flight lands between the look-up of a row and the start of its task: the row joined when it looked.
- A leader's time ends while the cloud is asked, and the follower's does not: the follower gets the edge's answer, looks
  again, and asks the cloud for itself; the other followers join it. If the follower's time ends then, it has that answer.
- A more urgent request runs a row that is in flight (`_race`), and that flight lands first: its own run is cancelled, which
  takes its row out of the queue, or leaves its place in a running batch empty.
- Both ask the cloud: whichever comes second finds the other's flight past the model, and waits for it (`_race`,
  `_conclude`). They cannot wait for each other: a flight is waited for only once its request has left `_race`.
- The model is replaced while the request runs: its outcomes are not kept, since no new request could ask for them.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from edge_runtime.caching.two_level import TwoLevelCache
from edge_runtime.core.caching.keys import KeyPrefix
from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused, refusal
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


class Todo(Enum):
    """What is to be done with a row that was looked up."""

    RUN = "run"
    NOTHING = "nothing"  # it has its outcome, or takes that of an equal row of this request


@dataclass(frozen=True, slots=True)
class Race:
    """The row is to be run beside the flight of a less urgent request, whose outcome may come first."""

    flight: Flight
    waiter: Waiter


#: What the look-up of a row says; a waiter is that of another request's flight.
Step: TypeAlias = Todo | Pending | Race | Waiter
#: What a row has come to: its outcome, what must be awaited, or the error that it ends with.
Judged: TypeAlias = Ended | Pending | Exception


class RowPaths:
    """The rows of one request on their ways. Rows are named by their index."""

    __slots__ = (
        "_cache", "_first", "_led", "_prefix", "context", "outcomes", "questions", "repeats", "served", "shared",
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
        self.shared, self.served, self.context, self.questions = shared, served, context, questions
        self._prefix = prefix
        self._cache = None if prefix is None else shared.cache
        self.outcomes: list[Outcome | None] = [None] * len(questions)
        self.repeats: dict[int, int] = {}  # rows that take the outcome of an equal row of this request
        self._first: dict[bytes, int] = {}  # the row that leads a key
        self._led: dict[int, Flight] = {}  # flights that this request leads

    @property
    def reads_disk_first(self) -> bool:
        """Whether the model costs so much that the disk is asked before it."""
        return self._cache is not None and self._cache.is_disk_worthwhile(self.served.row_ns)

    def abandon(self) -> None:
        """Let go of the flights that this request still leads; their followers look again."""
        for flight in self._led.values():
            self.shared.flights.abandon(flight)
        self._led.clear()

    def look_up(self, index: int) -> Step:
        """Answer a row from memory, or say what is to be done. A row that is to be run or finished leads its key."""
        cache, shared, context = self._cache, self.shared, self.context
        if cache is None or self._prefix is None:
            return Todo.RUN
        key = self._prefix.key(self.served.processor.canonical(self.questions[index]))
        statistics = self.served.runner.statistics
        looked_ns = time.monotonic_ns()
        found = cache.get(key)
        pending: Pending | None = None
        if found is not None:
            judged = shared.cascade.judge_cached(self.served, context, found)
            if isinstance(judged, Outcome):
                statistics.cache_hit.add(time.monotonic_ns() - looked_ns)
                statistics.queue.add(0)  # as Triton counts: load generators look for it
                self.outcomes[index] = judged
                return Todo.NOTHING
            pending = judged
        if key in self._first:
            shared.counters.coalesced += 1
            self.repeats[index] = self._first[key]
            return Todo.NOTHING
        flight = shared.flights.find(key)
        if flight is not None and not flight.would_delay(context.priority, context.deadline_ns):
            shared.counters.coalesced += 1
            return flight.join()
        statistics.cache_miss.add(time.monotonic_ns() - looked_ns)
        self._first[key] = index
        # By the clock of the cache: the answer will be kept with this age.
        led = self._led[index] = shared.flights.lead(
            key, cache.now_ns(), context.priority, context.deadline_ns
        )
        if pending is not None:
            led.awaits_model = False
            return pending
        return Todo.RUN if flight is None else Race(flight, flight.join())

    async def go_on(self, index: int, step: Step) -> Exception | None:
        """Bring one row to its outcome, by itself; return the error that it ends with instead."""
        answered: Pending | None = None  # the edge's answer, from a leader whose own time has ended
        while isinstance(step, asyncio.Future):
            taken = await self._take(step, answered)
            if isinstance(taken, Ended):
                self.end(index, taken)
                return None
            if isinstance(taken, Exception):
                return taken
            answered = taken or answered
            step = self.look_up(index)
        if step is Todo.NOTHING:
            return None
        led, earlier = self._led.get(index), None
        if led is not None and self._cache is not None:
            earlier = Earlier(self._cache, led.key, self.served.info.digest)
        judged: Judged
        if isinstance(step, Pending):
            judged = step
        elif answered is not None:
            judged = self._judge_again(answered)
        elif isinstance(step, Race):
            judged = await self._race(index, step, earlier)
        else:
            judged = await self._run_alone(index, earlier)
        return await self._conclude(index, judged, earlier)

    def judge(self, result: RowResult) -> Judged:
        """Decide about what the model runner says of a row."""
        judged = self.shared.cascade.judge(
            self.served, self.context, result, has_earlier=self._cache is not None
        )
        return Ended(judged) if isinstance(judged, Outcome) else judged

    def end(self, index: int, ended: Ended) -> None:
        """Note the outcome of a row, give it to its followers, and keep it if it is final."""
        shared, served, outcome = self.shared, self.served, ended.outcome
        self.outcomes[index] = outcome
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
                is_private=self.context.is_private,
            )  # fmt: skip

    def fail(self, index: int, error: Exception) -> None:
        """End the flight of a row that has no outcome. A refusal is this request's own: followers look again."""
        flight = self._led.pop(index, None)
        if flight is None:
            return
        if isinstance(error, Refused):
            self.shared.flights.abandon(flight)
        else:
            self.shared.flights.fail(flight, error)

    def _judge_again(self, answered: Pending) -> Ended | Pending:
        judged = self.shared.cascade.judge_again(self.served, self.context, answered)
        return Ended(judged) if isinstance(judged, Outcome) else judged

    async def _take(self, waiter: Waiter, answered: Pending | None) -> Judged | None:
        """Return what the flight of another request comes to; None where it was abandoned.

        Where the time ends before, the outcome is a degraded one of `answered`, the edge's answer, or a refusal.
        """
        patience_ns = self.context.deadline_ns - time.monotonic_ns()
        try:
            async with asyncio.timeout(patience_ns / 1e9):
                taken = await waiter
        except TimeoutError:
            if answered is None or answered.kept is None:
                return refusal(RefusalKind.LATE)
            return self.shared.cascade.give_up(self.served, answered)
        return Ended(taken) if isinstance(taken, Outcome) else taken

    async def _race(self, index: int, race: Race, earlier: Earlier | None) -> Judged:
        """Run a row that is more urgent than the flight it found, and take whichever result comes first.

        The flight may be done soon (its batch runs already), or late (it waits behind others): neither is known here.
        """
        waiter = race.waiter
        own = asyncio.get_running_loop().create_task(
            self._run_alone(index, earlier), name=f"urgent-row-{index}"
        )
        either: set[asyncio.Future[Any]] = {own, waiter}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            judged: Pending | None = None
            if own.done():
                result = own.result()
                if isinstance(result, Pending) and not race.flight.awaits_model:
                    judged = result  # the flight asks the cloud already
                elif not isinstance(result, Refused):
                    # From here on this request waits for nobody, and the leader may wait for it: said before the
                    # `finally`, which gives others a turn.
                    self._led[index].awaits_model = False
                    return result
            elif isinstance(waiter.result(), EngineFailed):
                return await own
            # The flight has landed, or asks the cloud, or is all that is left to a row that was refused.
            taken = await self._take(waiter, judged)
            if taken is None:
                return judged or await own
            self.shared.counters.coalesced += 1
            return self._judge_again(taken) if isinstance(taken, Pending) else taken
        finally:
            waiter.cancel()
            await cancel_and_wait(own)

    async def _run_alone(self, index: int, earlier: Earlier | None) -> Judged:
        """Answer a row from disk or by running it alone."""
        served, context = self.served, self.context
        if earlier is not None and self.reads_disk_first:
            found = await earlier.find()
            kept = None if found is None else self.shared.cascade.judge_cached(served, context, found)
            if kept is not None:
                return Ended(kept) if isinstance(kept, Outcome) else kept
        (result,) = await served.runner.run_rows(
            [self.questions[index]],
            deadline_ns=context.deadline_ns, tenant=context.tenant, priority=context.priority,
        )  # fmt: skip
        return self.judge(result)

    async def _conclude(self, index: int, judged: Judged, earlier: Earlier | None) -> Exception | None:
        """Await what is left to be awaited, and end the row; return the error that it ends with instead."""
        led = self._led.get(index)
        if led is not None:
            led.awaits_model = False
        while isinstance(judged, Pending) and judged.kept is not None and led is not None:
            other = self.shared.flights.find(led.key)
            if other is None or other is led or other.awaits_model:
                break
            # A more urgent request asks the cloud for this row already: one question is enough.
            taken = await self._take(other.join(), judged)
            judged = (
                self._judge_again(taken or judged) if taken is None or isinstance(taken, Pending) else taken
            )
        if isinstance(judged, Pending):
            judged = await self.shared.cascade.finish(
                self.served, self.context, self.questions[index], judged, earlier
            )
        if isinstance(judged, Ended):
            self.end(index, judged)
            return None
        return judged


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their ends, which come in a turn or two: none of them catches a cancel."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        # A task keeps the cancel that ended it until it is asked for, and the cancel keeps the frames of the task.
        with suppress(asyncio.CancelledError):
            task.exception()
