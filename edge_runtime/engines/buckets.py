"""What engines with prepared buffers share: one set per row shape and prepared size, checks of rows, zeroed padding.

Subclasses know a runtime; this module knows none.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import Array, Row

#: Row shapes whose buffers are kept; a client that sends ever new shapes must not grow memory.
_MAX_BUCKETS = 16

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A model input or output. `batch` is None for an open batch axis; so are open lengths in `shape` after it."""

    name: str
    dtype: np.dtype[Any]
    batch: int | None
    shape: tuple[int | None, ...]


@dataclass(slots=True)
class Buffers:
    """Input arrays of one batch size. Of their rows, `used` may hold something else than zero."""

    inputs: list[Array]
    used: int

    def fill(self, rows: Sequence[Row]) -> None:
        """Copy the rows in; what an earlier batch left behind them becomes zero."""
        for at, target in enumerate(self.inputs):
            for i, row in enumerate(rows):
                target[i] = row[at]
            if self.used > len(rows):
                target[len(rows) : self.used] = 0
        self.used = len(rows)


B = TypeVar("B", bound=Buffers)


class BucketedEngine(ABC, Generic[B]):
    """An engine but for the runtime: `_bind` prepares buffers, `_execute` runs them. See `engines.Engine`."""

    def __init__(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        *,
        max_batch: int,
        is_batch_invariant: bool,
        batch_unsafe: frozenset[str] = frozenset(),
    ) -> None:
        """Batches are forced to 1 where a batch axis is fixed or neighbours matter."""
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._batch_unsafe = batch_unsafe
        self._is_batch_invariant = is_batch_invariant and not batch_unsafe
        is_open = all(port.batch is None for port in (*inputs, *outputs))
        self._max_batch = max_batch if self._is_batch_invariant and is_open else 1
        self._buckets: OrderedDict[Shapes, dict[int, B]] = OrderedDict()

    @property
    def max_batch(self) -> int:
        """The most rows of one call."""
        return self._max_batch

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's answer never depends on its neighbours, as far as is known."""
        return self._is_batch_invariant

    @property
    def batch_unsafe(self) -> frozenset[str]:
        """Operators whose scale or mean is taken over all rows of a batch."""
        return self._batch_unsafe

    def deny_batches(self) -> None:
        """Run single rows from now on: a test has shown that neighbours change answers."""
        self._is_batch_invariant = False
        self._max_batch = 1
        self._buckets.clear()

    def run(self, rows: Sequence[Row]) -> list[Row]:
        """Run 1..max_batch rows of equal shapes; see `engines.Engine.run`."""
        if not 1 <= len(rows) <= self._max_batch:
            raise EngineFailed(f"the engine got {len(rows)} rows; it takes 1 to {self._max_batch}")
        bound = self._bound(rows[0], len(rows))
        bound.fill(rows)
        try:
            outputs = self._execute(bound, len(rows))
        except Exception as error:
            raise EngineFailed(f"the model failed: {first_line(error)}") from error
        return list(zip(*outputs, strict=True))

    @abstractmethod
    def _bind(self, shapes: Shapes, size: int) -> B:
        """Prepare zeroed buffers for `size` rows of `shapes`. May raise whatever the runtime raises."""

    @abstractmethod
    def _execute(self, bound: B, count: int) -> list[Array]:
        """Run the model; return copies of each output's first `count` rows."""

    def _bound(self, row: Row, count: int) -> B:
        shapes = tuple([array.shape for array in row])
        steps = self._buckets.get(shapes)
        if steps is None:
            _check(self.inputs, row)
            steps = self._buckets[shapes] = {}
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(shapes)
        # Powers of two: at most half of a batch is padding, and a bucket needs few sets of buffers.
        size = min(1 << (count - 1).bit_length(), self._max_batch)
        bound = steps.get(size)
        if bound is None:
            try:
                bound = steps[size] = self._bind(shapes, size)
            except EngineFailed:
                raise
            except Exception as error:
                raise EngineFailed(f"the model failed: {first_line(error)}") from error
        return bound


def port(name: str, side: str, dtype: np.dtype[Any] | None, shape: Sequence[int | None]) -> Port:
    """Describe an input or output ("input", "output"). `dtype` is None for what numpy cannot hold.

    Raises BundleError for what cannot be bound.
    """
    if dtype is None:
        raise BundleError(
            f"{side} {name!r} of the model has a type that numpy lacks; only numbers and booleans can be run"
        )
    if tuple(shape[:1]) not in ((None,), (1,)):
        raise BundleError(f"{side} {name!r} of the model has no batch axis; export it with a dynamic axis 0")
    return Port(name, dtype, shape[0], tuple(shape[1:]))


def check_outputs(outputs: Sequence[Array], size: int) -> None:
    """Refuse a trial run whose outputs are not one row for each of `size` input rows. Raises EngineFailed."""
    if any(output.shape[:1] != (size,) for output in outputs):
        raise EngineFailed("the model did not return one output row for each input row")


def first_line(error: Exception) -> str:
    """What a runtime said, short enough for a sentence."""
    return str(error).split("\n", 1)[0][:200]


def _check(inputs: Sequence[Port], row: Row) -> None:
    """Refuse a row that does not fit the model; once per new bucket."""
    if len(row) != len(inputs):
        raise EngineFailed(f"the model has {len(inputs)} inputs, and the row {len(row)} arrays")
    for want, array in zip(inputs, row, strict=True):
        fits = (
            array.dtype == want.dtype
            and len(array.shape) == len(want.shape)
            and all(length in (None, have) for length, have in zip(want.shape, array.shape, strict=True))
        )
        if not fits:
            raise EngineFailed(
                f"input {want.name!r} of the model is {want.dtype} {list(want.shape)} per row, "
                f"and the row {array.dtype} {list(array.shape)}"
            )
