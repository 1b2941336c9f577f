"""What one row came to, and its bytes for a store that outlives the process."""

import msgspec
import numpy as np

from edge_runtime.core.messages import DEGRADED_REASONS, Answer, Array, Origin, Reason


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One row's answer, where it comes from and why, and where its time went in nanoseconds.

    `cloud_version` is the version of the cloud's model where that one answered.
    """

    answer: Answer
    origin: Origin
    reason: Reason
    queue_ns: int = 0
    infer_ns: int = 0
    cloud_ns: int = 0
    cloud_version: str = ""

    @property
    def is_degraded(self) -> bool:
        """Whether the cloud should have been asked and could not be."""
        return self.reason in DEGRADED_REASONS

    @property
    def is_stale(self) -> bool:
        """Whether it is an earlier answer of the cloud, past its time."""
        return self.reason is Reason.STALE

    def as_kept(self) -> "Outcome":
        """As it is returned from the cache: it cost nothing then."""
        return Outcome(self.answer, Origin.CACHE, self.reason, cloud_version=self.cloud_version)

    def as_stale(self, local: "Outcome") -> "Outcome":
        """As it is returned past its time, in place of the degraded answer `local` whose time was spent."""
        return Outcome(
            self.answer, Origin.CACHE, Reason.STALE, local.queue_ns, local.infer_ns, local.cloud_ns,
            self.cloud_version,
        )  # fmt: skip


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


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Kept)


def encode_outcome(outcome: Outcome) -> bytes:
    """The bytes of what may be kept: answer, reason and the cloud's version. Arrays come back bit-equal."""
    answer = outcome.answer
    return _encoder.encode(
        _Kept(
            outcome.reason,
            answer.confidence,
            tuple(_pack(value) for value in answer.values),
            tuple(_pack(value) for value in answer.extras),
            outcome.cloud_version,
        )
    )


def decode_outcome(raw: bytes) -> Outcome:
    """The inverse of `encode_outcome`, as kept. Raises ValueError for bytes that are not one."""
    try:
        kept = _decoder.decode(raw)
        extras = tuple(np.asarray(_unpack(value)) for value in kept.extras)
        answer = Answer(tuple(_unpack(value) for value in kept.values), kept.confidence, extras)
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
    array = np.frombuffer(value.data, np.dtype(value.dtype)).reshape(value.shape)
    return array if value.shape else array[()]


def payload_bytes(answer: Answer) -> int:
    """What an answer's values take."""
    total = 0
    for value in answer.values:
        total += len(value) if isinstance(value, bytes) else value.nbytes
    for extra in answer.extras:
        total += extra.nbytes
    return total
