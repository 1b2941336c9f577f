"""A builder for ONNX graphs whose weights are stored as int8 and computed in fp32."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

OPSET = 17


class Graph:
    """Collects nodes and weights; every method returns the name of its result."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._count = 0

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output."""
        self._count += 1
        name = f"{kind.lower()}{self._count}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weight(self, array: NDArray[np.generic]) -> str:
        """Add a constant as it is."""
        self._count += 1
        name = f"weight{self._count}"
        self._weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def rounded(self, array: NDArray[np.float32]) -> str:
        """Add a matrix `[in, out]` as int8 with a scale per output.

        Cast and Mul rather than DequantizeLinear: the runtime folds them into fp32 once, at load.
        """
        steps, scales = quantised(array, axis=0)
        return self.op(
            "Mul", self.op("Cast", self.weight(steps), to=onnx.TensorProto.FLOAT), self.weight(scales)
        )

    def linear(self, x: str, matrix: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> str:
        """`x @ matrix + bias` with `matrix` `[in, out]` as int8."""
        product = self.op("MatMul", x, self.rounded(matrix))
        return product if bias is None else self.op("Add", product, self.weight(bias))

    def normalised(
        self, x: str, scale: NDArray[np.float32], bias: NDArray[np.float32], epsilon: float
    ) -> str:
        """Normalise the last axis."""
        return self.op(
            "LayerNormalization", x, self.weight(scale), self.weight(bias), epsilon=epsilon, axis=-1
        )

    def gelu(self, x: str) -> str:
        """The exact Gaussian error unit."""
        inner = self.op("Erf", self.op("Mul", x, self.scalar(0.5**0.5)))
        half = self.op("Mul", x, self.scalar(0.5))
        return self.op("Mul", half, self.op("Add", inner, self.scalar(1.0)))

    def scalar(self, value: float) -> str:
        """A single fp32 number."""
        return self.weight(np.array(value, np.float32))

    def model(
        self,
        inputs: dict[str, tuple[int, list[object]]],
        output: str,
        labels: int,
        more: dict[str, tuple[str, list[object]]] | None = None,
    ) -> bytes:
        """Serialise with inputs `name -> (type, shape)` and the output `logits [batch, labels]`.

        `more` outputs are `name -> (result, shape)`, all fp32.
        """
        outputs: dict[str, tuple[str, list[object]]] = {"logits": (output, ["batch", labels]), **(more or {})}
        self._nodes += [
            helper.make_node("Identity", [result], [name]) for name, (result, _) in outputs.items()
        ]
        graph = helper.make_graph(
            self._nodes,
            "main",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                for name, (_, shape) in outputs.items()
            ],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def quantised(array: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 steps and the scale of each slice: the maximum is taken along `axis`."""
    scales = np.maximum(np.abs(array).max(axis=axis, keepdims=True), 1e-12).astype(np.float32) / np.float32(
        127
    )
    return np.round(array / scales).astype(np.int8), scales
