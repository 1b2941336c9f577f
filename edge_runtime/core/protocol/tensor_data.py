"""Tensor data <-> bytes: JSON arrays, and the raw little-endian form of the binary tensor extension.

A body of 8 MiB can hold a million elements, and an event loop that decodes them at once answers nobody for a second.
So all functions that touch each element are generators: they yield after every few thousand elements (`Steps`), and a
shell serves others between two steps. `complete` runs the steps to their end for callers without a loop.

What the data says and what the shape says must agree exactly: a number that does not fit its datatype, or an array
nested unlike its shape, is refused with its place. To cut or to fill would be a wrong answer that looks right.
"""

import math
import re
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from edge_runtime.core.errors import EdgeRuntimeError, InvalidRequest, TooLarge, Unsupported
from edge_runtime.core.messages import DTYPES, Array, Tensor

T = TypeVar("T")
#: Work that yields between its steps and returns a value.
Steps = Generator[None, None, T]

#: Elements between two yields: 0.5 to 3 ms of work, depending on the datatype and the processor.
_STEP = 8192
#: Bytes of JSON numbers between two yields.
_STEP_BYTES = 32 << 10
#: Lists within the JSON of one BYTES tensor. Each costs 0.5 us and 64 bytes, however short its text.
_MAX_LISTS = 16_384
#: The largest value that rounds to a finite FP32 is below this: half a unit beyond the largest FP32.
_FP32_BOUND = 2.0**128 - 2.0**103

_encode = msgspec.json.Encoder().encode
_DECODERS: "dict[str, msgspec.json.Decoder[Any]]" = {
    "f": msgspec.json.Decoder(list[float]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "b": msgspec.json.Decoder(list[bool]),
}
_texts_decoder = msgspec.json.Decoder(list[str])
_BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")
_OPENING = re.compile(rb"[\[\s]*")
_ALL_BUT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))


def complete(steps: Steps[T]) -> T:
    """Run all steps and return their value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def read_json(
    place: str, datatype: str, shape: Sequence[int], raw: bytes, element_limit: int
) -> Array | tuple[bytes, ...]:
    """Return the data of a JSON array that is flat in row-major order, or nested as the shape says.

    Raises InvalidRequest and TooLarge, whose messages begin with `place`.
    """
    if datatype == "BYTES":
        values = _text_values(place, shape, raw)
        return tuple(_as_bytes(place, values, 0, element_limit))
    flat = _without_nesting(place, datatype, shape, raw)
    values = _values(place, datatype, flat)
    _expect(place, len(values), math.prod(shape))
    return _array(place, datatype, values, 0).reshape(shape)


def reading_json(
    place: str, datatype: str, shape: Sequence[int], raw: bytes, element_limit: int
) -> Steps[Array | tuple[bytes, ...]]:
    """Do what `read_json` does, in steps."""
    if len(raw) <= _STEP_BYTES:
        return read_json(place, datatype, shape, raw, element_limit)
    if datatype == "BYTES":
        values = _text_values(place, shape, raw)
        texts: list[bytes] = []
        for at in range(0, len(values), _STEP):
            yield
            texts += _as_bytes(place, values[at : at + _STEP], at, element_limit)
        return tuple(texts)
    flat = _without_nesting(place, datatype, shape, raw)
    count = math.prod(shape)
    _expect(place, flat.count(b",") + 1 if flat else 0, count)  # before the first is decoded
    array: Array = np.empty(count, DTYPES[datatype])
    at = 0
    for part in _between_commas(flat):
        yield
        values = _values(place, datatype, part)
        array[at : at + len(values)] = _array(place, datatype, values, at)
        at += len(values)
    return array.reshape(shape)


def read_binary(
    place: str, datatype: str, shape: Sequence[int], raw: memoryview, element_limit: int
) -> Array | tuple[bytes, ...]:
    """Return the data of a raw tensor; an array owns its bytes. Raises InvalidRequest and TooLarge."""
    return complete(reading_binary(place, datatype, shape, raw, element_limit))


def reading_binary(
    place: str, datatype: str, shape: Sequence[int], raw: memoryview, element_limit: int
) -> Steps[Array | tuple[bytes, ...]]:
    """Do what `read_binary` does, in steps."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return (yield from _split_texts(place, raw, count, element_limit))
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest(f"{place}: binary_data_size is not shape times element size.")
    array: Array = np.frombuffer(bytes(raw), dtype).reshape(shape)
    if dtype.kind == "b" and count and array.view(np.uint8).max() > 1:
        raise InvalidRequest(f"{place}: a BOOL tensor holds bytes other than 0 and 1.")
    return array


