"""The asyncio driver of one model: batching core + one engine, shared by both tiers.

Everything decoded in one loop tick is submitted before the scheduler is asked once, so concurrent
callers share a batch without any waiting window. A model faster than a thread hop runs on the loop
itself; any other in one engine thread.
"""

import asyncio
import logging
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edge_runtime.core.batching import Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.messages import Answer, ModelStatistics, Row
from edge_runtime.engines import Engine
from edge_runtime.processing import Processor

_log = logging.getLogger(__name__)

#: A hop to a thread and back costs 70-230 microseconds (measured on two x86-64 cores, idle to awake),
#: so a batch of one that takes less is run where it is.
INLINE_LIMIT_NS = 200_000

_REFUSALS = {
    RefusalKind.FULL: "The queue is full; retry later or lower the rate.",
    RefusalKind.LATE: "The deadline passed before the model could run; allow more time.",
    RefusalKind.QUOTA: "The quota is used up; retry later.",
    RefusalKind.CANCELLED: "The request was cancelled.",
    RefusalKind.DRAINING: "The runtime is shutting down; send the request elsewhere.",
}


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


def refusal(kind: RefusalKind, retry_after_s: float | None = None) -> Refused:
    """The error a caller sees for a refusal of the scheduler."""
    return Refused(kind, _REFUSALS[kind], retry_after_s)


