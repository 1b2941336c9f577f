"""The asyncio driver of one model: batching core + its engines, shared by both tiers.

Everything decoded in one loop tick is submitted before the scheduler is asked once, so concurrent callers
share a batch without any window. A model faster than a thread hop runs on the loop itself; any other in a thread
for each of its engines. What goes wrong in a batch ends that batch alone and is counted; an engine that does not
return is replaced.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.messages import Answer, LatencyProfile, ModelStatistics, Row
from edge_runtime.core.scheduling.scheduler import NORMAL, Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.engines import Engine, StepEngine
from edge_runtime.processing import Processor
from edge_runtime.serving.engine_thread import EngineThread

_log = logging.getLogger(__name__)

#: A hop to a thread and back costs 30 to 275 microseconds, by how deeply the processor sleeps (`python -m
#: tools.bench_core`), so a batch of one that takes less is run where it is.
INLINE_LIMIT_NS = 200_000

#: Event loops round their timers up to this (epoll's time-out is in milliseconds, libuv's timers as well).
_TICK_NS = 1_000_000

_RENEWAL_S = 1.0  # before the second try, and twice as long before each further one
_RENEWALS = 8  # tries to load an engine for one that hangs, in some four minutes

#: What an engine returned for a batch, and when it began and ended.
_Ran = tuple[Sequence[Any], int, int]

_REFUSALS = {
    RefusalKind.FULL: "The queue is full; retry later or lower the rate.",
    RefusalKind.LATE: "The deadline leaves no time for the model; allow more time or retry later.",
    RefusalKind.QUOTA: "The quota is used up; retry later.",
    RefusalKind.CANCELLED: "The request was cancelled.",
    RefusalKind.DRAINING: "The runtime is shutting down; send the request elsewhere.",
}
#: When to come back where the scheduler cannot tell, since nothing was measured yet.
_RETRY_S = {RefusalKind.FULL: 1.0, RefusalKind.QUOTA: 1.0}


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and where its time went, in nanoseconds."""

    answer: Answer
    queue_ns: int
    infer_ns: int
    batch_rows: int


@dataclass(slots=True)
class _Member:
    question: bytes
    row: Row
    future: "asyncio.Future[Served]"
    submitted_ns: int
    partial: "Callable[[Answer], None] | None" = None  # told each step's output


@dataclass(slots=True)
class _Slot:
    """An engine, its thread (None: it runs on the loop), and the batches it has."""

    engine: Engine | StepEngine
    thread: EngineThread | None
    running: dict[int, tuple[Dispatch, asyncio.TimerHandle]] = field(default_factory=dict)
    hung: set[int] = field(default_factory=set)  # of them, those whose callers were told


def refusal(kind: RefusalKind, retry_after_ns: int | None = None) -> Refused:
    """The error a caller sees for a refusal of the scheduler."""
    if retry_after_ns is None:
        return Refused(kind, _REFUSALS[kind], _RETRY_S.get(kind))
    return Refused(kind, _REFUSALS[kind], retry_after_ns / 1e9)


