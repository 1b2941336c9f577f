"""One step of a step engine, from its members to their answers. Blocking; called in the engine's thread or inline."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Row, Shapes
from edge_runtime.engines import Step
from edge_runtime.engines.open_states import OpenStates
from edge_runtime.processing import Encoder, Processor
from edge_runtime.serving.batch_run import BatchRun, Miscounted, decode, encode, row_failed


class StepMember(NamedTuple):
    """A member of a step. `handle` and `row` are None in its first step, in which its `data` is encoded."""

    handle: int | None
    row: Row | None
    data: Any


class NextStep(NamedTuple):
    """The input of a member's next step, and its shapes: the lane in which the member waits for it."""

    row: Row
    shapes: Shapes


class StepRun(NamedTuple):
    """What a step came to. `following` has the next step of each member, None for a member that has ended.

    `opened` has the handle of each member whose first step it was, by its index.
    """

    run: BatchRun
    following: Sequence[NextStep | None]
    opened: Mapping[int, int]


class _Ready(NamedTuple):
    handle: int
    row: Row


def run_step(
    engine: OpenStates, processor: Processor, shapes: Shapes, members: Sequence[StepMember]
) -> StepRun:
    """Run one step of members whose rows have `shapes`. A member that cannot be encoded, opened or read fails alone.

    Raises Miscounted, and whatever the engine raises in `step`: then no member has an answer, and the states that were
    opened here are released, because nobody else knows their handles.
    """
    started_ns = time.monotonic_ns()
    entered = [_enter(engine, processor, shapes, member) for member in members]
    ready = {i: member for i, member in enumerate(entered) if isinstance(member, _Ready)}
    opened = {i: member.handle for i, member in ready.items() if members[i].handle is None}
    encoded_ns = time.monotonic_ns()
    try:
        steps = dict(zip(ready, _step(engine, list(ready.values())), strict=True))
    except BaseException:
        for handle in opened.values():
            engine.release(handle)
        raise
    inferred_ns = time.monotonic_ns()
    results: list[Answer | EngineFailed] = []
    following: list[NextStep | None] = []
    for i, member in enumerate(members):
        failed = entered[i]
        result, next_step = (
            (failed, None) if isinstance(failed, EngineFailed) else _read(processor, steps[i], member)
        )
        results.append(result)
        following.append(next_step)
    return StepRun(
        BatchRun(results, started_ns, encoded_ns, inferred_ns, time.monotonic_ns()), following, opened
    )


def _enter(
    engine: OpenStates, processor: Encoder, shapes: Shapes, member: StepMember
) -> _Ready | EngineFailed:
    """The handle and the row of a member; for its first step the row is encoded and its state opened."""
    if member.handle is not None and member.row is not None:
        return _Ready(member.handle, member.row)
    buffers = [np.empty((1, *s), d) for s, d in zip(shapes, processor.input_dtypes, strict=True)]
    if failed := encode(processor, [member.data], buffers):
        return failed[0]
    row = tuple([buffer[0] for buffer in buffers])
    try:
        return _Ready(engine.open(row), row)
    except Exception as error:  # noqa: BLE001 - whatever a model raises here ends its own member only
        return row_failed("The model could not take in this request", error)


def _step(engine: OpenStates, ready: Sequence[_Ready]) -> Sequence[Step]:
    if not ready:
        return ()
    steps = engine.step([member.handle for member in ready], [member.row for member in ready])
    if len(steps) != len(ready):
        raise Miscounted(f"{len(steps)} members returned for {len(ready)}")
    return steps


def _read(
    processor: Processor, step: Step, member: StepMember
) -> tuple[Answer | EngineFailed, NextStep | None]:
    """The answer of a step, and what follows; a member whose output cannot be read ends here."""
    try:
        output, row = step
        (result,) = decode(processor, [np.asarray(array)[None] for array in output], [member.data])
        following = None if row is None else NextStep(row, tuple([array.shape for array in row]))
    except Exception as error:  # noqa: BLE001 - whatever a model returned is for its own member only
        return row_failed("The model's output could not be read", error), None
    return result, following if isinstance(result, Answer) else None
