"""Numbers in, numbers out: serves any model whose inputs and outputs are numeric tensors, unchanged."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.core.errors import InvalidRequest, Unsupported
from edge_runtime.core.messages import DTYPES, Answer, Row, Signature, Tensor, TensorSpec

_LENGTH = struct.Struct("<I")


class Tensors:
    """Cuts tensors into rows along axis 0. There is no confidence, so nothing is ever escalated as unsure."""

    def __init__(self, signature: Signature, *, version: str) -> None:
        """Serve `signature`. Raises Unsupported for tensors that are not numbers."""
        for spec in (*signature.inputs, *signature.outputs):
            if spec.datatype not in DTYPES:
                raise Unsupported(
                    f"tensor {spec.name!r} is {spec.datatype}; the task 'tensors' serves numbers only"
                )
        self._signature = signature
        self._version = version

    @property
    def signature(self) -> Signature:
        """As the bundle states it."""
        return self._signature

    @property
    def version(self) -> str:
        """Part of every cache key."""
        return self._version

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """As the bundle states them."""
        return self._signature.outputs

    @property
    def labels(self) -> None:
        """None: numbers are no labels."""

    def split(self, inputs: Sequence[Tensor]) -> list[bytes]:
        """Return for each row, input by input: lengths, datatype, shape and the little-endian bytes."""
        by_name = {tensor.name: tensor for tensor in inputs}
        specs = self._signature.inputs
        if len(by_name) != len(inputs) or by_name.keys() != {spec.name for spec in specs}:
            wanted = ", ".join(repr(spec.name) for spec in specs)
            raise InvalidRequest(f"this model takes exactly the inputs {wanted}, each once")
        arrays = [_checked(by_name[spec.name], spec) for spec in specs]
        count = arrays[0].shape[0]
        if count == 0:
            raise InvalidRequest(f"input {specs[0].name!r} is empty; send at least one row")
        if any(array.shape[0] != count for array in arrays):
            raise InvalidRequest("the inputs differ in their number of rows; axis 0 counts the rows of each")
        heads = [_head(spec, array) for spec, array in zip(specs, arrays, strict=True)]
        return [
            b"".join(head + array[i].tobytes() for head, array in zip(heads, arrays, strict=True))
            for i in range(count)
        ]

    def encode(self, row: bytes) -> Row:
        """Return the arrays of one row from its canonical bytes."""
        arrays = []
        at = 0
        for spec in self._signature.inputs:
            dtype = DTYPES[spec.datatype]
            (rank,) = _LENGTH.unpack_from(row, at + 4 + len(spec.datatype))
            at += 8 + len(spec.datatype)
            shape = struct.unpack_from(f"<{rank}Q", row, at)
            at += 8 * rank
            size = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(row, dtype, size, at).reshape(shape))
            at += size * dtype.itemsize
        return tuple(arrays)

    def decode(self, output: Row, _row: bytes = b"") -> Answer:
        """Return the model's arrays as they are."""
        return Answer(tuple(output), None)


def _checked(tensor: Tensor, spec: TensorSpec) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    """The tensor's array in the memory order of the protocol, once it fits `spec`."""
    dtype = DTYPES[spec.datatype]
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(f"input {spec.name!r} has datatype {tensor.datatype}; send {spec.datatype}")
    if not isinstance(tensor.data, np.ndarray) or tensor.data.dtype != dtype:
        raise InvalidRequest(f"the values of input {spec.name!r} are not {spec.datatype}")
    shape = tensor.data.shape
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits or tuple(tensor.shape) != shape:
        raise InvalidRequest(
            f"input {spec.name!r} has shape {list(tensor.shape)}; send {list(spec.shape)}, -1 standing for any length"
        )
    return np.ascontiguousarray(tensor.data, dtype)


def _head(spec: TensorSpec, array: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> bytes:
    word = spec.datatype.encode("ascii")
    shape = array.shape[1:]
    return _LENGTH.pack(len(word)) + word + _LENGTH.pack(len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
