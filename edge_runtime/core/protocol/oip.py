"""Bytes <-> messages: the Open Inference Protocol v2 with its binary tensor extension, one codec for HTTP and MQTT.

A body is JSON, or a JSON header of `json_length` bytes followed by the raw little-endian tensors in the
header's order. Every length is checked before it is believed; errors never repeat bytes of the request.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from edge_runtime.core.errors import (
    EngineFailed,
    InvalidRequest,
    TooLarge,
)
from edge_runtime.core.messages import (
    InferReply,
    InferRequest,
    OutputRequest,
    Scalar,
    Signature,
    Tensor,
)
from edge_runtime.core.protocol.oip_checks import (
    KNOWN_PARAMETERS,
    LIMITS,
    TensorEntry,
    check_counts,
    check_inputs,
    check_outputs,
    check_tensor,
    decode_json,
    is_absent,
    read_output,
    read_outputs,
    read_parameters,
    tensor_parameters,
)
from edge_runtime.core.protocol.tensor_data import (
    Steps,
    is_long,
    read_binary,
    read_json,
    reading_binary,
    reading_json,
    write_binary,
    write_json,
    writing_json,
)

#: Places of faults, made once: to format them for each tensor would cost every request a tenth of its decoding.
_INPUTS, _OUTPUTS = ([f"{word}[{at}]" for at in range(LIMITS.tensors)] for word in ("inputs", "outputs"))
_LARGE_JSON_BYTES = 16 << 10


class _Request(msgspec.Struct):
    inputs: list[TensorEntry]
    id: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"")
    outputs: msgspec.Raw = msgspec.Raw(b"")


class _Reply(msgspec.Struct):
    model_name: str
    outputs: list[TensorEntry]
    model_version: str | None = None
    id: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"")


class _Named(msgspec.Struct):
    name: str


class _NamedInputs(msgspec.Struct):
    inputs: list[_Named]


_request_decoder = msgspec.json.Decoder(_Request)
_reply_decoder = msgspec.json.Decoder(_Reply)
_names_decoder = msgspec.json.Decoder(_NamedInputs)
_encoder = msgspec.json.Encoder()


def decode_request(
    body: bytes | bytearray, json_length: int | None, signature: Signature | None = None
) -> InferRequest:
    """Decode a request; `json_length` is None for pure JSON.

    With `signature`, the names, datatypes and shapes are compared with the model's before any data is decoded.
    Raises InvalidRequest and its kin, with the place of the fault.
    """
    head, tail = _split(body, json_length)
    message = _check_request(head, signature)
    return _request(message, _tensors(_INPUTS, message.inputs, tail))


def decoding_request(
    body: bytes | bytearray, json_length: int | None, signature: Signature | None = None
) -> Steps[InferRequest]:
    """Do what `decode_request` does, in steps, so that a body of megabytes stops nobody else."""
    head, tail = _split(body, json_length)
    if len(head) > _LARGE_JSON_BYTES:  # half a million entries are refused before they are decoded
        if len(decode_json(_names_decoder, head).inputs) > LIMITS.tensors:
            raise TooLarge(f"More than {LIMITS.tensors} inputs.")
        yield
    message = _check_request(head, signature)
    yield
    return _request(message, (yield from _tensors_in_steps(_INPUTS, message.inputs, tail)))


def decode_reply(body: bytes, json_length: int | None) -> InferReply:
    """Decode a reply. Raises InvalidRequest and its kin."""
    head, tail = _split(body, json_length)
    message: _Reply = decode_json(_reply_decoder, head)
    check_counts(message.outputs, (), message.id)
    for place, entry in zip(_OUTPUTS, message.outputs, strict=False):
        check_tensor(place, entry)
    return InferReply(
        model_name=message.model_name,
        model_version=message.model_version or "",
        outputs=_tensors(_OUTPUTS, message.outputs, tail),
        id=message.id or "",
        parameters=read_parameters(
            "parameters", message.parameters, refuse_unknown_values_of=KNOWN_PARAMETERS
        ),
    )


def encode_request(request: InferRequest, *, binary: bool = False) -> tuple[bytes, int | None]:
    """Encode a request; the second value is the length of its JSON part, or None if that is all."""
    tail: list[bytes] = []
    tree: dict[str, Any] = {
        "inputs": [
            _binary_tree(tensor, tail) if binary else _json_tree(tensor, write_json(tensor, InvalidRequest))
            for tensor in request.inputs
        ]
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
    """Encode a reply; the second value is the length of its JSON part, or None if that is all.

    Raises Unsupported, and EngineFailed where the model answered with NaN or infinity.
    """
    tail: list[bytes] = []
    outputs = [
        _binary_tree(tensor, tail)
        if tensor.name in reply.binary_outputs
        else _json_tree(tensor, write_json(tensor, EngineFailed))
        for tensor in reply.outputs
    ]
    return _join(_reply_tree(reply, outputs), tail)


def is_long_reply(reply: InferReply) -> bool:
    """Whether a reply is better encoded in steps."""
    return any(map(is_long, reply.outputs))


def encoding_reply(reply: InferReply) -> Steps[tuple[bytes, int | None]]:
    """Do what `encode_reply` does, in steps."""
    tail: list[bytes] = []
    outputs = []
    for tensor in reply.outputs:
        if tensor.name in reply.binary_outputs:
            outputs.append(_binary_tree(tensor, tail))
        else:
            outputs.append(_json_tree(tensor, (yield from writing_json(tensor, EngineFailed))))
        yield
    return _join(_reply_tree(reply, outputs), tail)


#: The `reason` of an error that repeating the request cannot cure.
INVALID = "invalid"


def encode_error(message: str, **fields: Scalar) -> bytes:
    """`{"error": message, ...}`, the protocol's only error form."""
    return _encoder.encode({"error": message, **fields})


