"""Bytes <-> messages: the Open Inference Protocol v2 with its binary tensor extension, one codec for HTTP and MQTT.

A body is JSON, or a JSON header of `json_length` bytes followed by the raw little-endian tensors in the
header's order. Every length is checked before it is believed; errors never repeat bytes of the request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from edge_runtime.core.errors import InvalidRequest, TooLarge, Unsupported
from edge_runtime.core.messages import DTYPES, InferReply, InferRequest, OutputRequest, Scalar, Tensor


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Caps on what is decoded; each refusal names its limit."""

    json_bytes: int = 2 << 20
    header_bytes: int = 64 << 10
    tensors: int = 32
    rank: int = 8
    elements: int = 1 << 24
    rows: int = 1024
    element_bytes: int = 64 << 10  # of one BYTES element
    id_bytes: int = 64
    parameters: int = 32
    parameter_bytes: int = 1024


LIMITS = WireLimits()


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


class _Reply(msgspec.Struct):
    model_name: str
    outputs: list[_Tensor]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


_request_decoder = msgspec.json.Decoder(_Request)
_reply_decoder = msgspec.json.Decoder(_Reply)
_any_decoder = msgspec.json.Decoder(list)
_texts_decoder = msgspec.json.Decoder(list[str])
_encoder = msgspec.json.Encoder()


def decode_request(body: bytes, json_length: int | None) -> InferRequest:
    """Decode a request; `json_length` is None for pure JSON. Raises InvalidRequest and its kin."""
    head, tail = _split(body, json_length)
    message: _Request = _decode(_request_decoder, head)
    _check_counts(message.inputs, message.outputs, message.id)
    parameters = _parameters(message.parameters)
    binary_default = parameters.pop("binary_data_output", False) is True
    return InferRequest(
        inputs=_tensors(message.inputs, tail),
        id=message.id,
        parameters=parameters,
        outputs=tuple(_output(output, binary_default=binary_default) for output in message.outputs),
        binary_default=binary_default,
    )


def decode_reply(body: bytes, json_length: int | None) -> InferReply:
    """Decode a reply. Raises InvalidRequest and its kin."""
    head, tail = _split(body, json_length)
    message: _Reply = _decode(_reply_decoder, head)
    _check_counts(message.outputs, [], message.id)
    return InferReply(
        model_name=message.model_name,
        model_version=message.model_version,
        outputs=_tensors(message.outputs, tail),
        id=message.id,
        parameters=_parameters(message.parameters),
    )


def encode_request(request: InferRequest, *, binary: bool = False) -> tuple[bytes, int | None]:
    """Encode a request; the second value is the length of its JSON part, or None if that is all."""
    tail: list[bytes] = []
    tree: dict[str, Any] = {
        "inputs": [_tensor_tree(tensor, tail if binary else None) for tensor in request.inputs]
    }
    if request.id:
        tree["id"] = request.id
    parameters = dict(request.parameters)
    if request.binary_default:
        parameters["binary_data_output"] = True
    if parameters:
        tree["parameters"] = parameters
    if request.outputs:
        tree["outputs"] = [{"name": o.name, "parameters": {"binary_data": o.binary}} for o in request.outputs]
    return _join(tree, tail)


def encode_reply(reply: InferReply) -> tuple[bytes, int | None]:
    """Encode a reply; the second value is the length of its JSON part, or None if that is all."""
    tail: list[bytes] = []
    tree: dict[str, Any] = {
        "model_name": reply.model_name,
        "model_version": reply.model_version,
        "parameters": reply.parameters,
        "outputs": [
            _tensor_tree(tensor, tail if tensor.name in reply.binary_outputs else None)
            for tensor in reply.outputs
        ],
    }
    if reply.id:
        tree["id"] = reply.id
    return _join(tree, tail)


#: The `reason` of an error that repeating the request cannot mend.
INVALID = "invalid"


def encode_error(message: str, **fields: Scalar) -> bytes:
    """`{"error": message, ...}`, the protocol's only error form."""
    return _encoder.encode({"error": message, **fields})


def decode_error(body: bytes) -> tuple[str, dict[str, Scalar]]:
    """The inverse of `encode_error`. Raises InvalidRequest."""
    tree = _decode(msgspec.json.Decoder(dict[str, Any]), body)
    message = tree.pop("error", None)
    if not isinstance(message, str):
        raise InvalidRequest("The error reply carries no error text.")
    return message, {key: value for key, value in tree.items() if isinstance(value, str | int | float | bool)}


