"""Raw input -> tensors, tensors -> answer; a closed list of steps, versioned and parameterised by the bundle."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from edge_runtime.core.messages import Answer, Array, InferReply, Row, Shapes, Signature, Tensor, TensorSpec

#: One row of a request as its processor keeps it. Only the processor that made it reads it.
Question = Any


class PreparedRow(NamedTuple):
    """A row that is ready to wait for its batch.

    `shapes` are those of its input arrays, without the batch axis: rows of equal shapes may share a batch.
    `size_bytes` is what the row takes while it waits. `data` is what `encode_batch` and `decode_batch` work from.
    """

    shapes: Shapes
    size_bytes: int
    data: Any


class Encoder(Protocol):
    """Rows -> the model's input arrays: the part of a processor that its featuriser does."""

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the model inputs that `encode_batch` writes, in the model's order."""

    def prepare(self, question: Question, /) -> PreparedRow:
        """Do what must be known of one row before it can join a batch: its shapes and its size."""

    def encode_batch(self, batch: Sequence[Any], buffers: Sequence[Array]) -> None:
        """Write the `data` of rows of equal shapes into `buffers`, one array `[rows, ...]` for each model input.

        Every element is written: the buffers hold what an earlier batch left there.
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
        """Changes whenever the same input could give another answer; part of every cache key."""

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """What the model must return, in this order, for `decode_batch` to read; its own names do not matter."""

    @property
    def labels(self) -> tuple[bytes, ...] | None:
        """The labels an answer can begin with; None where the task has none."""

    @property
    def fusion_version(self) -> str | None:
        """The version of the cloud's model that `fuse` was fitted for; None where it was fitted for none."""

    def split(self, inputs: Sequence[Tensor]) -> list[Question]:
        """Check a request's tensors and return its rows.

        Raises InvalidRequest with one sentence: missing or extra input, wrong datatype or shape, empty batch,
        text that is not UTF-8 or passes its limit.
        """

    def canonical(self, question: Question) -> bytes:
        """Return the bytes of one row for the cache key. Equal bytes mean an equal question, and only those do."""

    def decode_batch(self, outputs: Sequence[Array], batch: Sequence[Any]) -> list[Answer]:
        """Turn model outputs `[rows, ...]` into one answer with its calibrated confidence for each row of `batch`.

        The outputs are the engine's buffers; an answer owns its bytes.
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
