"""What engines with prepared buffers share: a set of buffers for each row shape and prepared size, and zeroed padding.

A bucket is what rows of one shape share. Subclasses know a runtime; this module knows none.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import Array, Shapes
from edge_runtime.engines import Batch

#: Row shapes whose buffers are kept: memory must not grow with the shapes that clients send.
_MAX_BUCKETS = 16


@dataclass(frozen=True, slots=True)
class Port:
    """A model input or output. `batch` is None for an open batch axis; so are open lengths in `shape` after it."""

    name: str
    dtype: np.dtype[Any]
    batch: int | None
    shape: tuple[int | None, ...]


@dataclass(slots=True)
class Buffers:
    """Input arrays `[size, ...]` of one prepared size. Only the first `used` rows may hold anything but zero."""

    arrays: list[Array]
    used: int


B = TypeVar("B", bound=Buffers)


@dataclass(slots=True)
class BoundBatch(Generic[B]):
    """The first `rows` rows of a set of buffers; see `engines.Batch`."""

    inputs: list[Array]
    rows: int
    buffers: B


class BucketedEngine(ABC, Generic[B]):
    """An engine without its runtime: `_bind` prepares buffers, `_execute` runs them. See `engines.Engine`."""

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
        """Operators that compute a scale or a mean over all rows of a batch."""
        return self._batch_unsafe

    def deny_batches(self) -> None:
        """Run single rows from now on: a test has shown that neighbours change answers."""
        self._is_batch_invariant = False
        self._max_batch = 1
        self._buckets.clear()

    def bind(self, shapes: Shapes, rows: int) -> BoundBatch[B]:
        """Return the buffers of `rows` rows of `shapes`; rows beyond them are zero. See `engines.Engine.bind`."""
        if not 1 <= rows <= self._max_batch:
            raise EngineFailed(f"the engine got {rows} rows; it takes 1 to {self._max_batch}")
        buffers = self._buffers(shapes, rows)
        arrays = buffers.arrays
        if buffers.used > rows:  # the rows of an earlier, larger batch would run as padding
            for array in arrays:
                array[rows : buffers.used] = 0
        buffers.used = rows
        return BoundBatch([array[:rows] for array in arrays], rows, buffers)

    def run(self, batch: Batch) -> list[Array]:
        """Run a batch that `bind` returned; see `engines.Engine.run`."""
        assert isinstance(batch, BoundBatch)
        try:
            outputs = self._execute(batch.buffers)
        except Exception as error:
            raise EngineFailed(f"the model failed: {first_line(error)}") from error
        return [output[: batch.rows] for output in outputs]

    @abstractmethod
    def _bind(self, shapes: Shapes, size: int) -> B:
        """Prepare zeroed buffers for `size` rows of `shapes`. May raise whatever the runtime raises."""

    @abstractmethod
    def _execute(self, bound: B) -> list[Array]:
        """Run the model on all rows of the buffers; return whole outputs, valid until the next call."""

    def _buffers(self, shapes: Shapes, rows: int) -> B:
        sizes = self._buckets.get(shapes)
        if sizes is None:
            _check(self.inputs, shapes)
            sizes = self._buckets[shapes] = {}
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(shapes)
        # Sizes are powers of two: at most half of a batch is padding, and a bucket needs few sets of buffers.
        size = min(1 << (rows - 1).bit_length(), self._max_batch)
        bound = sizes.get(size)
        if bound is None:
            try:
                bound = sizes[size] = self._bind(shapes, size)
            except EngineFailed:
                raise
            except Exception as error:
                raise EngineFailed(f"the model failed: {first_line(error)}") from error
        return bound


def port(name: str, side: str, dtype: np.dtype[Any] | None, shape: Sequence[int | None]) -> Port:
    """Describe an input or output; `side` says which ("input", "output"). `dtype` is None for a type that numpy lacks.

    Raises BundleError for one that cannot be bound.
    """
    if dtype is None:
        raise BundleError(
            f"{side} {name!r} of the model has a type that numpy lacks; only numbers and booleans can be run"
        )
    if tuple(shape[:1]) not in ((None,), (1,)):
        raise BundleError(f"{side} {name!r} of the model has no batch axis; export it with a dynamic axis 0")
    return Port(name, dtype, shape[0], tuple(shape[1:]))


def check_outputs(outputs: Sequence[Array], size: int) -> None:
    """Refuse outputs of a first run that are not one row for each of `size` input rows. Raises EngineFailed."""
    if any(output.shape[:1] != (size,) for output in outputs):
        raise EngineFailed("the model did not return one output row for each input row")


def first_line(error: Exception) -> str:
    """The error of a runtime, short enough for a sentence."""
    return str(error).split("\n", 1)[0][:200]


def _check(inputs: Sequence[Port], shapes: Shapes) -> None:
    """Refuse shapes that do not fit the model; once per new bucket."""
    if len(shapes) != len(inputs):
        raise EngineFailed(f"the model has {len(inputs)} inputs, and the row {len(shapes)} arrays")
    for want, shape in zip(inputs, shapes, strict=True):
        fits = len(shape) == len(want.shape) and all(
            length in (None, have) for length, have in zip(want.shape, shape, strict=True)
        )
        if not fits:
            raise EngineFailed(
                f"input {want.name!r} of the model is {want.dtype} {list(want.shape)} per row, "
                f"and the row {list(shape)}"
            )
