"""Scan the bytes of an ONNX model, before ONNX Runtime parses them, for external data and batch-unsafe operators.

ONNX Runtime opens external files even if the model is given as bytes, so tensors that refer to other files are refused
here. The scan knows the few protobuf fields that lead to tensors and nodes, skips their payloads, and needs no `onnx`
package. Field numbers are those of onnx.proto.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from edge_runtime.core.errors import BundleError

_MAX_DEPTH = 32
#: These operators compute a scale over all rows of a batch, so a neighbour changes the answer of a row.
_BATCH_UNSAFE = frozenset({b"DynamicQuantizeLinear", b"DynamicQuantizeMatMul", b"DynamicQuantizeLSTM"})
#: Domains of operators that this project runs. Any other domain means custom code.
_DOMAINS = frozenset({b"", b"ai.onnx", b"ai.onnx.ml", b"com.microsoft"})


class _Kind(Enum):
    MODEL = auto()
    TRAINING = auto()
    FUNCTION = auto()
    GRAPH = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    SPARSE = auto()
    TENSOR = auto()


#: For each kind of message: the fields that hold further messages, and their kinds.
_INTO: dict[_Kind, dict[int, _Kind]] = {
    _Kind.MODEL: {7: _Kind.GRAPH, 20: _Kind.TRAINING, 25: _Kind.FUNCTION},
    _Kind.TRAINING: {1: _Kind.GRAPH, 2: _Kind.GRAPH},
    _Kind.FUNCTION: {7: _Kind.NODE, 11: _Kind.ATTRIBUTE},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR, 15: _Kind.SPARSE},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {
        5: _Kind.TENSOR,
        6: _Kind.GRAPH,
        10: _Kind.TENSOR,
        11: _Kind.GRAPH,
        22: _Kind.SPARSE,
        23: _Kind.SPARSE,
    },
    _Kind.SPARSE: {1: _Kind.TENSOR, 2: _Kind.TENSOR},
    _Kind.TENSOR: {},
}
_OUTPUT, _OPERATOR, _ATTRIBUTE, _DOMAIN = 2, 4, 5, 7  # of NodeProto
_NAME, _INTEGER = 1, 3  # of AttributeProto
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto


@dataclass(frozen=True, slots=True)
class ScanResult:
    """`batch_unsafe` names the operators of the model whose results depend on the other rows of a batch."""

    batch_unsafe: frozenset[str]


def scan(model: bytes) -> ScanResult:
    """Scan a serialised ModelProto.

    Raises BundleError for tensors in other files, custom operators, nesting deeper than 32, and bytes that are not a
    protobuf message.
    """
    unsafe: set[str] = set()
    _walk(memoryview(model), _Kind.MODEL, 0, unsafe)
    return ScanResult(frozenset(unsafe))


def _walk(data: memoryview, kind: _Kind, depth: int, unsafe: set[str]) -> None:
    if depth > _MAX_DEPTH:
        raise BundleError(f"the model is nested deeper than {_MAX_DEPTH}; export it without deep sub-graphs")
    if kind is _Kind.NODE and (operator := _batch_unsafe(data)):
        unsafe.add(operator)
    into = _INTO[kind]
    for field, value in _fields(data):
        if isinstance(value, int):
            if kind is _Kind.TENSOR and field == _DATA_LOCATION and value != 0:
                raise _external()
        elif kind is _Kind.TENSOR and field == _EXTERNAL_DATA:
            raise _external()
        elif kind is _Kind.NODE and field == _DOMAIN and bytes(value) not in _DOMAINS:
            raise BundleError(
                "the model uses custom operators, which this runtime refuses; export it without"
            )
        elif field in into:
            _walk(value, into[field], depth + 1, unsafe)


def _batch_unsafe(node: memoryview) -> str:
    """The operator of a NodeProto if it computes over all rows of a batch, else "".

    BatchNormalization does so in training mode, which shows in the attribute `training_mode` (from opset 14) or, before
    that, in more than one output.
    """
    operator, outputs, is_training = b"", 0, False
    for field, value in _fields(node):
        if isinstance(value, int):
            continue
        if field == _OPERATOR:
            operator = bytes(value)
        elif field == _OUTPUT:
            outputs += len(value) > 0  # an empty name stands for an output that is not used
        elif (
            field == _ATTRIBUTE and len(value) < 64
        ):  # the attribute sought is 20 bytes, tensors may be megabytes
            parts = dict(_fields(value))
            name, mode = parts.get(_NAME), parts.get(_INTEGER, 0)
            is_training |= isinstance(name, memoryview) and name.tobytes() == b"training_mode" and mode != 0
    is_unsafe = operator in _BATCH_UNSAFE or (
        operator == b"BatchNormalization" and (is_training or outputs > 1)
    )
    return operator.decode() if is_unsafe else ""


def _external() -> BundleError:
    return BundleError(
        "the model keeps tensors in other files, which is refused; save it with its data inside"
    )


def _broken() -> BundleError:
    return BundleError("the model is not a readable ONNX file; export it again")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the field number and the value (varint or bytes) of each field of a message. Fixed-width values are skipped."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at, end)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield field, value
        elif wire == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise _broken()
            yield field, data[at : at + length]
            at += length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            if at > end:
                raise _broken()
        else:  # groups are not part of proto3
            raise _broken()


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _broken()