class ModelRunner:
    """Runs rows of one model in batches. Create inside the running loop; end with `close`."""

    def __init__(
        self,
        name: str,
        processor: Processor,
        engines: "Engine | StepEngine | Sequence[Engine | StepEngine]",
        limits: QueueLimits | None = None,
        policy: Policy | None = None,
        *,
        latency_profile: LatencyProfile = (),
        depth: int = 1,
        is_inline: bool = False,
        is_stepwise: bool = False,
        hang_limit_s: float = 30.0,
        renew: "Callable[[], Engine | StepEngine] | None" = None,
    ) -> None:
        """Take ownership of the engines, which are alike; each is handed `depth` batches at a time.

        `latency_profile` is what batches were measured to cost. `is_inline` runs batches of the only engine on the event loop:
        right below INLINE_LIMIT_NS. `is_stepwise` says that they are StepEngines. `renew` loads another engine for one
        that has not returned within `hang_limit_s`; it is called in a thread.
        """
        limits = limits or QueueLimits()
        each = list(engines) if isinstance(engines, Sequence) else [engines]
        self.statistics = ModelStatistics()
        self._name, self._processor = name, processor
        self._scheduler = Scheduler(
            replace(limits, max_batch=min(limits.max_batch, *[engine.max_batch for engine in each])),
            replace(policy or Policy(), tick_ns=_TICK_NS),
            engines=[depth] * len(each),
            latency_profile=latency_profile,
        )
        self._slots = [
            _Slot(engine, None if is_inline else EngineThread(f"engine-{name}-{i}"))
            for i, engine in enumerate(each)
        ]
        self._loop = asyncio.get_running_loop()
        self._members: dict[int, _Member] = {}
        self._next_id = 0
        self._is_flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stepwise = is_stepwise
        self._hang_limit_s = hang_limit_s
        self._renew = renew
        self._renewals: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop itself."""
        return self._slots[0].thread is None

    @property
    def waiting(self) -> int:
        """Rows that wait for an engine."""
        return self._scheduler.waiting

    async def run(
        self, row: bytes, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> Answer:
        """Answer one row (canonical bytes from the processor). See `run_timed`."""
        return (await self.run_timed(row, deadline_ns=deadline_ns, tenant=tenant, priority=priority)).answer

    async def run_timed(
        self, row: bytes, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> Served:
        """Answer one row, batched with whoever else is waiting; of a step engine, the last of its outputs.

        `deadline_ns` is in `time.monotonic_ns` terms; `priority` is 0 (first) to 2. Raises Refused and EngineFailed.
        Cancelling the caller forgets this row alone.
        """
        request_id, member = self._submit(row, deadline_ns, tenant, priority)
        try:
            return await member.future
        except asyncio.CancelledError:
            self._forget(request_id)
            raise

    async def stream(
        self, row: bytes, *, deadline_ns: int | None = None, tenant: str = "", priority: int = NORMAL
    ) -> AsyncIterator[Answer]:
        """Yield what each step of a step engine says of one row. A caller that stops listening leaves the lane."""
        request_id, member = self._submit(row, deadline_ns, tenant, priority)
        told: asyncio.Queue[Answer | None] = asyncio.Queue()
        member.partial = told.put_nowait
        member.future.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (answer := await told.get()) is not None:
                yield answer
            member.future.result()
        finally:
            self._forget(request_id)

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
            self._settle(request_id, error=refusal(RefusalKind.DRAINING))
        for renewal in self._renewals:
            renewal.cancel()
        await asyncio.gather(*self._renewals, return_exceptions=True)
        for slot in self._slots:
            for _, watchdog in slot.running.values():
                watchdog.cancel()
            if slot.thread is None or not slot.running:
                slot.engine.close()
            else:  # after the batches it has; a hung engine is left to the end of the process
                slot.thread.submit(slot.engine.close)
            if slot.thread is not None:
                slot.thread.stop()

    def _submit(self, row: bytes, deadline_ns: int | None, tenant: str, priority: int) -> tuple[int, _Member]:
        started_ns = time.monotonic_ns()
        encoded = self._processor.encode(row)
        now_ns = time.monotonic_ns()
        self.statistics.compute_input.add(now_ns - started_ns)
        lane: Hashable = tuple([array.shape for array in encoded])
        request_id = self._next_id
        self._next_id += 1
        refused = self._scheduler.submit(
            now_ns,
            request_id,
            lane,
            size_bytes=sum([array.nbytes for array in encoded]),
            deadline_ns=deadline_ns,
            tenant=tenant,
            priority=priority,
        )
        if refused is not None:
            raise self._refusal(refused)
        member = self._members[request_id] = _Member(row, encoded, self._loop.create_future(), now_ns)
        self._idle.clear()
        self._flush_soon()
        return request_id, member

    def _refusal(self, refused: Refuse) -> Refused:
        kind, counts = refused.kind, self.statistics.refused
        counts[kind.value] = counts.get(kind.value, 0) + 1
        return refusal(kind, refused.retry_after_ns)

    def _forget(self, request_id: int) -> None:
        self._scheduler.cancel(request_id)
        self._members.pop(request_id, None)
        if not self._members:
            self._idle.set()

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Ask the scheduler until it has nothing more to do, then set the one timer it needs."""
        self._is_flush_due = False
        if self._is_closed:
            return
        while True:
            actions = self._scheduler.poll(time.monotonic_ns())
            if not actions:
                break
            for action in actions:
                if isinstance(action, Refuse):
                    self._settle(action.id, error=self._refusal(action))
                else:
                    self._start(action)
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
        slot = self._slots[batch.engine]
        engine = slot.engine
        rows = [self._members[request_id].row for request_id in batch.ids]

        def run() -> _Ran:
            started_ns = time.monotonic_ns()
            return engine.run(rows), started_ns, time.monotonic_ns()

        if slot.thread is None:
            try:
                ran = run()
            except Exception as error:  # noqa: BLE001 - whatever a model raises ends its own batch only
                self._give_up(batch, error, "raised")
            else:
                self._finish(batch, *ran)
            return

        def end_soon(ran: _Ran | None, error: BaseException | None) -> None:  # called in the engine's thread
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end, slot, batch, ran, error)

        # Batches that were handed to the engine before have their own time first.
        patience_s = self._hang_limit_s * (1 + len(slot.running))
        slot.running[batch.batch_id] = (batch, self._loop.call_later(patience_s, self._hang, slot, batch))
        slot.thread.submit(run, end_soon)

    def _end(self, slot: _Slot, batch: Dispatch, ran: _Ran | None, error: BaseException | None) -> None:
        running = slot.running.pop(batch.batch_id, None)
        if running is None:
            return  # of an engine that was given up on: its batches were failed and reported then
        running[1].cancel()
        if batch.batch_id in slot.hung:  # it came back before it was replaced
            slot.hung.remove(batch.batch_id)
            self._scheduler.batch_done(time.monotonic_ns(), batch.batch_id)
            if not slot.hung:
                self._scheduler.engine_up(batch.engine)
        elif ran is not None:
            self._finish(batch, *ran)
        else:
            self._give_up(batch, error, "raised")
        self._flush()

    def _hang(self, slot: _Slot, batch: Dispatch) -> None:
        """Answer the callers of a batch that takes too long; its engine gets nothing more until there is another."""
        self._fail(batch, TimeoutError(f"no answer within {self._hang_limit_s:g} s"), "hung")
        slot.hung.add(batch.batch_id)
        self._scheduler.engine_down(batch.engine)
        if self._renew is not None and not self._is_closed and len(slot.hung) == 1:
            renewal = self._loop.create_task(
                self._replace(slot, batch.engine, self._renew), name=f"renew-{self._name}"
            )
            self._renewals.add(renewal)
            renewal.add_done_callback(self._renewals.discard)

    async def _replace(self, slot: _Slot, index: int, renew: "Callable[[], Engine | StepEngine]") -> None:
        engine = None
        for attempt in range(_RENEWALS):
            try:
                engine = await asyncio.to_thread(renew)
                break
            except Exception as error:  # noqa: BLE001 - the old engine serves again, should it ever return
                _log.error("model=%s event=renewal_failed error=%r", self._name, error)
            await asyncio.sleep(_RENEWAL_S * 2**attempt)
            if not slot.hung:
                return
        if engine is None:
            return
        if not slot.hung:  # it came back meanwhile
            engine.close()
            return
        _log.warning("model=%s event=engine_replaced", self._name)
        self.statistics.replaced += 1
        self._slots[index] = _Slot(engine, EngineThread(f"engine-{self._name}-{index}"))
        if slot.thread is not None:
            slot.thread.submit(slot.engine.close)
            slot.thread.stop()
        for batch, watchdog in slot.running.values():
            watchdog.cancel()
            if batch.batch_id not in slot.hung:
                self._fail(batch, TimeoutError("its engine hung"), "hung")
            self._scheduler.batch_done(time.monotonic_ns(), batch.batch_id)
        slot.running.clear()
        self._scheduler.engine_up(index)
        self._flush()

    def _give_up(self, batch: Dispatch, error: BaseException | None, how: str) -> None:
        """Fail a batch that has ended, and report it done."""
        self._fail(batch, error, how)
        self._scheduler.batch_done(time.monotonic_ns(), batch.batch_id)

    def _fail(self, batch: Dispatch, error: BaseException | None, how: str) -> None:
        _log.error("model=%s event=batch_failed rows=%d error=%r", self._name, len(batch.ids), error)
        self.statistics.faults[how] = self.statistics.faults.get(how, 0) + 1
        for request_id in batch.ids:
            if request_id in self._members:
                self.statistics.failures.add(time.monotonic_ns() - self._members[request_id].submitted_ns)
            self._settle(request_id, error=EngineFailed("The model failed on this request."))

    def _finish(self, batch: Dispatch, outputs: Sequence[Any], started_ns: int, ended_ns: int) -> None:
        """Hand out what a batch returned, and report it done."""
        rows, statistics = len(batch.ids), self.statistics
        if len(outputs) != rows:
            self._give_up(batch, ValueError(f"{len(outputs)} rows returned for {rows}"), "miscounted")
            return
        infer_ns = ended_ns - started_ns
        statistics.executions += 1
        statistics.compute_infer.add(infer_ns, rows)
        statistics.batch_sizes[rows] = statistics.batch_sizes.get(rows, 0) + 1
        staying: set[int] = set()
        for request_id, output in zip(batch.ids, outputs, strict=True):
            member = self._members.get(request_id)
            if member is None:
                continue
            queue_ns = started_ns - member.submitted_ns
            statistics.queue.add(queue_ns)
            row, following = output if self._is_stepwise else (output, None)
            try:
                answer = self._processor.decode(row, member.question)
            except Exception as error:  # noqa: BLE001 - one undecodable row must not hurt its neighbours
                _log.error("model=%s event=decode_failed error=%r", self._name, error)
                self._settle(request_id, error=EngineFailed("The model's output could not be read."))
                continue
            if member.partial is not None:
                member.partial(answer)
            if following is None:
                self._settle(request_id, Served(answer, queue_ns, infer_ns, rows))
            else:
                member.row = following
                staying.add(request_id)
        now_ns = time.monotonic_ns()
        statistics.compute_output.add(now_ns - ended_ns, rows)
        self._scheduler.batch_done(now_ns, batch.batch_id, infer_ns, staying)

    def _settle(
        self, request_id: int, served: Served | None = None, *, error: Refused | EngineFailed | None = None
    ) -> None:
        member = self._members.pop(request_id, None)
        if member is not None and not member.future.done():
            if error is not None:
                member.future.set_exception(error)
            elif served is not None:
                member.future.set_result(served)
        if not self._members:
            self._idle.set()