def write_json(tensor: Tensor, not_finite: type[EdgeRuntimeError]) -> list[Any]:
    """Return the data as a flat JSON array. Raises Unsupported for FP16, `not_finite` for NaN and infinity."""
    if isinstance(tensor.data, tuple):
        return [_text(value) for value in tensor.data]
    flat: list[Any] = _flat(tensor, not_finite).tolist()
    return flat


def is_long(tensor: Tensor) -> bool:
    """Whether the data is numbers that are better written in steps."""
    return not isinstance(tensor.data, tuple) and tensor.data.size > _STEP


def writing_json(tensor: Tensor, not_finite: type[EdgeRuntimeError]) -> Steps[list[Any] | msgspec.Raw]:
    """Do what `write_json` does, in steps; long data comes back encoded."""
    if not is_long(tensor):
        return write_json(tensor, not_finite)
    flat = _flat(tensor, not_finite)
    parts = []
    for at in range(0, len(flat), _STEP):
        parts.append(_encode(flat[at : at + _STEP].tolist())[1:-1])
        yield
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


def _flat(tensor: Tensor, not_finite: type[EdgeRuntimeError]) -> Array:
    if tensor.datatype == "FP16":
        raise Unsupported(f"Tensor {tensor.name} is FP16, which travels in binary only; ask for it so.")
    flat: Array = np.asarray(tensor.data).reshape(-1)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise not_finite(
            f"Tensor {tensor.name} is not finite and JSON cannot carry it; ask for it in binary."
        )
    return flat


def write_binary(tensor: Tensor) -> bytes:
    """Return the raw little-endian form; each element of BYTES is preceded by its length in 4 bytes."""
    if isinstance(tensor.data, tuple):
        return b"".join([len(value).to_bytes(4, "little") + value for value in tensor.data])
    return np.ascontiguousarray(tensor.data, DTYPES[tensor.datatype]).tobytes()


def _values(place: str, datatype: str, flat: bytes) -> list[Any]:
    try:
        values: list[Any] = _DECODERS[DTYPES[datatype].kind].decode(flat) if flat else []
    except (msgspec.DecodeError, RecursionError):  # a part of an array that was cut within a text is no JSON
        raise InvalidRequest(f"{place}: a {datatype} tensor holds values of another kind.") from None
    return values


def _between_commas(flat: bytes) -> Iterator[bytes]:
    """Parts of a flat JSON array, each an array of its own. A comma within a text would make the text no number."""
    at, end = flat.index(b"[") + 1, flat.rindex(b"]")
    while at < end:
        comma = flat.find(b",", at + _STEP_BYTES, end)
        until = end if comma < 0 else comma
        yield b"[" + flat[at:until] + b"]"
        at = until + 1


def _array(place: str, datatype: str, values: list[Any], first: int) -> Array:
    """The array of some values, of which the first has index `first`; each value must fit the datatype."""
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        wide: Array = np.array(values, np.float64)
        if dtype.itemsize == 8:
            return wide
        beyond = np.abs(wide) >= _FP32_BOUND
        if beyond.any():
            raise _unfit(place, datatype, first + int(beyond.argmax()))
        return wide.astype(dtype)
    if dtype.kind != "b" and values:
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        if min(values) < least or max(values) > most:
            unfit = next(at for at, value in enumerate(values) if not least <= value <= most)
            raise _unfit(place, datatype, first + unfit)
    return np.array(values, dtype)


def _unfit(place: str, datatype: str, at: int) -> InvalidRequest:
    return InvalidRequest(f"{place}: the value with index {at} does not fit {datatype}.")


def _without_nesting(place: str, datatype: str, shape: Sequence[int], raw: bytes) -> bytes:
    """The array of numbers without inner brackets; empty where it has no elements.

    The JSON decoder has accepted the document, so the brackets match and stand where JSON allows them. What is left to
    check is whether they stand where the shape has them: two comparisons of bytes, however many lists there are.
    """
    if datatype == "FP16":
        raise InvalidRequest(f"{place}: FP16 travels in binary only; send FP32 or use the binary extension.")
    if raw[:1] != b"[":
        raise InvalidRequest(f"{place}: the data is not an array.")
    if raw.count(b"[") == 1:
        return raw
    structure = raw.translate(None, _ALL_BUT_STRUCTURE)
    axes = list(shape)
    while not _is_nested_as(structure, axes):
        if not axes or axes[0] != 1:  # a leading axis of length 1 may be left out
            raise _nested_otherwise(place)
        del axes[0]
    return b"[" + raw.translate(_BRACKETS_TO_SPACES) + b"]" if math.prod(shape) else b""


