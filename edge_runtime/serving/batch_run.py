"""One batch on one engine, from the rows' data to their answers. Blocking; called in an engine's thread or inline.

Encoding and decoding happen beside the run, straight into and out of the engine's buffers: between them nothing
is copied, and what the engine returns is read before its next call can overwrite it.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Array, Row, Shapes
from edge_runtime.engines import Engine, Step, StepEngine
from edge_runtime.processing import Processor

_UNREADABLE = "The model's output could not be read."


class BatchRun(NamedTuple):
    """What a batch came to: an answer or an error for each row, and when each part of the work ended.

    `following` has the input of each row's next step (None: the row has ended); it is empty for engines that
    have no steps. Times are of `time.monotonic_ns`.
    """

    results: Sequence[Answer | EngineFailed]
    started_ns: int
    encoded_ns: int
    inferred_ns: int
    ended_ns: int
    following: Sequence[Row | None] = ()


class Miscounted(Exception):  # noqa: N818 - the fact it states
    """The engine returned another number of rows than it was given."""


def run_batch(engine: Engine, processor: Processor, shapes: Shapes, batch: Sequence[Any]) -> BatchRun:
    """Run rows of equal `shapes`, given as the data that `Processor.prepare` returned.

    Raises Miscounted, and whatever the engine raises: then no row has an answer.
    """
    started_ns = time.monotonic_ns()
    bound = engine.bind(shapes, len(batch))
    failed = _encode(processor, batch, bound.inputs)
    encoded_ns = time.monotonic_ns()
    outputs = engine.run(bound)
    inferred_ns = time.monotonic_ns()
    for output in outputs:
        if len(output) != len(batch):
            raise Miscounted(f"{len(output)} rows returned for {len(batch)}")
    results: list[Answer | EngineFailed] = [*_decode(processor, outputs, batch)]
    for i, error in failed.items():
        results[i] = error
    return BatchRun(results, started_ns, encoded_ns, inferred_ns, time.monotonic_ns())


def _encode(processor: Processor, batch: Sequence[Any], buffers: Sequence[Array]) -> dict[int, EngineFailed]:
    """Write the rows into the buffers; return the error of each row that could not be written.

    A row that raises must not fail its batch-mates, so after an error each row is written alone.
    """
    try:
        processor.encode_batch(batch, buffers)
    except Exception:  # noqa: BLE001 - a processor may raise anything on one bad row
        return _encode_each(processor, batch, buffers)
    return {}


def _encode_each(
    processor: Processor, batch: Sequence[Any], buffers: Sequence[Array]
) -> dict[int, EngineFailed]:
    failed = {}
    for i, data in enumerate(batch):
        one = [buffer[i : i + 1] for buffer in buffers]
        try:
            processor.encode_batch([data], one)
        except Exception as error:  # noqa: BLE001 - see `_encode`
            failed[i] = EngineFailed(f"The row could not be encoded ({type(error).__name__}).")
            for buffer in one:
                buffer[...] = 0
    return failed


def _decode(
    processor: Processor, outputs: Sequence[Array], batch: Sequence[Any]
) -> Sequence[Answer | EngineFailed]:
    """Read every row; after an error each row alone, so that one unreadable row fails alone."""
    try:
        return processor.decode_batch(outputs, batch)
    except Exception:  # noqa: BLE001 - a processor may raise anything on one bad row
        return [_decode_one(processor, [o[i : i + 1] for o in outputs], data) for i, data in enumerate(batch)]


def _decode_one(processor: Processor, outputs: Sequence[Array], data: Any) -> Answer | EngineFailed:
    try:
        return processor.decode_batch(outputs, [data])[0]
    except Exception as error:  # noqa: BLE001 - see `_decode`
        failed = EngineFailed(_UNREADABLE)
        failed.__cause__ = error
        return failed


class StepMember(NamedTuple):
    """A member of a step: its handle (None before its first step), the row of this step, its data."""

    handle: int | None
    row: Row
    data: Any


class StepRun(NamedTuple):
    """What a step came to; `opened` has the handle of each member whose first step it was, by its index."""

    run: BatchRun
    opened: Mapping[int, int]


def run_step(engine: StepEngine, processor: Processor, members: Sequence[StepMember]) -> StepRun:
    """Run one step; the state of new members is opened first. A member that cannot be opened fails alone.

    Raises Miscounted, and whatever the engine raises in `step`, after the release of what was opened here: nobody
    else knows these handles.
    """
    started_ns = time.monotonic_ns()
    opened, failed = _open(engine, members)
    encoded_ns = time.monotonic_ns()
    live = [i for i in range(len(members)) if i not in failed]
    handles = [opened[i] if (known := members[i].handle) is None else known for i in live]
    try:
        steps = _step(engine, handles, [members[i].row for i in live])
    except BaseException:
        for handle in opened.values():
            engine.release(handle)
        raise
    inferred_ns = time.monotonic_ns()
    results: list[Answer | EngineFailed] = []
    following: list[Row | None] = []
    returned = iter(steps)
    for i, member in enumerate(members):
        if i in failed:
            results.append(failed[i])
            following.append(None)
            continue
        output, row = next(returned)
        results.append(_decode_one(processor, [np.asarray(array)[None] for array in output], member.data))
        following.append(row if isinstance(results[i], Answer) else None)
    run = BatchRun(results, started_ns, encoded_ns, inferred_ns, time.monotonic_ns(), following)
    return StepRun(run, opened)


def _open(
    engine: StepEngine, members: Sequence[StepMember]
) -> tuple[dict[int, int], dict[int, EngineFailed]]:
    """Open the state of members without one; return handles and errors by index."""
    opened: dict[int, int] = {}
    failed: dict[int, EngineFailed] = {}
    for i, member in enumerate(members):
        if member.handle is not None:
            continue
        try:
            opened[i] = engine.open(member.row)
        except Exception as error:  # noqa: BLE001 - whatever a model raises ends its own member only
            failed[i] = EngineFailed("The model could not take in this request.")
            failed[i].__cause__ = error
    return opened, failed


def _step(engine: StepEngine, handles: Sequence[int], rows: Sequence[Row]) -> Sequence[Step]:
    steps = engine.step(handles, rows) if handles else ()
    if len(steps) != len(handles):
        raise Miscounted(f"{len(steps)} members returned for {len(handles)}")
    return steps
