"""Numeric tensors in, numeric tensors out, unchanged: serves any model of such inputs and outputs."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.core.errors import InvalidRequest, Unsupported
from edge_runtime.core.messages import (
    DTYPES,
    Answer,
    Array,
    InferReply,
    Row,
    Signature,
    Tensor,
    TensorSpec,
)
from edge_runtime.core.protocol.replies import read_answer
from edge_runtime.processing import PreparedRow

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
        """None: a tensor of numbers has no labels."""

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """As the bundle states them."""
        return tuple(DTYPES[spec.datatype] for spec in self._signature.inputs)

    @property
    def fusion_version(self) -> None:
        """None: answers of two tiers are not fused."""

    def split(self, inputs: Sequence[Tensor]) -> list[Row]:
        """Return each row's arrays, in the order of the signature; they are views of the request's."""
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
        return [tuple([array[i, ...] for array in arrays]) for i in range(count)]

    def canonical(self, question: Row) -> bytes:
        """Return, input by input: lengths, datatype, shape and the little-endian bytes."""
        specs = self._signature.inputs
        return b"".join(_head(s, a) + a.tobytes() for s, a in zip(specs, question, strict=True))

    def prepare(self, question: Row) -> PreparedRow:
        """Return the arrays as they are."""
        shapes = tuple([array.shape for array in question])
        return PreparedRow(shapes, sum([array.nbytes for array in question]), question)

    def encode_batch(self, batch: Sequence[Row], buffers: Sequence[Array]) -> None:
        """Copy the arrays of each row into the buffers."""
        for at, target in enumerate(buffers):
            for i, row in enumerate(batch):
                target[i] = row[at]

    def decode_batch(self, outputs: Sequence[Array], batch: Sequence[Row]) -> list[Answer]:
        """Return the model's arrays as they are, each row with bytes of its own."""
        return [Answer(tuple([output[i].copy() for output in outputs]), None) for i in range(len(batch))]

    def tensors(self, question: Row) -> tuple[Tensor, ...]:
        """Return each input as a tensor of one row."""
        return tuple(
            Tensor(spec.name, spec.datatype, (1, *array.shape), array[None])
            for spec, array in zip(self._signature.inputs, question, strict=True)
        )

    def read(self, reply: InferReply, *, with_extras: bool) -> Answer:
        """Read a reply of one row; see `Processor.read`."""
        return read_answer(self._signature, reply, None, with_extras=with_extras)

    def fuse(self, edge: Answer, cloud: Answer) -> Answer:  # noqa: ARG002 - see `fusion_version`
        """Return the cloud's answer."""
        return cloud


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
    shape = array.shape
    return _LENGTH.pack(len(word)) + word + _LENGTH.pack(len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
