"""The only door to onnxruntime: a session over verified bytes, with buffers bound once per bucket and ladder step.

A plain `run()` of a tiny model spends most of its time on checking and allocating; binding inputs and outputs
to arrays of ours once, writing rows in place and running costs about half.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import Array, Row
from edge_runtime.engines.onnx_scan import scan

VERSION = f"onnxruntime {ort.__version__}"
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}
#: Row shapes whose buffers are kept; a client that sends ever new shapes must not grow memory.
_MAX_BUCKETS = 16


@dataclass(frozen=True, slots=True)
class Port:
    """A model input or output. `batch` is None for an open batch axis; so are open lengths in `shape` after it."""

    name: str
    dtype: np.dtype[Any]
    batch: int | None
    shape: tuple[int | None, ...]


@dataclass(slots=True)
class _Bound:
    """Arrays of one batch size, and the binding that makes the session read and write them in place."""

    binding: Any
    inputs: list[Array]
    outputs: list[Array]
    used: int  # rows which may hold something else than zero


class OnnxEngine:
    """Runs one ONNX model on the CPU. Not thread-safe; see `engines.Engine`."""

    def __init__(
        self,
        model: bytes,
        *,
        max_batch: int,
        threads: int = 1,
        is_batch_invariant: bool = True,
        are_rows_alike: bool = False,
    ) -> None:
        """Load `model`. Batches are forced to 1 where the graph or the caller says that neighbours matter.

        `threads` is the number of threads inside an operator; `are_rows_alike` says that all rows have the
        same shapes. Raises BundleError for a model that keeps data
        in other files, has inputs this project cannot bind, or that the runtime refuses.
        """
        found = scan(model)
        self._batch_unsafe = found.batch_unsafe
        self._is_batch_invariant = is_batch_invariant and not found.batch_unsafe
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        # The arena keeps the worst case for ever (85 -> 218 MB reported where lengths vary). Rows of one shape
        # have no worst case: there it saves 3 MB of holes that malloc leaves between batches.
        options.enable_cpu_mem_arena = are_rows_alike
        # Spinning burns most of a core between sparse requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - the runtime has no public error class
            raise BundleError(f"the model cannot be loaded ({_first_line(error)}); export it again") from None
        self.inputs = tuple(_port(node, "input") for node in self._session.get_inputs())
        self.outputs = tuple(_port(node, "output") for node in self._session.get_outputs())
        is_open = all(port.batch is None for port in (*self.inputs, *self.outputs))
        self._max_batch = max_batch if self._is_batch_invariant and is_open else 1
        self._buckets: OrderedDict[tuple[tuple[int, ...], ...], dict[int, _Bound]] = OrderedDict()

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

    @property
    def name(self) -> str:
        """What runs the model."""
        return "onnxruntime"

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
        for port, target in enumerate(bound.inputs):
            for i, row in enumerate(rows):
                target[i] = row[port]
            if bound.used > len(rows):
                target[len(rows) : bound.used] = 0
        bound.used = len(rows)
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise EngineFailed(f"the model failed: {_first_line(error)}") from error
        copies = [output[: len(rows)].copy() for output in bound.outputs]
        return list(zip(*copies, strict=True))

    def close(self) -> None:
        """Free session and buffers."""
        self._buckets.clear()
        self._session = None

    def _bound(self, row: Row, count: int) -> _Bound:
        shapes = tuple([array.shape for array in row])
        steps = self._buckets.get(shapes)
        if steps is None:
            self._check(row)
            steps = self._buckets[shapes] = {}
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(shapes)
        # Powers of two: at most half of a batch is padding, and a bucket needs few sets of buffers.
        size = min(1 << (count - 1).bit_length(), self._max_batch)
        bound = steps.get(size)
        if bound is None:
            bound = steps[size] = self._bind(shapes, size)
        return bound

    def _check(self, row: Row) -> None:
        """Refuse a row that does not fit the model; once per new bucket."""
        if len(row) != len(self.inputs):
            raise EngineFailed(f"the model has {len(self.inputs)} inputs, and the row {len(row)} arrays")
        for port, array in zip(self.inputs, row, strict=True):
            fits = (
                array.dtype == port.dtype
                and len(array.shape) == len(port.shape)
                and all(want in (None, have) for want, have in zip(port.shape, array.shape, strict=True))
            )
            if not fits:
                raise EngineFailed(
                    f"input {port.name!r} of the model is {port.dtype} {list(port.shape)} per row, "
                    f"and the row {array.dtype} {list(array.shape)}"
                )

    def _bind(self, shapes: tuple[tuple[int, ...], ...], size: int) -> _Bound:
        """Allocate arrays for one batch size. A first plain run tells the shapes of the outputs."""
        inputs = [np.zeros((size, *s), p.dtype) for p, s in zip(self.inputs, shapes, strict=True)]
        names = [port.name for port in self.inputs]
        try:
            trial = self._session.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:
            raise EngineFailed(f"the model failed: {_first_line(error)}") from error
        if any(output.shape[:1] != (size,) for output in trial):
            raise EngineFailed("the model did not return one output row for each input row")
        outputs = [np.zeros(output.shape, output.dtype) for output in trial]
        binding = self._session.io_binding()
        for port, array in zip(self.inputs, inputs, strict=True):
            binding.bind_input(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for port, array in zip(self.outputs, outputs, strict=True):
            binding.bind_output(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _Bound(binding, inputs, outputs, used=0)


def _port(node: Any, side: str) -> Port:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise BundleError(
            f"{side} {node.name!r} of the model is a {node.type}; only numbers and booleans can be run"
        )
    shape = tuple(length if isinstance(length, int) else None for length in node.shape)
    if shape[:1] not in ((None,), (1,)):
        raise BundleError(
            f"{side} {node.name!r} of the model has no batch axis; export it with a dynamic axis 0"
        )
    return Port(node.name, np.dtype(dtype), shape[0], shape[1:])


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