class Lane:
    """Runs rows of one model in batches. Create inside the running loop; end with `close`."""

    def __init__(
        self,
        name: str,
        processor: Processor,
        engine: Engine,
        limits: QueueLimits | None = None,
        *,
        is_inline: bool = False,
        hang_limit_s: float = 30.0,
    ) -> None:
        """Take ownership of `engine`. `is_inline` runs batches on the event loop: right for engines below INLINE_LIMIT_NS."""
        limits = limits or QueueLimits()
        self.statistics = ModelStatistics()
        self._name = name
        self._processor = processor
        self._engine = engine
        self._scheduler = Scheduler(
            QueueLimits(min(limits.max_batch, engine.max_batch), limits.max_waiting, limits.max_waiting_bytes)
        )
        self._loop = asyncio.get_running_loop()
        self._members: dict[int, _Member] = {}
        self._next_id = 0
        self._is_flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._hang_limit_s = hang_limit_s
        self._thread: ThreadPoolExecutor | None = None
        self._is_closed = False
        if not is_inline:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{name}")

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop itself."""
        return self._thread is None

    @property
    def waiting(self) -> int:
        """Rows that wait for the engine."""
        return self._scheduler.waiting

    async def run(self, row: bytes, *, deadline_ns: int | None = None) -> Answer:
        """Answer one row (canonical bytes from the processor). See `run_timed`."""
        return (await self.run_timed(row, deadline_ns=deadline_ns)).answer

    async def run_timed(self, row: bytes, *, deadline_ns: int | None = None) -> Served:
        """Answer one row, batched with whoever else is waiting.

        `deadline_ns` is in `time.monotonic_ns` terms. Raises Refused and EngineFailed. Cancelling the
        caller forgets this row alone.
        """
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
        )
        if refused is not None:
            raise refusal(refused.kind, 1.0 if refused.kind is RefusalKind.FULL else None)
        future: asyncio.Future[Served] = self._loop.create_future()
        self._members[request_id] = _Member(row, encoded, future, now_ns)
        self._idle.clear()
        self._flush_soon()
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(request_id)
            raise

    async def drain(self) -> None:
        """Refuse new rows; return when every admitted one is answered."""
        self._scheduler.drain()
        await self._idle.wait()

    async def close(self) -> None:
        """Fail what is left, then free the engine once it is not running. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._scheduler.drain()
        if self._timer is not None:
            self._timer.cancel()
        for request_id in list(self._members):
            self._scheduler.cancel(request_id)
            self._settle(request_id, error=refusal(RefusalKind.DRAINING))
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if not self._scheduler.running_batches:  # a hung engine is left to the end of the process
            self._engine.close()

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
                    self._settle(action.id, error=refusal(action.kind))
                elif self._thread is None:
                    self._run_inline(action)
                else:
                    self._run_in_thread(action, self._thread)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup_ns = self._scheduler.next_wakeup_ns()
        if wakeup_ns is not None:
            delay_s = max(0, wakeup_ns - time.monotonic_ns()) / 1e9
            self._timer = self._loop.call_later(delay_s, self._flush_soon)

    def _rows_of(self, batch: Dispatch) -> list[Row]:
        return [self._members[request_id].row for request_id in batch.ids]

    def _run_inline(self, batch: Dispatch) -> None:
        started_ns = time.monotonic_ns()
        try:
            outputs = self._engine.run(self._rows_of(batch))
        except Exception as error:  # noqa: BLE001 - whatever a model raises ends its own batch only
            self._fail(batch, error)
        else:
            self._finish(batch, outputs, started_ns, time.monotonic_ns())
        self._scheduler.batch_done(batch.batch_id)

    def _run_in_thread(self, batch: Dispatch, thread: ThreadPoolExecutor) -> None:
        started_ns = time.monotonic_ns()
        rows = self._rows_of(batch)

        def run() -> tuple[Sequence[Row], int]:
            return self._engine.run(rows), time.monotonic_ns()

        watchdog = self._loop.call_later(self._hang_limit_s, self._fail_hung, batch)

        def end(done: "ThreadFuture[tuple[Sequence[Row], int]]") -> None:
            watchdog.cancel()
            error = done.exception()
            if error is not None:
                self._fail(batch, error)
            else:
                outputs, ended_ns = done.result()
                self._finish(batch, outputs, started_ns, ended_ns)
            self._scheduler.batch_done(batch.batch_id)
            if self._is_closed:
                self._engine.close()
            self._flush()

        def end_on_loop(done: "ThreadFuture[tuple[Sequence[Row], int]]") -> None:
            if not done.cancelled() and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(end, done)

        thread.submit(run).add_done_callback(end_on_loop)

    def _fail_hung(self, batch: Dispatch) -> None:
        """Answer the callers; the engine stays taken until its call returns, so queued rows run into their deadlines."""
        self._fail(batch, TimeoutError(f"no answer within {self._hang_limit_s:g} s"))

    def _fail(self, batch: Dispatch, error: BaseException) -> None:
        _log.error("model=%s event=batch_failed rows=%d error=%r", self._name, len(batch.ids), error)
        for request_id in batch.ids:
            if request_id in self._members:
                self.statistics.failures.add(time.monotonic_ns() - self._members[request_id].submitted_ns)
            self._settle(request_id, error=EngineFailed("The model failed on this request."))

    def _finish(self, batch: Dispatch, outputs: Sequence[Row], started_ns: int, ended_ns: int) -> None:
        rows = len(batch.ids)
        if len(outputs) != rows:
            self._fail(batch, ValueError(f"{len(outputs)} rows returned for {rows}"))
            return
        statistics = self.statistics
        infer_ns = ended_ns - started_ns
        statistics.executions += 1
        statistics.compute_infer.add(infer_ns, rows)
        statistics.batch_sizes[rows] = statistics.batch_sizes.get(rows, 0) + 1
        for request_id, output in zip(batch.ids, outputs, strict=True):
            member = self._members.get(request_id)
            if member is None:
                continue
            queue_ns = started_ns - member.submitted_ns
            statistics.queue.add(queue_ns)
            try:
                answer = self._processor.decode(output, member.question)
            except Exception as error:  # noqa: BLE001 - one undecodable row must not hurt its neighbours
                _log.error("model=%s event=decode_failed error=%r", self._name, error)
                self._settle(request_id, error=EngineFailed("The model's output could not be read."))
                continue
            self._settle(request_id, Served(answer, queue_ns, infer_ns, rows))
        statistics.compute_output.add(time.monotonic_ns() - ended_ns, rows)

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
