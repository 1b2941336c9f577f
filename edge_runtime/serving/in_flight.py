"""What is in flight in a model runner: requests and their rows, what each row came to, and who reads it meanwhile."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edge_runtime.core.errors import EngineFailed, Refused
from edge_runtime.core.messages import Answer
from edge_runtime.engines.open_states import OpenStates
from edge_runtime.serving.step_run import NextStep

_log = logging.getLogger(__name__)

#: Answers of a stream that may wait for its reader. At the mark the member pauses until half of them are read: the
#: reader can fall behind by a few network packets before the model notices, and a stream holds kilobytes at most.
STREAM_HIGH_WATER = 16


class Served(NamedTuple):
    """The answer of a row and where its time went, in nanoseconds."""

    answer: Answer
    queue_ns: int
    infer_ns: int
    batch_rows: int


#: What one row came to. Errors are values: the rows of a request fail each on its own.
RowResult = Served | Refused | EngineFailed
#: Called with the index of a row and its result.
OnRow = Callable[[int, RowResult], None]


@dataclass(slots=True)
class Request:
    """One call of the runner. `done` is set with the last result, or with the first error of `is_all_or_nothing`."""

    results: list[RowResult | None]
    done: "asyncio.Future[None]"
    deadline_ns: int | None
    tenant: str
    priority: int
    on_row: OnRow | None = None
    is_all_or_nothing: bool = False
    open_rows: int = 0
    ids: list[int] = field(default_factory=list)

    def settle(self, index: int, result: RowResult) -> None:
        """Note the result of one row."""
        self.results[index] = result
        self.open_rows -= 1
        if self.on_row is not None:
            _call(self.on_row, index, result)
        is_over = not self.open_rows or (self.is_all_or_nothing and not isinstance(result, Served))
        # Done already: its caller was cancelled in this turn of the event loop, or an earlier row failed.
        if is_over and not self.done.done():
            self.done.set_result(None)


class AnswerStream:
    """Answers between a member and its reader, with a high-water mark. `resume` is called when half of them are read."""

    def __init__(self, resume: Callable[[], None]) -> None:
        self._resume = resume
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()

    @property
    def is_full(self) -> bool:
        """Whether the member must pause until the reader has caught up."""
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


@dataclass(slots=True)
class StepSequence:
    """What a member in steps has beside its request.

    `next_step` is None before the first step, whose row is encoded beside the step. From the end of the first step on
    `engine` holds the state, under `handle`.
    """

    stream: AnswerStream | None = None
    next_step: NextStep | None = None
    engine: OpenStates | None = None
    handle: int | None = None
    is_paused: bool = False

    def advance(self, answer: Answer, following: NextStep) -> bool:
        """Pass on the answer of a step; return whether the member takes part in the next one now."""
        self.next_step = following
        if self.stream is not None:
            self.stream.put(answer)
            self.is_paused = self.stream.is_full
        return not self.is_paused

    def end(self, answer: Answer | None) -> None:
        """Pass on the last answer, None where an error ends the member, and the end of the stream."""
        if self.stream is not None:
            if answer is not None:
                self.stream.put(answer)
            self.stream.put(None)


@dataclass(slots=True)
class Member:
    """One admitted row. `data` is what the processor encodes and decodes from; `sequence` is for step engines."""

    request: Request
    index: int
    data: Any
    submitted_ns: int
    sequence: StepSequence | None = None


def first_error(results: Sequence[RowResult | None]) -> Refused | EngineFailed | None:
    """The error of the first row that has one."""
    for result in results:
        if isinstance(result, Refused | EngineFailed):
            return result
    return None


def _call(on_row: OnRow, index: int, result: RowResult) -> None:
    """Tell a caller of one row. Its defect must not end the batch that the rows of others are in."""
    try:
        on_row(index, result)
    except Exception:  # noqa: BLE001 - whatever a caller's code raises; it is logged
        _log.exception("event=row_callback_failed")
