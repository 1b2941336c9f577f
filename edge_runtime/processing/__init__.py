"""Raw input -> tensors, tensors -> answer; a closed list of steps, versioned and parameterised by the bundle."""

from collections.abc import Sequence
from typing import Protocol

from edge_runtime.core.messages import Answer, Row, Signature, Tensor, TensorSpec


class Processor(Protocol):
    """What a task does before and after its model. Pure and thread-safe."""

    @property
    def signature(self) -> Signature:
        """Inputs and outputs as clients see them."""

    @property
    def version(self) -> str:
        """Changes whenever the same input could give another answer; part of every cache key."""

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """What the model must return, in this order, for `decode` to read; its own names do not matter."""

    @property
    def labels(self) -> tuple[bytes, ...] | None:
        """The labels an answer can begin with; None where the task has none."""

    def split(self, inputs: Sequence[Tensor]) -> list[bytes]:
        """Check a request's tensors and return the canonical bytes of each row.

        Equal bytes mean an equal question: they are the row's part of the cache key, and what `encode`
        starts from. Raises InvalidRequest with one sentence: missing or extra input, wrong datatype or
        shape, empty batch, text that is not UTF-8 or passes its limit.
        """

    def encode(self, row: bytes) -> Row:
        """Turn one row's canonical bytes into the model's input arrays, without the batch axis.

        Rows whose arrays agree in shape may share a batch: the shapes are the lane's bucket.
        """

    def decode(self, output: Row, row: bytes, /) -> Answer:
        """Turn one row of model outputs into an answer with its calibrated confidence.

        `row` is what `encode` was given: places in a text mean nothing without it.
        """
