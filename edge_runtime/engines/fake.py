"""An engine for tests, public because users of the runtime need one too. It computes what it is told to."""

import threading
from collections.abc import Callable, Sequence

from edge_runtime.core.messages import Row


class FakeEngine:
    """Runs `answer` on each row and does as it is told: fails, miscounts, or waits.

    `batch_sizes` records the rows of every call. `fail_on` holds call numbers, from 1, that raise
    `error`; `miscount` is added to the number of rows returned; while `gate` is set to an Event, each call
    first waits for it (`entered` is set once a call waits), so that a test can hold the engine busy.
    """

    def __init__(
        self,
        answer: Callable[[Row], Row] = lambda row: row,
        *,
        max_batch: int = 64,
        is_batch_invariant: bool = True,
        fail_on: Sequence[int] = (),
        error: Exception | None = None,
        miscount: int = 0,
        gate: threading.Event | None = None,
    ) -> None:
        self.batch_sizes: list[int] = []
        self.entered = threading.Event()
        self.is_closed = False
        self.gate = gate
        self.miscount = miscount
        self._answer = answer
        self._max_batch = max_batch
        self._is_batch_invariant = is_batch_invariant
        self._fail_on = frozenset(fail_on)
        self._error = error if error is not None else RuntimeError("told to fail")

    @property
    def max_batch(self) -> int:
        """The most rows of one call."""
        return self._max_batch if self._is_batch_invariant else 1

    @property
    def is_batch_invariant(self) -> bool:
        """As given."""
        return self._is_batch_invariant

    @property
    def batch_unsafe(self) -> frozenset[str]:
        """None: it has no operators."""
        return frozenset()

    @property
    def name(self) -> str:
        """What runs the model."""
        return "fake"

    def run(self, rows: Sequence[Row]) -> list[Row]:
        """Answer each row, unless told otherwise."""
        assert not self.is_closed, "run after close"
        self.batch_sizes.append(len(rows))
        if self.gate is not None:
            self.entered.set()
            self.gate.wait()
        if len(self.batch_sizes) in self._fail_on:
            raise self._error
        answers = [self._answer(row) for row in rows]
        if self.miscount < 0:
            return answers[: self.miscount]
        return answers + answers[:1] * self.miscount

    def deny_batches(self) -> None:
        """Run single rows from now on."""
        self._is_batch_invariant = False

    def close(self) -> None:
        """Mark as closed."""
        self.is_closed = True