def _split(body: bytes, json_length: int | None) -> tuple[bytes, memoryview]:
    if json_length is None:
        if len(body) > LIMITS.json_bytes:
            raise TooLarge(f"The JSON body is longer than {LIMITS.json_bytes} bytes; send tensors in binary.")
        return body, memoryview(b"")
    if not 0 <= json_length <= len(body):
        raise InvalidRequest(
            "Inference-Header-Content-Length is longer than the body; send the length of the JSON."
        )
    if json_length > LIMITS.header_bytes:
        raise TooLarge(f"The JSON header is longer than {LIMITS.header_bytes} bytes.")
    return body[:json_length], memoryview(body)[json_length:]


def _decode(decoder: "msgspec.json.Decoder[Any]", raw: bytes | msgspec.Raw) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The JSON does not fit the protocol: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(
            "The JSON is malformed; send one UTF-8 object of the Open Inference Protocol."
        ) from None
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None


def _check_counts(tensors: Sequence[_Tensor], outputs: Sequence[_Output], request_id: str) -> None:
    if len(tensors) > LIMITS.tensors or len(outputs) > LIMITS.tensors:
        raise TooLarge(f"More than {LIMITS.tensors} tensors.")
    if len(request_id) > LIMITS.id_bytes:
        raise TooLarge(f"The id is longer than {LIMITS.id_bytes} characters.")


#: Request parameters with a meaning here.
_OURS = frozenset({"private", "cache", "timeout", "deadline_ms", "priority"})


def _parameters(tree: dict[str, Any]) -> dict[str, Scalar]:
    """Scalars only; other values are unknown to us and ignored, as the protocol asks, but under a name of ours.

    A `private` that is not understood must not be read as if it were not there.
    """
    for name in tree.keys() & _OURS:
        if not isinstance(tree[name], str | int | float | bool):
            raise InvalidRequest(f"Parameter {name} must be a single value.")
    if len(tree) > LIMITS.parameters:
        raise TooLarge(f"More than {LIMITS.parameters} parameters.")
    known = {key: value for key, value in tree.items() if isinstance(value, str | int | float | bool)}
    if any(
        len(key) + (len(value) if isinstance(value, str) else 0) > LIMITS.parameter_bytes
        for key, value in known.items()
    ):
        raise TooLarge(f"A parameter is longer than {LIMITS.parameter_bytes} characters.")
    return known


def _output(output: _Output, *, binary_default: bool) -> OutputRequest:
    if output.parameters.get("classification"):
        raise Unsupported("The classification extension is not offered; read the confidence output.")
    return OutputRequest(output.name, output.parameters.get("binary_data", binary_default) is True)


def _tensors(entries: Sequence[_Tensor], tail: memoryview) -> tuple[Tensor, ...]:
    tensors = []
    for entry in entries:
        size = entry.parameters.get("binary_data_size")
        count = _count(entry)
        data: Any
        if size is None:
            data = _from_json(entry, count)
        else:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail):
                raise InvalidRequest("A tensor's binary_data_size does not fit the body.")
            data = _from_binary(entry, count, tail[:size])
            tail = tail[size:]
        tensors.append(Tensor(entry.name, entry.datatype, tuple(entry.shape), data))
    if len(tail):
        raise InvalidRequest("The body holds more bytes than its tensors announce.")
    return tuple(tensors)


def _count(entry: _Tensor) -> int:
    shape = entry.shape
    if len(shape) > LIMITS.rank:
        raise TooLarge(f"A shape has more than {LIMITS.rank} axes.")
    if any(length < 0 for length in shape):
        raise InvalidRequest("A shape has a negative length.")
    count = math.prod(shape)  # Python's integers cannot wrap around, numpy's can
    if count > LIMITS.elements:
        raise TooLarge(f"A tensor has more than {LIMITS.elements} elements.")
    if shape and shape[0] > LIMITS.rows:
        raise TooLarge(f"A tensor has more than {LIMITS.rows} rows; send several requests.")
    if entry.datatype != "BYTES" and entry.datatype not in DTYPES:
        if entry.datatype == "BF16":
            raise Unsupported("Datatype BF16 is not offered; send FP32.")
        raise InvalidRequest("Unknown datatype; use a word of the protocol such as FP32, INT64 or BYTES.")
    return count


