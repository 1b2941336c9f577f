"""A builder for TFLite models: int8 weights stay int8 in the file, computation is fp32, axis 0 is open.

It needs only `flatbuffers`, neither TensorFlow nor a converter. Field and enumeration numbers are
those of TensorFlow Lite's schema.fbs, version 3; operator versions are the oldest that suffice, so that
tflite-runtime 2.14 runs the files as LiteRT 2 does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import flatbuffers
import numpy as np
from numpy.typing import NDArray

SCHEMA = 3
#: The batch axis in a shape.
OPEN = -1
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.int32): 2, np.dtype(np.int8): 9}


class Op(IntEnum):
    """BuiltinOperator."""

    ADD = 0
    AVERAGE_POOL_2D = 1
    DEQUANTIZE = 6
    FULLY_CONNECTED = 9
    MUL = 18
    RESHAPE = 22
    GATHER = 36
    MEAN = 40
    CAST = 53
    RSQRT = 76
    SQUARED_DIFFERENCE = 99
    SUB = 41
    GELU = 150


#: BuiltinOptions of each operator that has any.
_OPTIONS = {
    Op.AVERAGE_POOL_2D: 5,
    Op.FULLY_CONNECTED: 8,
    Op.ADD: 11,
    Op.RESHAPE: 17,
    Op.MUL: 21,
    Op.GATHER: 23,
    Op.MEAN: 27,
    Op.SUB: 28,
    Op.CAST: 37,
    Op.DEQUANTIZE: 38,
    Op.SQUARED_DIFFERENCE: 76,
    Op.GELU: 116,
}


@dataclass(frozen=True)
class Tensor:
    """A value of the graph. `shape` may begin with OPEN."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    buffer: int
    scales: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Node:
    code: tuple[Op, int]
    inputs: tuple[int, ...]
    output: int
    options: Sequence[tuple[str, int]]


