"""Runs the rows of one model in batches, on asyncio: scheduler + processor + engines. Both tiers use it unchanged.

Rows that are submitted in one turn of the event loop are queued before the scheduler is asked once, so concurrent
callers share a batch without any window. The scheduler decides; the supervisor has the engines and their threads. A
batch that fails ends its own rows alone, and is counted.

Ownership: a member is one row between its admission and its result. It belongs to the runner, in `_members`, under
the id that the scheduler knows. `_settle` and `_forget` take it out, and nothing else does. A request has one
future and as many members as rows; the future is set when its last member is settled.

Interleavings that the code guards against:

- A caller is cancelled while its row runs. The row keeps its place in the batch, so that its batch-mates notice nothing.
  When the batch ends, the id is no member any more, and `_settle` ignores its result.
- A caller is cancelled in the turn of the event loop in which its future was set. `_forget` then finds no members.
- A caller is cancelled, or the runner closes, while a request of many rows is submitted, which takes several turns. Its
  first rows are forgotten or refused; the later ones meet a request that has an exception, or a scheduler that drains.
- A batch hangs, and its engine returns much later. Its members were settled long before, and the supervisor reports the
  batch done; what it holds in the engine is released.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edge_runtime.core.errors import EngineFailed, RefusalKind, refusal
from edge_runtime.core.messages import Answer, LatencyProfile, ModelStatistics, Shapes
from edge_runtime.core.scheduling.scheduler import NORMAL, Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.processing import Processor, Question
from edge_runtime.serving.batch_run import BatchRun, Miscounted, row_failed, run_batch
from edge_runtime.serving.in_flight import (
    AnswerStream,
    Member,
    OnRow,
    Request,
    RowResult,
    Served,
    StepSequence,
    first_error,
)
from edge_runtime.serving.sequences import Sequences, with_open_states
from edge_runtime.serving.step_run import StepRun
from edge_runtime.serving.supervision import AnyEngine, Supervisor

_log = logging.getLogger(__name__)

#: A hop to a thread and back costs 30 to 275 microseconds, by how deeply the processor sleeps (`python -m
#: tools.bench_core`), so a batch of one that takes less is run where it is.
INLINE_LIMIT_NS = 200_000

#: Event loops round their timers up to this (epoll's time-out is in milliseconds, libuv's timers as well).
_TICK_NS = 1_000_000
#: What a batch costs the event loop outside the engine: to form it, to count it and to wake its callers.
_OVERHEAD_NS = 20_000
#: Rows of one request are submitted for at most this long before others have the event loop for a turn.
_SUBMIT_NS = 2_000_000

_FAILED = "The model failed on this request."
_NOBODY: Mapping[int, Shapes] = {}


class ModelRunner:
    """Runs rows of one model in batches. Create inside the running loop; end with `close`."""

    def __init__(
        self,
        name: str,
        processor: Processor,
        engines: "AnyEngine | Sequence[AnyEngine]",
        limits: QueueLimits | None = None,
        policy: Policy | None = None,
        *,
        latency_profile: LatencyProfile = (),
        depth: int = 1,
        is_inline: bool = False,
        is_stepwise: bool = False,
        hang_limit_s: float = 30.0,
        load_engine: "Callable[[], AnyEngine] | None" = None,
    ) -> None:
        """Take ownership of the engines, which are alike; each is handed `depth` batches at a time.

        `latency_profile` is what batches were measured to cost. `is_inline` runs batches of the only engine on the
        event loop: right below INLINE_LIMIT_NS. `is_stepwise` says that the only engine is a StepEngine.
        `load_engine` loads another engine for one that has not returned within `hang_limit_s`; it is called in a
        thread.
        """
        limits = limits or QueueLimits()
        each = list(engines) if isinstance(engines, Sequence) else [engines]
        if is_stepwise:
            if (len(each), depth) != (1, 1):
                raise ValueError(
                    "a model that runs in steps has one engine of depth 1: its state lies in that engine"
                )
            each[0], load_engine = with_open_states(each[0], load_engine)
        self.statistics = ModelStatistics()
        self._name, self._processor = name, processor
        self._scheduler = Scheduler(
            replace(limits, max_batch=min(limits.max_batch, *[engine.max_batch for engine in each])),
            replace(policy or Policy(), tick_ns=_TICK_NS, overhead_ns=_OVERHEAD_NS),
            engines=[depth] * len(each),
            latency_profile=latency_profile,
        )
        self._supervisor = Supervisor(
            name, each, self, is_inline=is_inline, hang_limit_s=hang_limit_s, load_engine=load_engine
        )
        self._loop = asyncio.get_running_loop()
        self._members: dict[int, Member] = {}
        self._sequences = Sequences(self._members, processor, self._supervisor) if is_stepwise else None
        self._next_id = 0
        self._is_flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop itself."""
        return self._supervisor.is_inline

    @property
    def waiting(self) -> int:
        """Rows that wait for an engine."""
        return self._scheduler.waiting

    async def run(
        self, row: Question, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> Answer:
        """Answer one row. See `run_timed`."""
        return (await self.run_timed(row, deadline_ns=deadline_ns, tenant=tenant, priority=priority)).answer

    async def run_timed(
        self, row: Question, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> Served:
        """Answer one row, batched with others that wait; of a step engine, the last of its answers.

        Raises Refused and EngineFailed. See `run_rows`.
        """
        (result,) = await self.run_rows([row], deadline_ns=deadline_ns, tenant=tenant, priority=priority)
        if isinstance(result, Served):
            return result
        try:
            raise result
        finally:
            del result  # its traceback holds this frame

    async def run_rows(
        self,
        rows: Sequence[Question],
        *,
        deadline_ns: int | None = None,
        tenant: str = "",
        priority: int = NORMAL,
        on_row: OnRow | None = None,
        is_all_or_nothing: bool = False,
    ) -> list[RowResult]:
        """Answer the rows of one request, as the processor split them; return what each came to.

        `deadline_ns` is in `time.monotonic_ns` terms; `priority` is 0 (first) to 2. `on_row` is called with the
        index and the result of each row as soon as it is known, on the event loop; it must not wait. With
        `is_all_or_nothing` the first error is raised and the other rows are forgotten. A cancelled caller forgets its
        own rows alone.
        """
        request = self._request(len(rows), deadline_ns, tenant, priority)
        request.on_row, request.is_all_or_nothing = on_row, is_all_or_nothing
        try:
            turn_ends_ns = time.monotonic_ns() + _SUBMIT_NS
            for index, row in enumerate(rows):
                now_ns = self._submit(request, index, row)
                if now_ns > turn_ends_ns:  # a thousand long texts must not hold the event loop
                    await asyncio.sleep(0)
                    turn_ends_ns = time.monotonic_ns() + _SUBMIT_NS
                if is_all_or_nothing and request.done.done():
                    break
            if request.open_rows:
                await request.done
            if is_all_or_nothing and (error := first_error(request.results)):
                try:
                    raise error
                finally:
                    del error
        except BaseException:
            self._forget(request)
            raise
        return [result for result in request.results if result is not None]

    async def stream(
        self, row: Question, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> AsyncIterator[Answer]:
        """Yield what each step of a step engine says of one row; of another engine, its one answer.

        A reader that stops listening frees the member. A slow reader pauses its own member alone: at
        STREAM_HIGH_WATER unread answers the member takes part in no further step until half of them are read. Raises
        Refused and EngineFailed, after the answers that came before.
        """
        request = self._request(1, deadline_ns, tenant, priority)
        stream = AnswerStream(lambda: self._resume(request.ids[0]))
        try:
            self._submit(request, 0, row, stream)
            while (answer := await stream.get()) is not None:
                yield answer
            if error := first_error(request.results):
                try:
                    raise error
                finally:
                    del error
        finally:
            self._forget(request)

    async def drain(self) -> None:
        """Refuse new rows; return when every admitted one is answered."""
        self._scheduler.drain()
        await self._idle.wait()

    async def close(self) -> None:
        """Refuse what is left as draining, then free each engine once it is not running. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._scheduler.drain()
        if self._timer is not None:
            self._timer.cancel()
        for request_id in list(self._members):
            self._scheduler.cancel(request_id)
            self._settle(request_id, refusal(RefusalKind.DRAINING))
        await self._supervisor.close()

    # Admission

    def _request(self, rows: int, deadline_ns: int | None, tenant: str, priority: int) -> Request:
        return Request(
            [None] * rows, self._loop.create_future(), deadline_ns, tenant, priority, open_rows=rows
        )

    def _submit(self, request: Request, index: int, row: Question, stream: AnswerStream | None = None) -> int:
        """Queue one row, or settle it at once; return the time."""
        started_ns = time.monotonic_ns()
        request_id = self._next_id
        self._next_id += 1
        member = self._members[request_id] = Member(request, index, None, started_ns)
        request.ids.append(request_id)
        self._idle.clear()
        if self._sequences is not None or stream is not None:
            member.sequence = StepSequence(stream)
        try:
            shapes, size_bytes, member.data = self._processor.prepare(row)
        except Exception as error:  # noqa: BLE001 - a processor may raise anything on one bad row
            self._settle(request_id, row_failed("The row could not be prepared", error))
            return started_ns
        now_ns = member.submitted_ns = time.monotonic_ns()
        self.statistics.compute_input.add(now_ns - started_ns, 0)  # the row is counted where it is encoded
        refused = self._scheduler.submit(
            now_ns, request_id, shapes,
            size_bytes=size_bytes, deadline_ns=request.deadline_ns,
            tenant=request.tenant, priority=request.priority,
        )  # fmt: skip
        if refused is None:
            self._flush_soon()
        else:
            self._refuse(refused)
        return now_ns

    def _refuse(self, refused: Refuse) -> None:
        kind, counts = refused.kind, self.statistics.refused
        counts[kind.value] = counts.get(kind.value, 0) + 1
        self._settle(refused.id, refusal(kind, refused.retry_after_ns))

    def _forget(self, request: Request) -> None:
        """Take out the rows of a request that are not settled: its caller has gone."""
        for request_id in request.ids:
            member = self._members.pop(request_id, None)
            if member is not None:
                self._scheduler.cancel(request_id)
                self._release(member)
        if not self._members:
            self._idle.set()

    def _release(self, member: Member) -> None:
        if self._sequences is not None and member.sequence is not None:
            self._sequences.release(member.sequence)

    def _resume(self, request_id: int) -> None:
        """Let a member that paused for its reader take part in steps again."""
        member = self._members.get(request_id)
        sequence = None if member is None else member.sequence
        if sequence is None or not sequence.is_paused:
            return
        assert sequence.next_step is not None, "a member pauses between two steps"
        sequence.is_paused = False
        self._scheduler.resume(time.monotonic_ns(), request_id, sequence.next_step.shapes)
        self._flush_soon()

    def _settle(self, request_id: int, result: RowResult) -> None:
        """Take a row out with its result; nothing where its caller has gone."""
        member = self._members.pop(request_id, None)
        if member is None:
            return
        member.request.settle(member.index, result)
        if member.sequence is not None:
            self._release(member)
            member.sequence.end(result.answer if isinstance(result, Served) else None)
        if not self._members:
            self._idle.set()

    # Running

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Start what the scheduler says, a bounded number of batches, then set the one timer it needs.

        Inline that is one batch. If more could start, the next turn of the event loop does it: sockets, timers and other
        models have theirs before, however long the queue or a sequence of steps is.
        """
        self._is_flush_due = False
        if self._is_closed:
            return
        now_ns = time.monotonic_ns()
        for action in self._scheduler.poll(now_ns):
            if isinstance(action, Refuse):
                self._refuse(action)
            else:
                self._start(action)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup_ns = self._scheduler.next_wakeup_ns()
        if wakeup_ns is None:
            return
        if wakeup_ns <= now_ns:
            self._flush_soon()
        else:
            delay_s = max(0, wakeup_ns - time.monotonic_ns()) / 1e9
            self._timer = self._loop.call_later(delay_s, self._flush_soon)

    def _start(self, batch: Dispatch) -> None:
        if self._sequences is not None:
            self._supervisor.start(batch, self._sequences.work(batch))
            return
        processor = self._processor
        shapes: Any = batch.lane
        data = [self._members[request_id].data for request_id in batch.ids]
        self._supervisor.start(batch, lambda engine: run_batch(engine, processor, shapes, data))

    # What the supervisor reports

    def batch_finished(self, batch: Dispatch, result: BatchRun | StepRun) -> None:
        """Hand out what a batch returned, and report it done."""
        staying: Mapping[int, Shapes] = _NOBODY
        paused: Collection[int] = ()
        if isinstance(result, StepRun) and self._sequences is not None:
            staying, paused = self._sequences.advance(batch, result)
        run = result.run if isinstance(result, StepRun) else result
        rows, infer_ns = len(batch.ids), run.inferred_ns - run.encoded_ns
        self._count(run, rows)
        for request_id, outcome in zip(batch.ids, run.results, strict=True):
            member = self._members.get(request_id)
            if member is None:
                continue
            queue_ns = run.started_ns - member.submitted_ns
            self.statistics.queue.add(queue_ns)
            if isinstance(outcome, EngineFailed):
                _log.error("model=%s event=row_failed error=%r", self._name, outcome.__cause__ or outcome)
                self._settle(request_id, outcome)
            elif request_id not in staying and request_id not in paused:
                self._settle(request_id, Served(outcome, queue_ns, infer_ns, rows))
        self._scheduler.batch_done(
            time.monotonic_ns(), batch.batch_id, run.ended_ns - run.started_ns, staying, paused
        )

    def batch_failed(self, batch: Dispatch, error: BaseException, how: str) -> None:
        """Answer the callers of a batch that has no answers."""
        how = "miscounted" if isinstance(error, Miscounted) else how
        # As text: a record that a log handler keeps must not keep the frames of the batch.
        _log.error("model=%s event=batch_failed rows=%d error=%s", self._name, len(batch.ids), repr(error))
        self.statistics.faults[how] = self.statistics.faults.get(how, 0) + 1
        for request_id in batch.ids:
            if request_id in self._members:
                self.statistics.failures.add(time.monotonic_ns() - self._members[request_id].submitted_ns)
            self._settle(request_id, EngineFailed(_FAILED))

    def batch_left(self, batch: Dispatch, result: BatchRun | StepRun | None = None) -> None:
        """Report a failed batch done. `result` is what a hung one returned; the states it opened are released."""
        if isinstance(result, StepRun) and self._sequences is not None:
            self._sequences.note_opened(batch, result)
        self._scheduler.batch_done(time.monotonic_ns(), batch.batch_id)

    def engine_down(self, engine: int) -> None:
        """Hand the engine nothing."""
        self._scheduler.engine_down(engine)

    def engine_up(self, engine: int, *, is_new: bool) -> None:
        """Hand the engine batches again. Sequences whose state lay in the engine before it end as failed."""
        if is_new:
            self.statistics.replaced += 1
            for request_id, member in list(self._members.items()):
                if member.sequence is not None and member.sequence.handle is not None:
                    self._scheduler.cancel(request_id)
                    self._settle(request_id, EngineFailed(_FAILED))
        self._scheduler.engine_up(engine)

    def _count(self, run: BatchRun, rows: int) -> None:
        statistics = self.statistics
        statistics.executions += 1
        statistics.compute_input.add(run.encoded_ns - run.started_ns, rows)
        statistics.compute_infer.add(run.inferred_ns - run.encoded_ns, rows)
        statistics.compute_output.add(run.ended_ns - run.inferred_ns, rows)
        statistics.batch_sizes[rows] = statistics.batch_sizes.get(rows, 0) + 1
