"""What runs a model: blocking engines behind two small Protocols. An engine knows rows, and no requests or deadlines."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Array, Row, Shapes


class Batch(Protocol):
    """The input buffers of one batch, to be filled and then run."""

    @property
    def inputs(self) -> Sequence[Array]:
        """One array `[rows, ...]` for each model input, in the model's dtype. Every row must be written."""


class Engine(Protocol):
    """Runs one model. Not thread-safe: one model runner owns it and calls it from one thread at a time."""

    @property
    def max_batch(self) -> int:
        """The most rows of one call; 1 where a neighbour would change a row's answer."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's answer never depends on its neighbours."""

    @property
    def batch_unsafe(self) -> frozenset[str]:
        """Operators of the model that compute over all rows of a batch."""

    @property
    def name(self) -> str:
        """The runtime: "onnxruntime", "litert", "fake"."""

    def bind(self, shapes: Shapes, rows: int) -> Batch:
        """Return the buffers of a batch of 1..max_batch `rows` whose arrays have `shapes`.

        The buffers belong to the engine and hold what an earlier batch left there; they are valid until the
        next call of `bind`. Raises EngineFailed for shapes that do not fit the model.
        """

    def run(self, batch: Batch) -> Sequence[Array]:
        """Run a batch whose buffers were filled; return one array `[rows, ...]` for each model output.

        The arrays may be the engine's own buffers: they are valid until its next call, and a caller that keeps
        a row copies it. Raises EngineFailed, or whatever the model raises.
        """

    def deny_batches(self) -> None:
        """Run single rows from now on, because a test has shown that neighbours change answers."""

    def close(self) -> None:
        """Free the model. Idempotent; no other method may be called afterwards."""


class Step(NamedTuple):
    """The result of one step for one member: its output, and the input of its next step (None: it has ended)."""

    output: Row
    following: Row | None


class StepEngine(Protocol):
    """Runs one step of many members at a time: iterations of a decoder, chunks of a stream.

    A member's state (a key-value cache, a recurrent state) stays in the engine under a handle from `open` to
    `release`; a row carries only what is new in its step. Methods are called from one thread at a time.
    """

    @property
    def max_batch(self) -> int:
        """The most members of one step."""

    def open(self, row: Row) -> int:
        """Reserve the state of a new member whose first row is `row`; return its handle. Raises EngineFailed."""

    def step(self, handles: Sequence[int], rows: Sequence[Row]) -> Sequence[Step]:
        """Run one step of 1..max_batch members whose rows have equal shapes; return the result for each."""

    def release(self, handle: int) -> None:
        """Free the state of a member, however it ended. Called exactly once for each handle."""

    def close(self) -> None:
        """Free the model. Idempotent; no other method may be called afterwards."""


def run_rows(engine: Engine, rows: Sequence[Row]) -> list[Row]:
    """Run rows of equal shapes that exist as arrays; return copies of their outputs. For tools and self-tests.

    Raises EngineFailed where the rows do not fit the model.
    """
    if not rows:
        raise EngineFailed("the engine got 0 rows; it takes at least 1")
    batch = engine.bind(tuple(array.shape for array in rows[0]), len(rows))
    for at, target in enumerate(batch.inputs):
        for i, row in enumerate(rows):
            if row[at].dtype != target.dtype or row[at].shape != target.shape[1:]:
                raise EngineFailed(
                    f"input {at} of the model is {target.dtype} {list(target.shape[1:])} per row, "
                    f"and row {i} is {row[at].dtype} {list(row[at].shape)}"
                )
            target[i] = row[at]
    outputs = [np.array(output) for output in engine.run(batch)]
    return list(zip(*outputs, strict=True))