class Graph:
    """Collects operators and weights; every method returns the tensor it makes."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._buffers: list[bytes] = [b""]  # the empty buffer 0 is what computed tensors name
        self._nodes: list[_Node] = []

    def input(self, name: str, shape: Sequence[int], dtype: type[np.generic]) -> Tensor:
        """An input of the model."""
        return self._add(_Entry(name, tuple(shape), np.dtype(dtype), 0))

    def op(
        self,
        kind: Op,
        *inputs: Tensor,
        shape: Sequence[int],
        dtype: type[np.generic] = np.float32,
        version: int = 1,
        options: Sequence[tuple[str, int]] = (),
    ) -> Tensor:
        """Add an operator whose output has `shape`. `options` are (field type, value) in the schema's order."""
        output = self._add(
            _Entry(f"{kind.name.lower()}{len(self._entries)}", tuple(shape), np.dtype(dtype), 0)
        )
        self._nodes.append(_Node((kind, version), tuple(t.index for t in inputs), output.index, options))
        return output

    def weight(self, array: NDArray[np.generic], scales: NDArray[np.float32] | None = None) -> Tensor:
        """Add a constant; int8 steps may have one scale for each slice of axis 0."""
        self._buffers.append(np.ascontiguousarray(array).tobytes())
        name = f"weight{len(self._entries)}"
        return self._add(_Entry(name, array.shape, array.dtype, len(self._buffers) - 1, scales))

    def gather(self, table: NDArray[np.generic], at: Tensor) -> Tensor:
        """Rows of `table` at the indices `at`: shape of `at`, then that of a row."""
        kind = table.dtype.type
        return self.op(
            Op.GATHER,
            self.weight(table),
            at,
            shape=(*at.shape, *table.shape[1:]),
            dtype=kind,
            version=2 if kind is np.int8 else 1,
            options=[("Int32", 0)],
        )

    def to_float(self, x: Tensor) -> Tensor:
        """The numbers of an int8 tensor."""
        return self.op(Op.CAST, x, shape=x.shape)

    def linear(
        self,
        x: Tensor,
        steps: NDArray[np.int8],
        scales: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
    ) -> Tensor:
        """`x @ (steps * scales) + bias` with `steps` `[in, out]` and a scale per output.

        The runtimes expand constants once, when tensors are allocated. int8 weights given to FULLY_CONNECTED
        itself would round the activations as well.
        """
        matrix = self.weight(np.ascontiguousarray(steps.T), scales)
        matrix = self.op(Op.DEQUANTIZE, matrix, shape=matrix.shape, version=5)
        inputs = [x, matrix] if bias is None else [x, matrix, self.weight(bias)]
        return self.op(Op.FULLY_CONNECTED, *inputs, shape=(*x.shape[:-1], steps.shape[1]))

    def arithmetic(self, kind: Op, x: Tensor, y: Tensor) -> Tensor:
        """ADD, SUB, MUL or SQUARED_DIFFERENCE; `y` is broadcast to the shape of `x`."""
        return self.op(kind, x, y, shape=x.shape)

    def normalised(
        self, x: Tensor, scale: NDArray[np.float32], bias: NDArray[np.float32], epsilon: float
    ) -> Tensor:
        """Normalise the last axis of `x` [batch, width]."""
        axis = self.weight(np.array([1], np.int32))
        kept = [("Bool", 1)]
        mean = self.op(Op.MEAN, x, axis, shape=(OPEN, 1), options=kept)
        centred = self.arithmetic(Op.SUB, x, mean)
        variance = self.op(
            Op.MEAN, self.arithmetic(Op.MUL, centred, centred), axis, shape=(OPEN, 1), options=kept
        )
        variance = self.arithmetic(Op.ADD, variance, self.weight(np.array([epsilon], np.float32)))
        factor = self.op(Op.RSQRT, variance, shape=(OPEN, 1))
        scaled = self.arithmetic(Op.MUL, self.arithmetic(Op.MUL, centred, factor), self.weight(scale))
        return self.arithmetic(Op.ADD, scaled, self.weight(bias))

    def gelu(self, x: Tensor) -> Tensor:
        """The exact Gaussian error unit."""
        return self.op(Op.GELU, x, shape=x.shape)

    def model(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> bytes:
        """Serialise with one signature, `serving_default`."""
        return _Writer().model(self._entries, self._buffers, self._nodes, inputs, outputs)

    def _add(self, entry: _Entry) -> Tensor:
        self._entries.append(entry)
        return Tensor(len(self._entries) - 1, entry.shape)


class _Writer:
    """Tables of schema.fbs. Flatbuffers are written from the inside out: what a table points to comes before it."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(1 << 16)

    def model(
        self,
        entries: Sequence[_Entry],
        buffers: Sequence[bytes],
        nodes: Sequence[_Node],
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> bytes:
        kinds = sorted({node.code for node in nodes})
        codes = [
            # The old field holds what fits a byte, 127 for what does not, and the new one all.
            self._table(("Int8", min(kind, 127)), None, ("Int32", version), ("Int32", kind))
            for kind, version in kinds
        ]
        graph = self._table(
            self._tables([self._tensor(entry) for entry in entries]),
            self._numbers([tensor.index for tensor in inputs.values()]),
            self._numbers([tensor.index for tensor in outputs.values()]),
            self._tables([self._node(node, kinds.index(node.code)) for node in nodes]),
            self._text("main"),
        )
        signature = self._table(self._map(inputs), self._map(outputs), self._text("serving_default"))
        # Written last and by size, so that the table opens the file: zstd fits its statistics to what comes
        # first, and dense weights ahead of a table of few levels cost 7 % of the whole.
        data = {b"": self._table(None)}
        data |= {
            each: self._table(self._bytes(each))
            for each in sorted(set(buffers) - {b""}, key=lambda x: (len(x), x))
        }
        root = self._table(
            ("Uint32", SCHEMA),
            self._tables(codes),
            self._tables([graph]),
            self._text("edge-runtime"),
            self._tables([data[each] for each in buffers]),
            None,
            None,
            self._tables([signature]),
        )
        self._builder.Finish(root[1], file_identifier=b"TFL3")
        return bytes(self._builder.Output())

    def _tensor(self, entry: _Entry) -> tuple[str, int]:
        quantisation = None
        if entry.scales is not None:
            scales = entry.scales.ravel().astype(np.float32)
            quantisation = self._table(
                None,
                None,
                ("UOffset", self._builder.CreateNumpyVector(scales)),
                ("UOffset", self._builder.CreateNumpyVector(np.zeros(len(scales), np.int64))),
            )
        # Runtimes start with one row; the signature says which axis is open.
        first = [1 if length == OPEN else length for length in entry.shape]
        signature = self._numbers(entry.shape) if OPEN in entry.shape else None
        return self._table(
            self._numbers(first),
            ("Int8", _TYPES[entry.dtype]),
            ("Uint32", entry.buffer),
            self._text(entry.name),
            quantisation,
            None,
            None,
            signature,
        )

    def _node(self, node: _Node, code: int) -> tuple[str, int]:
        options = _OPTIONS.get(node.code[0])
        return self._table(
            ("Uint32", code),
            self._numbers(node.inputs),
            self._numbers([node.output]),
            None if options is None else ("Uint8", options),
            None if options is None else self._table(*node.options),
        )

    def _map(self, named: dict[str, Tensor]) -> tuple[str, int]:
        return self._tables(
            [self._table(self._text(name), ("Uint32", tensor.index)) for name, tensor in named.items()]
        )

    def _table(self, *fields: tuple[str, int] | None) -> tuple[str, int]:
        """A table with these fields in the schema's order; None leaves the default."""
        builder = self._builder
        builder.StartObject(len(fields))
        for slot, field in enumerate(fields):
            if field is not None:
                kind, value = field
                if kind == "UOffset":
                    builder.PrependUOffsetTRelativeSlot(slot, value, 0)
                else:
                    getattr(builder, f"Prepend{kind}Slot")(slot, value, 0)
        return "UOffset", builder.EndObject()

    def _tables(self, tables: Sequence[tuple[str, int]]) -> tuple[str, int]:
        builder = self._builder
        builder.StartVector(4, len(tables), 4)
        for _, offset in reversed(tables):
            builder.PrependUOffsetTRelative(offset)
        return "UOffset", builder.EndVector()

    def _numbers(self, numbers: Sequence[int]) -> tuple[str, int]:
        return "UOffset", self._builder.CreateNumpyVector(np.array(numbers, np.int32))

    def _text(self, text: str) -> tuple[str, int]:
        return "UOffset", self._builder.CreateString(text)

    def _bytes(self, data: bytes) -> tuple[str, int]:
        self._builder.Prep(16, len(data))  # kernels read weights in vectors of 16 bytes
        return "UOffset", self._builder.CreateByteVector(data)
