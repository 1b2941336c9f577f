"""The asyncio driver of one model: scheduler + processor + engines, shared by both tiers.

Everything submitted in one turn of the event loop is queued before the scheduler is asked once, so concurrent
callers share a batch without any window. A model faster than a thread hop runs on the loop itself; any other in a
thread for each of its engines. What goes wrong in a batch ends that batch alone and is counted.

Ownership: a member is one row between its admission and its result. It belongs to this runner, in `_members`,
under the id the scheduler knows; `_settle` takes it out, whatever happened, and nothing else does. A request has
one future and as many members as rows; the future is set when the last member is settled.

Interleavings that the code guards against:
- A caller is cancelled while its row runs. The row keeps its place in the batch, so that its neighbours notice
  nothing, and its result finds no member any more (`_settle` of an unknown id does nothing).
- A caller is cancelled in the same turn in which its future was set. `_forget` then finds no members.
- A batch hangs and its engine returns much later. Its members were settled long before; only what it holds in the
  engine is released.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused, refusal
from edge_runtime.core.messages import Answer, LatencyProfile, ModelStatistics, Row, Shapes
from edge_runtime.core.scheduling.scheduler import NORMAL, Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.engines import StepEngine
from edge_runtime.processing import Processor, Question, encode_rows
from edge_runtime.serving.batch_run import BatchRun, Miscounted, StepMember, StepRun, run_batch, run_step
from edge_runtime.serving.supervision import AnyEngine, Supervisor

_log = logging.getLogger(__name__)

#: A hop to a thread and back costs 30 to 275 microseconds, by how deeply the processor sleeps (`python -m
#: tools.bench_core`), so a batch of one that takes less is run where it is.
INLINE_LIMIT_NS = 200_000

#: Event loops round their timers up to this (epoll's time-out is in milliseconds, libuv's timers as well).
_TICK_NS = 1_000_000
#: Rows of one request are submitted for at most this long before others have the event loop for a turn.
_SUBMIT_NS = 2_000_000
#: Answers of a stream that may wait for its reader; at the mark the member stops until half of them are read.
STREAM_HIGH_WATER = 16


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and where its time went, in nanoseconds."""

    answer: Answer
    queue_ns: int
    infer_ns: int
    batch_rows: int


#: What one row came to. Errors are values: a request's rows fail each on its own.
RowResult = Served | Refused | EngineFailed


@dataclass(slots=True)
class _Request:
    """One call: its rows' results by index, and the future that is set with the last of them."""

    results: list[RowResult | None]
    open_rows: int
    done: "asyncio.Future[None]"
    ids: list[int] = field(default_factory=list)
    on_row: "Callable[[int, RowResult], None] | None" = None
    is_all_or_nothing: bool = False


@dataclass(slots=True)
class _Member:
    """One admitted row."""

    request: _Request
    index: int
    data: Any  # what the processor encodes and decodes from
    submitted_ns: int
    sequence: "_Sequence | None" = None  # of a member that runs in steps


@dataclass(slots=True)
class _Sequence:
    """What a member in steps has beside: where its state lies, the input of its next step, its reader."""

    row: Row
    size_bytes: int
    deadline_ns: int | None
    tenant: str
    priority: int
    home: StepEngine | None = None  # the engine that holds the state under `handle`
    handle: int | None = None
    stream: "_Stream | None" = None
    is_paused: bool = False


