"""Answers all rows of one request: one row goes its way by itself, many are run together.

Rows that the model must compute are run by one call of the model runner. A row is decided in the turn in which its
result is known (`_settled`), so that followers of early rows do not wait for late ones; a row gets a task of its own
only where it must wait for the cloud, for the disk or for the flight of another request.

Interleavings that the code guards against:
- The request is cancelled, or one of its rows fails: the tasks of the others are cancelled and awaited, and every flight
  that the request still leads is abandoned on the way out.
- A row settles, or a task ends, after another row of the request has failed, in the turn before its tasks are cancelled:
  the first error counts, and no task is started any more.
- Other requests have turns while the rows of this one are looked up: flights that it leads already wait for a moment
  longer, and flights that it joined may land, which their waiters note.
- Equal rows in one request: the first goes its way and the others take its outcome at the end. They never wait for
  a flight of their own request.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from edge_runtime.core.outcome import Outcome
from edge_runtime.serving.cascade import Ended, Pending
from edge_runtime.serving.in_flight import RowResult
from edge_runtime.serving.row_paths import RowPaths, Step, Todo, cancel_and_wait

#: Rows of one request are looked up for at most this long before others have the event loop for a turn.
_TURN_NS = 2_000_000


async def answer_rows(rows: RowPaths) -> list[Outcome]:
    """Return the outcome of each row. Raises the first error of a row: Refused, EngineFailed."""
    error: Exception | None
    try:
        if len(rows.questions) == 1:
            error = await _answer_one(rows)
        else:
            error = await _ManyRows(rows).answer()
    finally:
        rows.abandon()
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback holds this frame
    for index, first in rows.repeats.items():
        rows.outcomes[index] = rows.outcomes[first]
    return [outcome for outcome in rows.outcomes if outcome is not None]


async def _answer_one(rows: RowPaths) -> Exception | None:
    error = await rows.go_on(0, rows.look_up(0))
    if error is not None:
        rows.fail(0, error)
    return error


class _ManyRows:
    """The tasks of a request's rows, and when the last of them is done."""

    def __init__(self, rows: RowPaths) -> None:
        self._rows = rows
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open_rows = 0
        self._done: asyncio.Future[None] | None = None  # set while `answer` waits
        self._error: Exception | None = None

    async def answer(self) -> Exception | None:
        """Bring all rows to their outcomes; return the error of the first that fails instead."""
        rows = self._rows
        steps = []
        turn_ends_ns = time.monotonic_ns() + _TURN_NS
        for index in range(len(rows.questions)):
            steps.append((index, rows.look_up(index)))
            if (
                time.monotonic_ns() > turn_ends_ns
            ):  # keys of a thousand long texts must not hold the event loop
                await asyncio.sleep(0)
                turn_ends_ns = time.monotonic_ns() + _TURN_NS
        to_run = [index for index, step in steps if step is Todo.RUN]
        alone: list[tuple[int, Step]] = [(index, step) for index, step in steps if not isinstance(step, Todo)]
        if rows.reads_disk_first:  # then the model costs far more than a task for each row
            alone += [(index, Todo.RUN) for index in to_run]
            to_run = []
        self._open_rows = len(to_run) + len(alone)
        if not self._open_rows:
            return None
        self._done = self._loop.create_future()
        try:
            for index, step in alone:
                self._start(self._go_on(index, step), f"row-{index}")
            if to_run:
                self._start(self._run(to_run), "rows")
            await self._done
        finally:
            self._done = (
                None  # a cancel that passes here holds this frame, and the cancelled future holds the cancel
            )
            await cancel_and_wait(*self._tasks)
        error, self._error = self._error, None
        return error

    def _start(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() and self._done is not None:  # by none of us: its row will have no outcome
            self._done.cancel()

    async def _run(self, indices: list[int]) -> None:
        """Run rows as one request of the model runner."""
        rows, context = self._rows, self._rows.context
        try:
            await rows.served.runner.run_rows(
                [rows.questions[index] for index in indices],
                deadline_ns=context.deadline_ns,
                tenant=context.tenant,
                priority=context.priority,
                on_row=lambda at, result: self._settled(indices[at], result),
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this request alone
            self._stop(error)

    def _settled(self, index: int, result: RowResult) -> None:
        """Decide a row whose result is known. Called by the model runner, which serves others too: must not raise."""
        try:
            judged = self._rows.judge(result)
            if isinstance(judged, Ended):
                self._rows.end(index, judged)
                self._row_done()
            elif not isinstance(judged, Pending):
                self._fail(index, judged)
            elif self._error is None:
                self._start(self._go_on(index, judged), f"row-{index}")
        except Exception as error:  # noqa: BLE001 - a defect ends this request alone
            self._fail(index, error)

    async def _go_on(self, index: int, step: Step) -> None:
        """Bring one row to its outcome in a task of its own."""
        try:
            error = await self._rows.go_on(index, step)
        except Exception as defect:  # noqa: BLE001 - a defect ends this request alone
            error = defect
        if error is None:
            self._row_done()
        else:
            self._fail(index, error)

    def _row_done(self) -> None:
        self._open_rows -= 1
        if not self._open_rows:
            self._set_done()

    def _fail(self, index: int, error: Exception) -> None:
        self._rows.fail(index, error)
        self._stop(error)

    def _stop(self, error: Exception) -> None:
        """End the request with an error; the first one counts."""
        if self._error is None:
            self._error = error
        self._set_done()

    def _set_done(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
