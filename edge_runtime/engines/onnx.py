"""Runs ONNX models on the CPU: a session over verified bytes, with buffers bound once per bucket and prepared size.

The only module that imports onnxruntime.

A plain `run()` of a tiny model spends most of its time on checks and allocation. To bind inputs and outputs once to
arrays of our own, to write rows in place and to run costs about half.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Array, Shapes
from edge_runtime.engines.buckets import (
    BucketedEngine,
    Buffers,
    Port,
    check_outputs,
    first_line,
    port,
)
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


@dataclass(slots=True)
class _Bound(Buffers):
    """Arrays of one batch size, and the binding that makes the session read and write them in place."""

    binding: Any
    outputs: list[Array]


class OnnxEngine(BucketedEngine[_Bound]):
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

        `threads` is the number of threads inside an operator; `are_rows_alike` says that all rows have the same
        shapes. Raises BundleError for a model that keeps data in other files, whose inputs or outputs cannot be bound,
        or that the runtime refuses.
        """
        found = scan(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        # The arena keeps the worst case for ever (85 -> 218 MB reported where lengths vary). Rows of one shape have
        # no worst case: for them the arena saves 3 MB of holes that malloc leaves between batches.
        options.enable_cpu_mem_arena = are_rows_alike
        # Spinning burns most of a core between sparse requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # Without the fallback, which would print, and load the same bytes on the same provider once more.
            self._session: Any = ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            # A name that is not UTF-8 raises only when it is read.
            inputs = [(node.name, node.type, node.shape) for node in self._session.get_inputs()]
            outputs = [(node.name, node.type, node.shape) for node in self._session.get_outputs()]
        except Exception as error:  # noqa: BLE001 - the runtime has no public error class
            raise BundleError(f"the model cannot be loaded ({first_line(error)}); export it again") from None
        super().__init__(
            [_port(*each, "input") for each in inputs],
            [_port(*each, "output") for each in outputs],
            max_batch=max_batch,
            is_batch_invariant=is_batch_invariant,
            batch_unsafe=found.batch_unsafe,
        )

    @property
    def name(self) -> str:
        """What runs the model."""
        return "onnxruntime"

    def close(self) -> None:
        """Free session and buffers."""
        self._buckets.clear()
        self._session = None

    def _execute(self, bound: _Bound) -> list[Array]:
        self._session.run_with_iobinding(bound.binding)
        return bound.outputs

    def _bind(self, shapes: Shapes, size: int) -> _Bound:
        """Allocate arrays for one batch size. A plain run shows the shapes of the outputs."""
        inputs = [np.zeros((size, *s), p.dtype) for p, s in zip(self.inputs, shapes, strict=True)]
        trial = self._session.run(None, {p.name: array for p, array in zip(self.inputs, inputs, strict=True)})
        check_outputs(trial, size)
        outputs = [np.zeros(output.shape, output.dtype) for output in trial]
        binding = self._session.io_binding()
        for each, array in zip(self.inputs, inputs, strict=True):
            binding.bind_input(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for each, array in zip(self.outputs, outputs, strict=True):
            binding.bind_output(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _Bound(inputs, 0, binding, outputs)


def _port(name: str, kind: str, lengths: list[int | str | None], side: str) -> Port:
    shape = [length if isinstance(length, int) else None for length in lengths]
    dtype = _DTYPES.get(kind)
    return port(name, side, None if dtype is None else np.dtype(dtype), shape)