class _Stream:
    """Answers between a member and its reader, with a high-water mark."""

    def __init__(self, resume: Callable[[], None]) -> None:
        self._resume = resume
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()

    @property
    def is_full(self) -> bool:
        """Whether the member must stop until the reader has caught up."""
        return self._answers.qsize() >= STREAM_HIGH_WATER

    def put(self, answer: Answer | None) -> None:
        """Add an answer, or None at the end."""
        self._answers.put_nowait(answer)

    async def get(self) -> Answer | None:
        """Take the next answer; None at the end."""
        answer = await self._answers.get()
        if self._answers.qsize() == STREAM_HIGH_WATER // 2:
            self._resume()
        return answer


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
        if is_stepwise and (len(each), depth) != (1, 1):
            raise ValueError(
                "a model that runs in steps has one engine of depth 1: its state lies in that engine"
            )
        self.statistics = ModelStatistics()
        self._name, self._processor = name, processor
        self._scheduler = Scheduler(
            replace(limits, max_batch=min(limits.max_batch, *[engine.max_batch for engine in each])),
            replace(policy or Policy(), tick_ns=_TICK_NS),
            engines=[depth] * len(each),
            latency_profile=latency_profile,
        )
        self._supervisor = Supervisor(
            name, each, self, is_inline=is_inline, hang_limit_s=hang_limit_s, load_engine=load_engine
        )
        self._loop = asyncio.get_running_loop()
        self._members: dict[int, _Member] = {}
        self._next_id = 0
        self._is_flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stepwise = is_stepwise
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
        """Answer one row, batched with others that wait; of a step engine, the last of its outputs.

        Raises Refused and EngineFailed. See `run_rows`.
        """
        (result,) = await self.run_rows([row], deadline_ns=deadline_ns, tenant=tenant, priority=priority)
        if isinstance(result, Served):
            return result
        raise result

    async def run_rows(
        self,
        rows: Sequence[Question],
        *,
        deadline_ns: int | None = None,
        tenant: str = "",
        priority: int = NORMAL,
        on_row: Callable[[int, RowResult], None] | None = None,
        is_all_or_nothing: bool = False,
    ) -> list[RowResult]:
        """Answer the rows of one request, as the processor split them; return what each came to.

        `deadline_ns` is in `time.monotonic_ns` terms; `priority` is 0 (first) to 2. `on_row` is called with the
        index and the result of each row as soon as it is known, and must not raise. With `is_all_or_nothing` the first
        error is raised and the other rows are forgotten. A cancelled caller forgets its own rows alone.
        """
        request = _Request(
            [None] * len(rows), len(rows), self._loop.create_future(), on_row=on_row,
            is_all_or_nothing=is_all_or_nothing,
        )  # fmt: skip
        try:
            turn_ns = time.monotonic_ns() + _SUBMIT_NS
            for index, row in enumerate(rows):
                now_ns = self._submit(request, index, row, deadline_ns, tenant, priority)
                if now_ns > turn_ns:  # a thousand long texts must not hold the event loop
                    await asyncio.sleep(0)
                    turn_ns = time.monotonic_ns() + _SUBMIT_NS
            if request.open_rows or is_all_or_nothing:
                await request.done
        except BaseException:
            self._forget(request)
            raise
        return [result for result in request.results if result is not None]

    async def stream(
        self, row: Question, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> AsyncIterator[Answer]:
        """Yield what each step of a step engine says of one row.

        A reader that stops listening frees the member. A slow reader stops its own member alone: at
        STREAM_HIGH_WATER unread answers it takes part in no further step until half of them are read.
        Raises Refused and EngineFailed, after the answers that came before.
        """
        request = _Request([None], 1, self._loop.create_future())
        stream = _Stream(lambda: self._resume(request))
        request.on_row = lambda _index, _result: stream.put(None)
        try:
            self._submit(request, 0, row, deadline_ns, tenant, priority, stream)
            while (answer := await stream.get()) is not None:
                yield answer
            (result,) = request.results
            if isinstance(result, Refused | EngineFailed):
                raise result
        finally:
            self._forget(request)

    async def drain(self) -> None:
        """Refuse new rows; return when every admitted one is answered."""
        self._scheduler.drain()
        await self._idle.wait()

    async def close(self) -> None:
        """Fail what is left, then free each engine once it is not running. Idempotent."""
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

    def _submit(
        self,
        request: _Request,
        index: int,
        row: Question,
        deadline_ns: int | None,
        tenant: str,
        priority: int,
        stream: _Stream | None = None,
    ) -> int:
        """Queue one row, or settle it as refused; return the time."""
        started_ns = time.monotonic_ns()
        shapes, size_bytes, data = self._processor.prepare(row)
        now_ns = time.monotonic_ns()
        self.statistics.compute_input.add(now_ns - started_ns, 0)  # counted once, where the row is encoded
        sequence = None
        if self._is_stepwise:
            (first,) = encode_rows(self._processor, [row])
            sequence = _Sequence(first, size_bytes, deadline_ns, tenant, priority, stream=stream)
        request_id = self._next_id
        self._next_id += 1
        self._members[request_id] = _Member(request, index, data, now_ns, sequence)
        request.ids.append(request_id)
        self._enqueue(now_ns, request_id, shapes, size_bytes, deadline_ns, tenant, priority)
        return now_ns

    def _enqueue(
        self,
        now_ns: int,
        request_id: int,
        shapes: Shapes,
        size_bytes: int,
        deadline_ns: int | None,
        tenant: str,
        priority: int,
    ) -> None:
        refused = self._scheduler.submit(
            now_ns, request_id, shapes,
            size_bytes=size_bytes, deadline_ns=deadline_ns, tenant=tenant, priority=priority,
        )  # fmt: skip
        self._idle.clear()
        if refused is not None:
            self._settle(request_id, self._refusal(refused))
        else:
            self._flush_soon()

    def _refusal(self, refused: Refuse) -> Refused:
        kind, counts = refused.kind, self.statistics.refused
        counts[kind.value] = counts.get(kind.value, 0) + 1
        return refusal(kind, refused.retry_after_ns)

    def _forget(self, request: _Request) -> None:
        """Take the rows of a request out that are not settled: its caller has gone."""
        for request_id in request.ids:
            member = self._members.pop(request_id, None)
            if member is not None:
                self._scheduler.cancel(request_id)
                self._release(member)
        if not self._members:
            self._idle.set()

    def _settle(self, request_id: int, result: RowResult) -> None:
        """Take a row out with its result; nothing where its caller has gone."""
        member = self._members.pop(request_id, None)
        if member is None:
            return
        self._release(member)
        request = member.request
        request.results[member.index] = result
        request.open_rows -= 1
        if request.on_row is not None:
            request.on_row(member.index, result)
        if not request.done.done():
            if request.is_all_or_nothing and not isinstance(result, Served):
                request.done.set_exception(result)
            elif not request.open_rows:
                request.done.set_result(None)
        if not self._members:
            self._idle.set()

    # Running

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Start what the scheduler says, then set the one timer it needs.

        Inline, one round of batches is a turn of the event loop: sockets, timers and other models have theirs
        before the next round, however long the queue or a sequence of steps is.
        """
        self._is_flush_due = False
        if self._is_closed:
            return
        while actions := self._scheduler.poll(time.monotonic_ns()):
            for action in actions:
                if isinstance(action, Refuse):
                    self._settle(action.id, self._refusal(action))
                else:
                    self._start(action)
            if self.is_inline and self._scheduler.waiting:
                self._flush_soon()
                break
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup_ns = self._scheduler.next_wakeup_ns()
        if wakeup_ns is not None:
            delay_s = max(0, wakeup_ns - time.monotonic_ns()) / 1e9
            self._timer = self._loop.call_later(delay_s, self._flush_soon)

    def _start(self, batch: Dispatch) -> None:
        processor = self._processor
        if self._is_stepwise:
            members = self._step_members(batch)
            self._supervisor.start(batch, lambda engine: run_step(engine, processor, members))
            return
        data = [self._members[request_id].data for request_id in batch.ids]
        shapes: Any = batch.lane
        self._supervisor.start(batch, lambda engine: run_batch(engine, processor, shapes, data))

    # What the supervisor reports

    def batch_finished(self, batch: Dispatch, result: BatchRun | StepRun) -> None:
        """Hand out what a batch returned, and report it done."""
        run = result.run if isinstance(result, StepRun) else result
        rows, statistics = len(batch.ids), self.statistics
        infer_ns = run.inferred_ns - run.encoded_ns
        statistics.executions += 1
        statistics.compute_input.add(run.encoded_ns - run.started_ns, rows)
        statistics.compute_infer.add(infer_ns, rows)
        statistics.compute_output.add(run.ended_ns - run.inferred_ns, rows)
        statistics.batch_sizes[rows] = statistics.batch_sizes.get(rows, 0) + 1
        if isinstance(result, StepRun):
            self._keep_handles(batch, result)
        staying: dict[int, Shapes] = {}
        for i, (request_id, outcome) in enumerate(zip(batch.ids, run.results, strict=True)):
            member = self._members.get(request_id)
            if member is None:
                continue
            queue_ns = run.started_ns - member.submitted_ns
            statistics.queue.add(queue_ns)
            if isinstance(outcome, EngineFailed):
                _log.error("model=%s event=row_failed error=%r", self._name, outcome.__cause__ or outcome)
                self._settle(request_id, outcome)
            elif run.following and (following := run.following[i]) is not None:
                if self._goes_on(member, outcome, following):
                    staying[request_id] = tuple([array.shape for array in following])
            else:
                if member.sequence is not None and member.sequence.stream is not None:
                    member.sequence.stream.put(outcome)
                self._settle(request_id, Served(outcome, queue_ns, infer_ns, rows))
        self._scheduler.batch_done(
            time.monotonic_ns(), batch.batch_id, run.ended_ns - run.started_ns, staying
        )

    def batch_failed(self, batch: Dispatch, error: BaseException, how: str) -> None:
        """Answer the callers of a batch that has no answers."""
        how = "miscounted" if isinstance(error, Miscounted) else how
        _log.error("model=%s event=batch_failed rows=%d error=%r", self._name, len(batch.ids), error)
        self.statistics.faults[how] = self.statistics.faults.get(how, 0) + 1
        for request_id in batch.ids:
            if request_id in self._members:
                self.statistics.failures.add(time.monotonic_ns() - self._members[request_id].submitted_ns)
            self._settle(request_id, EngineFailed("The model failed on this request."))

    def batch_left(self, batch: Dispatch, result: BatchRun | StepRun | None = None) -> None:
        """Report a failed batch done; what it holds in the engine is released."""
        if isinstance(result, StepRun):
            self._keep_handles(batch, result)
        self._scheduler.batch_done(time.monotonic_ns(), batch.batch_id)

    def engine_down(self, engine: int) -> None:
        """Hand the engine nothing."""
        self._scheduler.engine_down(engine)

    def engine_up(self, engine: int, *, is_new: bool) -> None:
        """Hand the engine batches again; sequences whose state lay in the engine before it end as failed."""
        if is_new:
            self.statistics.replaced += 1
            for request_id, member in list(self._members.items()):
                if member.sequence is not None and member.sequence.home is not None:
                    self._scheduler.cancel(request_id)
                    self._settle(request_id, EngineFailed("The model failed on this request."))
        self._scheduler.engine_up(engine)

    # Sequences

    def _step_members(self, batch: Dispatch) -> list[StepMember]:
        members = []
        for request_id in batch.ids:
            member = self._members[request_id]
            assert member.sequence is not None
            members.append(StepMember(member.sequence.handle, member.sequence.row, member.data))
        return members

    def _keep_handles(self, batch: Dispatch, result: StepRun) -> None:
        """Note where the state of new members lies; release that of members whose callers went during the step.

        A member that had a handle before the step was released by `_forget`, with the caller.
        """
        engine: Any = self._supervisor.engine(batch.engine)
        for i, handle in result.opened.items():
            member = self._members.get(batch.ids[i])
            if member is not None and member.sequence is not None:
                member.sequence.home, member.sequence.handle = engine, handle
            else:
                self._release_handle(batch.engine, engine, handle)

    def _goes_on(self, member: _Member, answer: Answer, following: Row) -> bool:
        """Pass a partial answer on; return whether the member takes part in the next step."""
        sequence = member.sequence
        assert sequence is not None
        sequence.row = following
        if sequence.stream is None:
            return True
        sequence.stream.put(answer)
        sequence.is_paused = sequence.stream.is_full
        return not sequence.is_paused

    def _resume(self, request: _Request) -> None:
        """Let a member that waited for its reader take part in steps again."""
        for request_id in request.ids:
            member = self._members.get(request_id)
            if member is None or member.sequence is None or not member.sequence.is_paused:
                continue
            sequence = member.sequence
            sequence.is_paused = False
            # The scheduler has seen this id leave, and takes no id twice.
            del self._members[request_id]
            again = self._next_id
            self._next_id += 1
            request.ids.append(again)
            self._members[again] = member
            shapes = tuple([array.shape for array in sequence.row])
            now_ns = time.monotonic_ns()
            self._enqueue(
                now_ns,
                again,
                shapes,
                sequence.size_bytes,
                sequence.deadline_ns,
                sequence.tenant,
                sequence.priority,
            )
            return

    def _release(self, member: _Member) -> None:
        sequence = member.sequence
        if sequence is not None and sequence.home is not None and sequence.handle is not None:
            self._release_handle(0, sequence.home, sequence.handle)
            sequence.handle = None

    def _release_handle(self, index: int, engine: StepEngine, handle: int) -> None:
        def release() -> None:
            try:
                engine.release(handle)
            except Exception as error:  # noqa: BLE001 - whatever a model raises; nobody waits for this
                _log.error("model=%s event=release_failed error=%r", self._name, error)

        self._supervisor.call(index, engine, release)
