"""Outcomes to bytes and back, for the disk level of the cache."""

import re

import msgspec
import numpy as np

from edge_runtime.core.messages import Answer, Array, Origin, Reason
from edge_runtime.core.outcome import Outcome


class _Value(msgspec.Struct, frozen=True, array_like=True):
    dtype: str  # numpy's word with its byte order, or "" for text
    shape: tuple[int, ...]
    data: bytes


class _Kept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    reason: Reason
    confidence: float | None
    values: tuple[_Value, ...]
    extras: tuple[_Value, ...]
    cloud_version: str
    raw_score: float | None


#: What `dtype.str` of numbers looks like. Other words of numpy make objects, dates, texts or records of bytes.
_NUMBERS = re.compile(r"[<>|][biufc]\d{1,2}")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Kept)


def encode_outcome(outcome: Outcome) -> bytes:
    """Encode answer, reason and the cloud's version; times are left out. Arrays come back bit-equal."""
    answer = outcome.answer
    return _encoder.encode(
        _Kept(
            outcome.reason,
            answer.confidence,
            tuple(_pack(value) for value in answer.values),
            tuple(_pack(value) for value in answer.extras),
            outcome.cloud_version,
            answer.raw_score,
        )
    )


def decode_outcome(raw: bytes) -> Outcome:
    """Decode what `encode_outcome` wrote, as a cache hit. Raises ValueError for other bytes."""
    try:
        kept = _decoder.decode(raw)
        extras = tuple(np.asarray(_unpack(value)) for value in kept.extras)
        answer = Answer(
            tuple(_unpack(value) for value in kept.values), kept.confidence, extras, kept.raw_score
        )
    except (msgspec.MsgspecError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    return Outcome(answer, Origin.CACHE, kept.reason, cloud_version=kept.cloud_version)


def _pack(value: "bytes | Array | np.generic") -> _Value:
    if isinstance(value, bytes):
        return _Value("", (), value)
    return _Value(value.dtype.str, value.shape, value.tobytes())


def _unpack(value: _Value) -> "bytes | Array | np.generic":
    if not value.dtype:
        return value.data
    if not _NUMBERS.fullmatch(value.dtype) or any(length < 0 for length in value.shape):
        raise ValueError(f"{value.dtype[:20]!r} of shape {value.shape} is no array of numbers")
    array = np.frombuffer(value.data, np.dtype(value.dtype)).reshape(value.shape)
    return array if value.shape else array[()]
