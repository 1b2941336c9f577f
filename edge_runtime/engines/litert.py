"""The only module that imports LiteRT, or tflite-runtime where LiteRT has no wheel.

There is one interpreter per shape and prepared batch size, made when it is first needed. To resize an interpreter costs
7 us with LiteRT 2.3 but 1 ms with tflite-runtime 2.14, which then prepares every weight again; a further interpreter of
a small model costs 4 ms once and less than 1 MB. All interpreters share the bytes of the model.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import DTYPES, Array, Shapes
from edge_runtime.engines.buckets import (
    BucketedEngine,
    Buffers,
    Port,
    check_outputs,
    first_line,
    port,
)
from edge_runtime.engines.tflite_scan import scan

try:
    from ai_edge_litert import interpreter as litert

    _NAME, _PACKAGE = "litert", "ai-edge-litert"
except ImportError:
    from tflite_runtime import interpreter as litert

    _NAME, _PACKAGE = "tflite_runtime", "tflite-runtime"

VERSION = f"{_NAME} {version(_PACKAGE)}"


@dataclass(slots=True)
class _Bound(Buffers):
    """Arrays of one batch size and the interpreter whose tensors have that size."""

    interpreter: Any


class LitertEngine(BucketedEngine[_Bound]):
    """Runs one TFLite model on the CPU. Not thread-safe; see `engines.Engine`."""

    def __init__(
        self, model: bytes, *, max_batch: int, threads: int = 1, is_batch_invariant: bool = True
    ) -> None:
        """Load `model`. Inputs and outputs are in the order of the model's first graph.

        Batches have one row if `is_batch_invariant` is false, or if axis 0 of an input or output is fixed. `threads` is the
        number of threads inside an operator. Raises BundleError for a model that the scan or the runtime refuses, and
        for inputs and outputs that are not numeric or have no batch axis.
        """
        scan(model)
        self._model, self._threads = model, threads
        try:
            # Kept for the first buffers, because an interpreter costs milliseconds.
            self._spare: Any = self._interpreter()
            inputs, outputs = self._spare.get_input_details(), self._spare.get_output_details()
        except Exception as error:  # noqa: BLE001 - the runtime has no error class of its own
            raise BundleError(f"the model cannot be loaded ({first_line(error)}); export it again") from None
        self._input_ids = [entry["index"] for entry in inputs]
        self._output_ids = [entry["index"] for entry in outputs]
        super().__init__(
            [_port(entry, "input") for entry in inputs],
            [_port(entry, "output") for entry in outputs],
            max_batch=max_batch,
            is_batch_invariant=is_batch_invariant,
        )

    @property
    def name(self) -> str:
        """The runtime that runs the model."""
        return _NAME

    def close(self) -> None:
        """Free interpreters and buffers."""
        self._buckets.clear()
        self._spare = None
        self._model = b""

    def _interpreter(self) -> Any:
        return litert.Interpreter(model_content=self._model, num_threads=self._threads)

    def _execute(self, bound: _Bound) -> list[Array]:
        interpreter = bound.interpreter
        for tensor, array in zip(self._input_ids, bound.arrays, strict=True):
            interpreter.set_tensor(tensor, array)
        interpreter.invoke()
        return [interpreter.get_tensor(tensor) for tensor in self._output_ids]

    def _bind(self, shapes: Shapes, size: int) -> _Bound:
        """Give an interpreter one batch size; a trial run tells whether the outputs follow."""
        interpreter = self._spare or self._interpreter()
        self._spare = None
        inputs = [np.zeros((size, *s), p.dtype) for p, s in zip(self.inputs, shapes, strict=True)]
        for tensor, array in zip(self._input_ids, inputs, strict=True):
            interpreter.resize_tensor_input(tensor, array.shape, strict=True)
        interpreter.allocate_tensors()
        bound = _Bound(inputs, 0, interpreter)
        check_outputs(self._execute(bound), size)
        return bound


def _port(entry: dict[str, Any], side: str) -> Port:
    dtype = np.dtype(entry["dtype"])
    shape = [None if length < 0 else int(length) for length in entry["shape_signature"]]
    return port(entry["name"], side, dtype if dtype in DTYPES.values() else None, shape)
