"""Blocking model runners behind one small Protocol. Engines know rows and buffers, never requests or time."""

from collections.abc import Sequence
from typing import Protocol

from edge_runtime.core.messages import Row


class Engine(Protocol):
    """Runs one model. Not thread-safe: one lane owns it and calls it from one thread at a time."""

    @property
    def max_batch(self) -> int:
        """The most rows of one call; 1 where a neighbour would change a row's answer."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's answer never depends on its neighbours."""

    @property
    def batch_unsafe(self) -> frozenset[str]:
        """Operators of the model which compute over all rows of a batch."""

    @property
    def name(self) -> str:
        """What runs the model: "onnxruntime", "litert", "fake"."""

    def run(self, rows: Sequence[Row]) -> list[Row]:
        """Run 1..max_batch rows whose arrays agree in shape and dtype; return one output row per row.

        Returned arrays are copies the caller may keep. Raises EngineFailed, or whatever the model raises.
        """

    def deny_batches(self) -> None:
        """Run single rows from now on: a test has shown that neighbours change answers."""

    def close(self) -> None:
        """Free the model. Idempotent; `run` must not be called afterwards."""


class StepEngine(Protocol):
    """Runs one step of many members at a time: iterations of a decoder, chunks of a stream.

    As `Engine`, but `run` returns for each row what this step says of it, and the row of its next step: None
    ends the member. All that a member carries from step to step is in its row.
    """

    @property
    def max_batch(self) -> int:
        """The most members of one step."""

    def run(self, rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
        """Run one step of 1..max_batch members; return (partial output, next row) for each."""

    def close(self) -> None:
        """Free the model. Idempotent; `run` must not be called afterwards."""
