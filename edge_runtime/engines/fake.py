"""An engine for tests that computes what it is told to. It is public: users of the runtime test with it too."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from edge_runtime.core.messages import Array, Row, Shapes
from edge_runtime.engines import Batch


class FakeBatch:
    """Input buffers of the fake engine; see `engines.Batch`."""

    def __init__(self, shapes: Shapes, rows: int, dtypes: Sequence[DTypeLike]) -> None:
        kinds = [*dtypes] * len(shapes) if len(dtypes) == 1 else dtypes
        self.inputs = [np.zeros((rows, *s), kind) for s, kind in zip(shapes, kinds, strict=True)]


class FakeEngine:
    """Runs `answer` on each row; fails, returns a wrong number of rows, or waits if it is told to.

    `dtypes` are those of the model's inputs; one stands for all of them. `batch_sizes` records the rows of each call.
    `fail_on` holds the numbers of calls, from 1, that raise `error`; `miscount` is added to the number of rows that are
    returned. While `gate` is an Event, each call first waits for it, and `entered` is set once a call waits, so that a
    test can keep the engine busy.
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
        dtypes: Sequence[DTypeLike] = (np.float32,),
    ) -> None:
        self.batch_sizes: list[int] = []
        self.entered = threading.Event()
        self.is_closed = False
        self.gate = gate
        self.miscount = miscount
        self._answer = answer
        self._dtypes = dtypes
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
        """Empty: it has no operators."""
        return frozenset()

    @property
    def name(self) -> str:
        """What runs the model."""
        return "fake"

    def bind(self, shapes: Shapes, rows: int) -> FakeBatch:
        """Return new buffers."""
        return FakeBatch(shapes, rows, self._dtypes)

    def run(self, batch: Batch) -> list[Array]:
        """Answer each row, unless it is told to fail."""
        assert not self.is_closed, "run after close"
        rows = list(zip(*batch.inputs, strict=True))
        self.batch_sizes.append(len(rows))
        if self.gate is not None:
            self.entered.set()
            self.gate.wait()
        if len(self.batch_sizes) in self._fail_on:
            raise self._error
        answers = [self._answer(row) for row in rows]
        answers = answers[: self.miscount] if self.miscount < 0 else answers + answers[:1] * self.miscount
        return [np.stack(column) for column in zip(*answers, strict=True)]

    def deny_batches(self) -> None:
        """Run single rows from now on."""
        self._is_batch_invariant = False

    def close(self) -> None:
        """Mark as closed."""
        self.is_closed = True
