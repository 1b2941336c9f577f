"""One batch on one engine, from the data of its rows to their answers. Blocking; called in an engine's thread or inline.

Encoding and decoding happen beside the run, straight into and out of the engine's buffers: nothing is copied in
between, and the outputs are read before the next call can overwrite them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Array, Shapes
from edge_runtime.engines import Engine
from edge_runtime.processing import Encoder, Processor


class BatchRun(NamedTuple):
    """What a batch came to: an answer or an error for each row, and when each part of the work ended.

    Times are of `time.monotonic_ns`.
    """

    results: Sequence[Answer | EngineFailed]
    started_ns: int
    encoded_ns: int
    inferred_ns: int
    ended_ns: int


class Miscounted(Exception):  # noqa: N818 - the fact it states
    """The engine returned another number of rows than it was given."""


_NONE_FAILED: Mapping[int, EngineFailed] = {}


def run_batch(engine: Engine, processor: Processor, shapes: Shapes, batch: Sequence[Any]) -> BatchRun:
    """Run rows of equal `shapes`, given as the data that `Processor.prepare` returned.

    Raises Miscounted, and whatever the engine raises: then no row has an answer.
    """
    started_ns = time.monotonic_ns()
    bound = engine.bind(shapes, len(batch))
    failed = encode(processor, batch, bound.inputs)
    encoded_ns = time.monotonic_ns()
    outputs = engine.run(bound)
    inferred_ns = time.monotonic_ns()
    for output in outputs:
        if len(output) != len(batch):
            raise Miscounted(f"{len(output)} rows returned for {len(batch)}")
    results = decode(processor, outputs, batch)
    if failed:
        results = [failed.get(i, result) for i, result in enumerate(results)]
    return BatchRun(results, started_ns, encoded_ns, inferred_ns, time.monotonic_ns())


def encode(encoder: Encoder, batch: Sequence[Any], buffers: Sequence[Array]) -> Mapping[int, EngineFailed]:
    """Write the rows into the buffers; return the error of each row that could not be written, by its index.

    A row that raises must not fail its batch-mates. After an error each row is therefore written alone, and the row
    that raises is left zero.
    """
    try:
        encoder.encode_batch(batch, buffers)
    except Exception:  # noqa: BLE001 - a processor may raise anything on one bad row
        return _encode_each(encoder, batch, buffers)
    return _NONE_FAILED


def _encode_each(
    encoder: Encoder, batch: Sequence[Any], buffers: Sequence[Array]
) -> Mapping[int, EngineFailed]:
    failed = {}
    for i, data in enumerate(batch):
        row = [buffer[i : i + 1] for buffer in buffers]
        try:
            encoder.encode_batch([data], row)
        except Exception as error:  # noqa: BLE001 - as above
            failed[i] = row_failed("The row could not be encoded", error)
            for buffer in row:
                buffer[...] = 0
    return failed


def decode(
    processor: Processor, outputs: Sequence[Array], batch: Sequence[Any]
) -> Sequence[Answer | EngineFailed]:
    """Read the answers of all rows; after an error each row alone, so that only the row that raises fails."""
    try:
        answers = processor.decode_batch(outputs, batch)
    except Exception:  # noqa: BLE001 - a processor may raise anything on one bad row
        answers = []
    if len(answers) == len(batch):
        return answers
    return [_decode_row(processor, [o[i : i + 1] for o in outputs], data) for i, data in enumerate(batch)]


def _decode_row(processor: Processor, outputs: Sequence[Array], data: Any) -> Answer | EngineFailed:
    try:
        (answer,) = processor.decode_batch(outputs, [data])
    except Exception as error:  # noqa: BLE001 - as above
        return row_failed("The model's output could not be read", error)
    return answer


def row_failed(what: str, error: Exception) -> EngineFailed:
    """The error of one row, whose cause is kept for the log.

    Without its traceback: that holds the frames and the buffers of the batch, in a cycle that only the garbage
    collector would free.
    """
    failed = EngineFailed(f"{what} ({type(error).__name__}).")
    failed.__cause__ = error.with_traceback(None)
    error.__context__ = None
    return failed