def decode_error(body: bytes) -> tuple[str, dict[str, Scalar]]:
    """The inverse of `encode_error`. Raises InvalidRequest."""
    tree = decode_json(msgspec.json.Decoder(dict[str, Any]), body)
    message = tree.pop("error", None)
    if not isinstance(message, str):
        raise InvalidRequest("The error reply carries no error text.")
    return message, {key: value for key, value in tree.items() if isinstance(value, str | int | float | bool)}


def _split(body: bytes | bytearray, json_length: int | None) -> tuple[bytes | memoryview, memoryview]:
    view = memoryview(body)
    if json_length is None:
        if len(body) > LIMITS.json_bytes:
            raise TooLarge(f"The JSON body is longer than {LIMITS.json_bytes} bytes; send tensors in binary.")
        return view, view[:0]
    if not 0 <= json_length <= len(body):
        raise InvalidRequest(
            "Inference-Header-Content-Length is longer than the body; send the length of the JSON."
        )
    if json_length > LIMITS.header_bytes:
        raise TooLarge(f"The JSON header is longer than {LIMITS.header_bytes} bytes.")
    return view[:json_length], view[json_length:]


def _check_request(head: bytes | memoryview, signature: Signature | None) -> _Request:
    """Everything that can be refused without looking at data."""
    message: _Request = decode_json(_request_decoder, head)
    check_counts(message.inputs, (), message.id)
    for place, entry in zip(_INPUTS, message.inputs, strict=False):
        check_tensor(place, entry)
    if signature is not None:
        check_inputs(message.inputs, signature.inputs)
        if message.outputs:
            check_outputs(read_outputs(message.outputs), signature)
    return message


def _request(message: _Request, inputs: tuple[Tensor, ...]) -> InferRequest:
    outputs: tuple[OutputRequest, ...] = ()
    parameters: dict[str, Scalar] = {}
    binary_default = False
    if message.parameters:
        parameters = read_parameters("parameters", message.parameters, KNOWN_PARAMETERS)
        binary_default = parameters.pop("binary_data_output", False) is True
    if message.outputs:
        entries = read_outputs(message.outputs)
        outputs = tuple(
            [
                read_output(place, entry, binary_default)
                for place, entry in zip(_OUTPUTS, entries, strict=False)
            ]
        )
    return InferRequest(inputs, message.id or "", parameters, outputs, binary_default)


def _tensors(places: Sequence[str], entries: Sequence[TensorEntry], tail: memoryview) -> tuple[Tensor, ...]:
    tensors = []
    for place, entry in zip(places, entries, strict=False):
        raw, tail = _raw_data(place, entry, tail)
        read: Callable[..., Any] = read_json if isinstance(raw, bytes) else read_binary
        shape = tuple(entry.shape)
        data = read(place, entry.datatype, shape, raw, LIMITS.element_bytes)
        tensors.append(Tensor(entry.name, entry.datatype, shape, data))
    _check_end(tail)
    return tuple(tensors)


def _tensors_in_steps(
    places: Sequence[str], entries: Sequence[TensorEntry], tail: memoryview
) -> Steps[tuple[Tensor, ...]]:
    tensors = []
    for place, entry in zip(places, entries, strict=False):
        raw, tail = _raw_data(place, entry, tail)
        reading: Callable[..., Steps[Any]] = reading_json if isinstance(raw, bytes) else reading_binary
        shape = tuple(entry.shape)
        data = yield from reading(place, entry.datatype, shape, raw, LIMITS.element_bytes)
        tensors.append(Tensor(entry.name, entry.datatype, shape, data))
        yield
    _check_end(tail)
    return tuple(tensors)


def _raw_data(place: str, entry: TensorEntry, tail: memoryview) -> tuple[bytes | memoryview, memoryview]:
    """The data of a tensor, as bytes of JSON or a view of the binary part, and what is left of the binary part."""
    size: Scalar | None = None
    if entry.parameters:
        size = tensor_parameters(place, entry.parameters).get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail):
            raise InvalidRequest(f"{place}: binary_data_size does not fit the body.")
        return tail[:size], tail[size:]
    if is_absent(entry.data):
        raise InvalidRequest(f"{place}: the tensor has neither data nor binary_data_size.")
    return bytes(entry.data), tail


def _check_end(tail: memoryview) -> None:
    if tail:
        raise InvalidRequest("The body holds more bytes than its tensors announce.")


def _reply_tree(reply: InferReply, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "model_name": reply.model_name,
        "model_version": reply.model_version,
        "parameters": reply.parameters,
        "outputs": outputs,
    }
    if reply.id:
        tree["id"] = reply.id
    return tree


def _json_tree(tensor: Tensor, data: list[Any] | msgspec.Raw) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "data": data}


def _binary_tree(tensor: Tensor, tail: list[bytes]) -> dict[str, Any]:
    raw = write_binary(tensor)
    tail.append(raw)
    size = {"binary_data_size": len(raw)}
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "parameters": size}


def _join(tree: dict[str, Any], tail: list[bytes]) -> tuple[bytes, int | None]:
    head = _encoder.encode(tree)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)