def _is_nested_as(structure: bytes, axes: Sequence[int]) -> bool:
    """Whether brackets and commas are those of a nested array with these lengths."""
    length = 0
    for at in range(
        len(axes) - 1, -1, -1
    ):  # its length first: to build it for [2**40, 0] would take 2**41 bytes
        items = axes[at]
        length = 2 + max(items - 1, 0) + (items * length if at < len(axes) - 1 else 0)
    if not axes or length != len(structure):
        return False
    nested = b"[" + b"," * (axes[-1] - 1) + b"]"
    for items in reversed(axes[:-1]):
        nested = b"[" + ((nested + b",") * items)[:-1] + b"]"
    return nested == structure


def _text_values(place: str, shape: Sequence[int], raw: bytes) -> list[Any]:
    """The elements of a BYTES tensor: texts, or lists of byte values where they are not UTF-8."""
    values: list[Any]
    try:
        values = _texts_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        values = _nested_texts(place, shape, raw)
    _expect(place, len(values), math.prod(shape))
    return values


def _as_bytes(place: str, values: list[Any], first: int, limit: int) -> list[bytes]:
    """The bytes of some elements, of which the first has index `first`."""
    texts = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
    for at, text in enumerate(texts):
        if len(text) > limit:
            raise _too_long(place, first + at, limit)
    return texts


def _nested_texts(place: str, shape: Sequence[int], raw: bytes) -> list[Any]:
    """Texts in nested lists; a text that is not UTF-8 is the list of its bytes."""
    if raw.count(b"[") > _MAX_LISTS:
        raise TooLarge(f"{place}: the data has more than {_MAX_LISTS} lists; send it flat or in binary.")
    opening = _OPENING.match(raw)
    opened, leaf = (opening[0].count(b"["), raw[opening.end() : opening.end() + 1]) if opening else (0, b"")
    count = math.prod(shape)
    is_leaf_text = leaf == b'"' or (leaf == b"]" and count == 0)
    nesting = opened if is_leaf_text else opened - 1  # else the innermost list is one text, as its bytes
    axes = list(shape)
    while len(axes) > nesting and axes[0] == 1:  # a leading axis of length 1 may be left out
        del axes[0]
    if nesting == 1:
        axes = [count]
    if nesting < 1 or nesting != len(axes):
        raise _nested_otherwise(place)
    try:
        level: list[Any] = _nested_decoder(nesting).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(
            f"{place}: a BYTES element is neither text nor a list of byte values, or the data is nested unlike its shape."
        ) from None
    for items in axes[1:]:
        if any(len(inner) != items for inner in level):
            raise _nested_otherwise(place)
        level = list(chain.from_iterable(level))
    return level


@lru_cache(maxsize=16)
def _nested_decoder(nesting: int) -> "msgspec.json.Decoder[Any]":
    kind: Any = str | list[Annotated[int, msgspec.Meta(ge=0, le=255)]]
    for _ in range(nesting):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _split_texts(place: str, raw: memoryview, count: int, element_limit: int) -> Steps[tuple[bytes, ...]]:
    """Each element is a 4-byte little-endian length and its bytes."""
    texts: list[bytes] = []
    at, size = 0, len(raw)
    while at < size:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > size or end > size:
            raise InvalidRequest(f"{place}: the length of element {len(texts)} passes the end of its tensor.")
        if end - at - 4 > element_limit:
            raise _too_long(place, len(texts), element_limit)
        texts.append(bytes(raw[at + 4 : end]))
        at = end
        if len(texts) > count:
            break
        if len(texts) % _STEP == 0:
            yield
    _expect(place, len(texts), count)
    return tuple(texts)


def _nested_otherwise(place: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: the data is nested unlike its shape; send it flat in row-major order.")


def _too_long(place: str, at: int, limit: int) -> TooLarge:
    return TooLarge(f"{place}: BYTES element {at} is longer than {limit} bytes.")


def _expect(place: str, found: int, count: int) -> None:
    if found != count:
        raise InvalidRequest(f"{place}: the data has {found} elements where the shape says {count}.")


def _text(value: bytes) -> str | list[int]:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return list(value)
