"""What happens to a request before and after its model: tensors of clients to rows, rows to answers.

The kinds of processing are a closed list; a bundle names a kind and its version, and gives its parameters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from edge_runtime.core.messages import Answer, Array, InferReply, Row, Shapes, Signature, Tensor, TensorSpec

#: One row of a request as its processor keeps it. Nobody else looks into it.
Question = Any


class PreparedRow(NamedTuple):
    """A row that is ready to wait for its batch.

    `shapes` are those of its input arrays, without the batch axis: rows of equal shapes may share a batch.
    `size_bytes` is the memory that the row takes while it waits. `encode_batch` and `decode_batch` work from `data`.
    """

    shapes: Shapes
    size_bytes: int
    data: Any


class Encoder(Protocol):
    """Turns rows into the model's input arrays: the part of a processor that a featuriser does."""

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the model inputs that `encode_batch` writes, in the model's order."""

    def prepare(self, question: Question, /) -> PreparedRow:
        """Compute what the scheduler must know of a row before it can join a batch. Called on the event loop."""

    def encode_batch(self, batch: Sequence[Any], buffers: Sequence[Array]) -> None:
        """Write the `data` of rows of equal shapes into `buffers`, one array `[rows, ...]` for each model input.

        Every element must be written: the buffers hold what an earlier batch left there.
        """


class Processor(Encoder, Protocol):
    """What a task does before and after its model. Pure and thread-safe.

    A request is split into rows when it arrives; a row is prepared when it is submitted to the scheduler, and
    encoded with its batch, straight into the engine's buffers, when the batch runs. A row that is answered from
    the cache is neither prepared nor encoded.
    """

    @property
    def signature(self) -> Signature:
        """Inputs and outputs as clients see them."""

    @property
    def version(self) -> str:
        """A text that changes whenever an equal input could give another answer; part of every cache key."""

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that `decode_batch` reads, in this order; the model's own names of them do not matter."""

    @property
    def labels(self) -> tuple[bytes, ...] | None:
        """The values that the first output can have; None where the task has no labels."""

    @property
    def fusion_version(self) -> str | None:
        """The version of the cloud's model that `fuse` was fitted for; None where answers are not fused."""

    def split(self, inputs: Sequence[Tensor]) -> list[Question]:
        """Check a request's tensors and return its rows.

        Raises InvalidRequest with one sentence: missing or extra input, wrong datatype or shape, empty batch,
        text that is not UTF-8 or passes its limit.
        """

    def canonical(self, question: Question) -> bytes:
        """Return the bytes of one row for the cache key: two rows have equal bytes if and only if they are equal."""

    def decode_batch(self, outputs: Sequence[Array], batch: Sequence[Any]) -> list[Answer]:
        """Turn model outputs `[rows, ...]` into one answer with its calibrated confidence for each row of `batch`.

        The outputs are the engine's buffers, which the next batch overwrites. An answer must own its bytes: a view would
        keep the memory of the whole batch, too.
        """

    def tensors(self, question: Question) -> tuple[Tensor, ...]:
        """Return the request tensors of one row: the inverse of `split`, for asking the cloud tier."""

    def read(self, reply: InferReply, *, with_extras: bool) -> Answer:
        """Read the cloud's reply to one row; `with_extras` also its outputs on request.

        Raises InvalidRequest for a reply that does not fit this task's signature and labels.
        """

    def fuse(self, edge: Answer, cloud: Answer) -> Answer:
        """Return one answer from both tiers' evidence; both carry their extras. See `fusion_version`.

        Raises InvalidRequest where the cloud's evidence contradicts its own answer.
        """


def encode_rows(encoder: Encoder, questions: Sequence[Question]) -> list[Row]:
    """Return the model's input arrays of each row, without the batch axis. For tools and self-tests."""
    rows = []
    for question in questions:
        shapes, _, data = encoder.prepare(question)
        buffers = [np.empty((1, *s), d) for s, d in zip(shapes, encoder.input_dtypes, strict=True)]
        encoder.encode_batch([data], buffers)
        rows.append(tuple(buffer[0] for buffer in buffers))
    return rows


def decode_rows(processor: Processor, outputs: Sequence[Row], questions: Sequence[Question]) -> list[Answer]:
    """Return the answer of each row from its model outputs without the batch axis. For tools and self-tests."""
    return [
        processor.decode_batch([array[None] for array in output], [processor.prepare(question).data])[0]
        for output, question in zip(outputs, questions, strict=True)
    ]