def _from_json(entry: _Tensor, count: int) -> Any:
    if not entry.data:
        raise InvalidRequest("A tensor has neither data nor binary_data_size.")
    if entry.datatype == "BYTES":
        return _texts(entry, count)
    if entry.datatype == "FP16":
        raise InvalidRequest("FP16 travels in binary only; send FP32 or use the binary extension.")
    flat = _flatten(_decode(_any_decoder, entry.data))
    _expect(len(flat), count)
    dtype = DTYPES[entry.datatype]
    kinds: tuple[type, ...] = {"b": (bool,), "f": (int, float)}.get(dtype.kind, (int,))
    if not all(type(value) in kinds for value in flat):
        raise InvalidRequest(f"A {entry.datatype} tensor holds values of another kind.")
    try:
        return np.array(flat, dtype).reshape(entry.shape)
    except (OverflowError, ValueError):
        raise InvalidRequest(f"A value does not fit {entry.datatype}.") from None


def _texts(entry: _Tensor, count: int) -> tuple[bytes, ...]:
    try:
        values: list[Any] = _texts_decoder.decode(entry.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        tree = _decode(_any_decoder, entry.data)
        # An element that is not UTF-8 is a list of byte values; anything deeper is nesting by shape.
        values = _flatten(tree, leaf_lists=bool(tree) and _depth(tree) > len(entry.shape))
    _expect(len(values), count)
    raws = []
    for value in values:
        if isinstance(value, str):
            raw = value.encode("utf-8")
        elif isinstance(value, list) and all(type(item) is int and 0 <= item <= 255 for item in value):
            raw = bytes(value)
        else:
            raise InvalidRequest("A BYTES element is neither text nor a list of byte values.")
        _check_element(len(raw))
        raws.append(raw)
    return tuple(raws)


def _depth(tree: Any) -> int:
    depth = 0
    while isinstance(tree, list):
        depth += 1
        tree = tree[0] if tree else None
    return depth


def _flatten(tree: list[Any], *, leaf_lists: bool = False) -> list[Any]:
    for _ in range(LIMITS.rank):
        if not any(isinstance(item, list) for item in tree):
            return tree
        if leaf_lists and all(
            isinstance(i, str) or (isinstance(i, list) and all(type(x) is int for x in i)) for i in tree
        ):
            return tree
        tree = [leaf for item in tree for leaf in (item if isinstance(item, list) else [item])]
    raise TooLarge(f"Tensor data is nested deeper than {LIMITS.rank} axes.")


def _from_binary(entry: _Tensor, count: int, raw: memoryview) -> Any:
    if entry.datatype == "BYTES":
        return _split_bytes(raw, count)
    dtype = DTYPES[entry.datatype]
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest("A tensor's binary_data_size is not shape times element size.")
    if dtype.kind == "b" and any(byte > 1 for byte in raw):
        raise InvalidRequest("A BOOL tensor holds bytes other than 0 and 1.")
    return np.frombuffer(bytes(raw), dtype).reshape(entry.shape)


def _split_bytes(raw: memoryview, count: int) -> tuple[bytes, ...]:
    """Each element is a 4-byte little-endian length and its bytes."""
    values, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            raise InvalidRequest("A BYTES element's length passes the end of its tensor.")
        _check_element(end - at - 4)
        values.append(bytes(raw[at + 4 : end]))
        at = end
        if len(values) > count:
            break
    _expect(len(values), count)
    return tuple(values)


def _check_element(size: int) -> None:
    if size > LIMITS.element_bytes:
        raise TooLarge(f"A BYTES element is longer than {LIMITS.element_bytes} bytes.")


def _expect(found: int, count: int) -> None:
    if found != count:
        raise InvalidRequest(f"A tensor holds {found} elements where its shape says {count}.")


def _tensor_tree(tensor: Tensor, tail: list[bytes] | None) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if tail is not None:
        if isinstance(tensor.data, tuple):
            raw = b"".join([len(value).to_bytes(4, "little") + value for value in tensor.data])
        else:
            raw = np.ascontiguousarray(tensor.data, DTYPES[tensor.datatype]).tobytes()
        tail.append(raw)
        tree["parameters"] = {"binary_data_size": len(raw)}
    elif isinstance(tensor.data, tuple):
        tree["data"] = [_text(value) for value in tensor.data]
    else:
        if tensor.datatype == "FP16":
            raise Unsupported(f"Tensor {tensor.name} is FP16, which travels in binary only; ask for it so.")
        flat = tensor.data.reshape(-1)
        if flat.dtype.kind == "f" and not np.isfinite(flat).all():
            raise InvalidRequest(
                f"Output {tensor.name} is not finite and JSON cannot carry it; ask for it in binary."
            )
        tree["data"] = flat.tolist()
    return tree


def _text(value: bytes) -> str | list[int]:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return list(value)


def _join(tree: dict[str, Any], tail: list[bytes]) -> tuple[bytes, int | None]:
    head = _encoder.encode(tree)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)
