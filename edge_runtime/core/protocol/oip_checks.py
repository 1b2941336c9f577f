"""What is checked of a message before any tensor data is decoded: names, counts, shapes, parameters.

A refusal must be cheap: a request for a wrong input, or with two million elements, is refused for what its JSON says,
not after its data was decoded. Every length is checked before it is believed, and errors never repeat bytes of the
request: the place of a fault is an index.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_runtime.core.errors import InvalidRequest, TooLarge, Unsupported
from edge_runtime.core.messages import DTYPES, OutputRequest, Scalar, Signature, TensorSpec


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Caps on what is decoded; each refusal names its limit."""

    json_bytes: int = 2 << 20
    header_bytes: int = 64 << 10
    tensors: int = 32
    rank: int = 8
    elements: int = 1 << 24
    texts: int = 1 << 18  # elements of one BYTES tensor: each is a Python object
    rows: int = 1024
    element_bytes: int = 64 << 10  # of one BYTES element
    id_bytes: int = 64
    parameters: int = 32
    parameter_bytes: int = 1024


LIMITS = WireLimits()


class TensorEntry(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: msgspec.Raw = msgspec.Raw(b"")
    data: msgspec.Raw = msgspec.Raw(b"")


class OutputEntry(msgspec.Struct):
    name: str
    parameters: msgspec.Raw = msgspec.Raw(b"")


_outputs_decoder = msgspec.json.Decoder(list[OutputEntry])
_parameters_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_scalar_decoder = msgspec.json.Decoder(str | int | float | bool)


def decode_json(decoder: "msgspec.json.Decoder[Any]", raw: bytes | memoryview | msgspec.Raw) -> Any:
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


def is_absent(raw: msgspec.Raw) -> bool:
    """Whether an optional value is missing; an explicit null is the same."""
    return not raw or bytes(raw) == b"null"


def check_counts(
    tensors: Sequence[TensorEntry], outputs: Sequence[OutputEntry], request_id: str | None
) -> None:
    if len(tensors) > LIMITS.tensors or len(outputs) > LIMITS.tensors:
        raise TooLarge(f"More than {LIMITS.tensors} tensors.")
    if request_id and len(request_id) > LIMITS.id_bytes:
        raise TooLarge(f"The id is longer than {LIMITS.id_bytes} characters.")


#: Request parameters with a meaning here.
KNOWN_PARAMETERS = frozenset({"private", "cache", "timeout", "deadline_ms", "priority"})
#: A flag with a careful meaning: a null is refused, since it would be read as false.
_NEVER_NULL = frozenset({"private"})


def read_parameters(
    place: str, raw: msgspec.Raw, refuse_unknown_values_of: frozenset[str] = frozenset()
) -> dict[str, Scalar]:
    """Scalars only; other values are unknown and ignored, as the protocol asks, but under a name that is known here.

    A `private` that is not understood must not be read as if it were not there.
    """
    if is_absent(raw):
        return {}
    if len(raw) > LIMITS.header_bytes:  # before it is decoded: 200,000 names take a tenth of a second
        raise TooLarge(f"{place}: longer than {LIMITS.header_bytes} bytes.")
    tree: dict[str, msgspec.Raw] = decode_json(_parameters_decoder, raw)
    if len(tree) > LIMITS.parameters:
        raise TooLarge(f"{place}: more than {LIMITS.parameters} entries.")
    known: dict[str, Scalar] = {}
    for name, value in tree.items():
        first = bytes(value)[:1]
        if first == b"n" and name not in _NEVER_NULL:
            continue
        if first in b"[{n":
            if name in refuse_unknown_values_of:
                raise InvalidRequest(f"Parameter {name} must be a single value.")
            continue
        known[name] = scalar = decode_json(_scalar_decoder, value)
        if len(name) + (len(scalar) if isinstance(scalar, str) else 0) > LIMITS.parameter_bytes:
            raise TooLarge(f"{place}: an entry is longer than {LIMITS.parameter_bytes} characters.")
    return known


def tensor_parameters(place: str, raw: msgspec.Raw) -> dict[str, Scalar]:
    parameters = read_parameters(f"{place}.parameters", raw)
    if "shared_memory_region" in parameters:
        raise InvalidRequest(
            f"{place}.parameters.shared_memory_region: shared memory is not offered; send and ask for the data itself."
        )
    return parameters


def read_outputs(raw: msgspec.Raw) -> list[OutputEntry]:
    if is_absent(raw):
        return []
    if len(raw) > LIMITS.header_bytes:
        raise TooLarge(f"outputs: longer than {LIMITS.header_bytes} bytes.")
    found: list[OutputEntry] = decode_json(_outputs_decoder, raw)
    return found


def read_output(place: str, output: OutputEntry, binary_default: bool) -> OutputRequest:
    parameters = tensor_parameters(place, output.parameters)
    if parameters.get("classification"):
        raise Unsupported("The classification extension is not offered; read the confidence output.")
    return OutputRequest(output.name, parameters.get("binary_data", binary_default) is True)


def check_inputs(entries: Sequence[TensorEntry], specs: Sequence[TensorSpec]) -> None:
    """Compare the inputs with the model's, so that no data is decoded which the model cannot take."""
    for at, entry in enumerate(entries):
        for spec in specs:
            if spec.name == entry.name:
                break
        else:
            names = ", ".join(repr(spec.name) for spec in specs)
            raise InvalidRequest(
                f"inputs[{at}]: this model has no input of that name; its inputs are {names}."
            )
        if entry.datatype != spec.datatype:
            raise InvalidRequest(
                f"inputs[{at}]: input {spec.name!r} has datatype {spec.datatype}; send that."
            )
        if not _fits(entry.shape, spec.shape):
            raise InvalidRequest(
                f"inputs[{at}]: input {spec.name!r} has shape {list(spec.shape)}, -1 standing for any length."
            )


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    if len(wanted) == 1 and wanted[0] == -1:  # texts, the commonest input
        return len(shape) == 1
    return len(shape) == len(wanted) and all(
        want in (-1, have) for have, want in zip(shape, wanted, strict=True)
    )


def check_outputs(outputs: Sequence[OutputEntry], signature: Signature) -> None:
    known = {spec.name for spec in (*signature.outputs, *signature.on_request)}
    for at, output in enumerate(outputs):
        if output.name not in known:
            names = ", ".join(repr(spec.name) for spec in (*signature.outputs, *signature.on_request))
            raise InvalidRequest(
                f"outputs[{at}]: this model has no output of that name; its outputs are {names}."
            )


def check_tensor(place: str, entry: TensorEntry) -> None:
    """Compare a tensor's shape and datatype with the limits. Raises InvalidRequest and its kin."""
    shape = entry.shape
    if len(shape) > LIMITS.rank:
        raise TooLarge(f"{place}: the shape has more than {LIMITS.rank} axes.")
    if any(length < 0 for length in shape):
        raise InvalidRequest(f"{place}: the shape has a negative length.")
    count = math.prod(shape)  # Python's integers cannot wrap around, numpy's can
    if count > LIMITS.elements:
        raise TooLarge(f"{place}: the tensor has more than {LIMITS.elements} elements.")
    if shape and shape[0] > LIMITS.rows:
        raise TooLarge(f"{place}: the tensor has more than {LIMITS.rows} rows; send several requests.")
    if entry.datatype == "BYTES":
        if count > LIMITS.texts:
            raise TooLarge(f"{place}: the tensor has more than {LIMITS.texts} BYTES elements.")
    elif entry.datatype not in DTYPES:
        if entry.datatype == "BF16":
            raise Unsupported(f"{place}: datatype BF16 is not offered; send FP32.")
        raise InvalidRequest(
            f"{place}: unknown datatype; use a word of the protocol such as FP32, INT64 or BYTES."
        )
