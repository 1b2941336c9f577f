"""The values that modules exchange: tensors, requests, answers, replies, model descriptions, statistics."""

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Scalar = str | int | float | bool
Array = NDArray[Any]
#: One row of a batch as an engine sees it: one array per model input or output, without the batch axis.
Row = tuple[Array, ...]
#: The shapes of a row's arrays, without the batch axis: rows of equal shapes may share a batch.
Shapes = tuple[tuple[int, ...], ...]
#: The batch latency profile of a model: (rows, median nanoseconds), in rising order of rows.
LatencyProfile = tuple[tuple[int, int], ...]

#: Datatypes of the Open Inference Protocol and their numpy types: little-endian, as on the wire.
#: BYTES has no array type, and BF16 has none in numpy.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


class Origin(StrEnum):
    """Where an answer comes from."""

    LOCAL = "local"
    CACHE = "cache"
    CLOUD = "cloud"


class Reason(StrEnum):
    """Why an answer has its origin: the closed list of words that logs, metrics, tests and users see."""

    CONFIDENT = "confident"  # the edge is sure enough
    UNSURE = "unsure"  # the edge was not sure, so the cloud answered
    OVERLOADED = "overloaded"  # the edge had no time or room, so the cloud answered
    LOCAL_ONLY = "local_only"  # no cloud is configured, or the model has no confidence to judge by
    PRIVATE = "private"  # the caller forbade leaving the device
    TOO_LATE = "too_late"  # unsure, but the deadline leaves no time for the cloud
    LINK_DOWN = "link_down"  # unsure, but no connection to the broker
    CLOUD_OPEN = "cloud_open"  # unsure, but the breaker is open after repeated failures
    CLOUD_ABSENT = "cloud_absent"  # unsure, asked, and no worker listens
    CLOUD_LATE = "cloud_late"  # unsure, asked, and no answer came in time
    CLOUD_REFUSED = "cloud_refused"  # unsure, asked, and the cloud had no room
    CLOUD_FAILED = "cloud_failed"  # unsure, asked, and the cloud answered with an error
    STALE = "stale"  # unsure and the cloud not reachable: an expired answer of the cloud from the cache


#: Reasons for an answer that is unsure or expired, given because the cloud could not be asked or did not answer.
DEGRADED_REASONS = frozenset(
    {
        Reason.TOO_LATE,
        Reason.LINK_DOWN,
        Reason.CLOUD_OPEN,
        Reason.CLOUD_ABSENT,
        Reason.CLOUD_LATE,
        Reason.CLOUD_REFUSED,
        Reason.CLOUD_FAILED,
        Reason.STALE,
    }
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output of a model as clients see it.

    `datatype` is a word of the Open Inference Protocol ("BYTES", "FP32", "INT64", ...); `shape` includes the
    leading batch axis as -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a task, equal on both tiers. A caller gets outputs `on_request` only by naming them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    on_request: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor on the wire.

    `data` is an ndarray of `shape`, or for BYTES a flat tuple of `bytes` in row-major order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array | tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """An output that the caller asks for; `binary`: as raw bytes instead of JSON."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One decoded request. Empty `outputs` mean all; `binary_default` applies if `outputs` is empty.

    `id` is the caller's own label. It is returned unchanged and never part of a cache key.
    """

    inputs: tuple[Tensor, ...]
    id: str = ""
    parameters: dict[str, Scalar] = field(default_factory=dict)
    outputs: tuple[OutputRequest, ...] = ()
    binary_default: bool = False


@dataclass(frozen=True, slots=True)
class InferReply:
    """One reply before encoding. `binary_outputs` are the names of the outputs that are sent as raw bytes."""

    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: dict[str, Scalar] = field(default_factory=dict)
    binary_outputs: frozenset[str] = frozenset()


class Answer(msgspec.Struct, frozen=True, gc=False):  # one for each row: a frozen dataclass costs 1 us more
    """The answer of a model to one row: one value per output of the signature, in the signature's order.

    A value is `bytes` for a BYTES output, else an array (or numpy scalar) without the batch axis.
    `confidence` is the calibrated probability that this answer is right; None where the task has none.
    `extras` are the values of the signature's outputs on request, in its order. `raw_score` is the
    score before calibration: a new calibration can be applied to it without running the model again.
    """

    values: tuple[bytes | Array | np.generic, ...]
    confidence: float | None
    extras: tuple[Array, ...] = ()
    raw_score: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a loaded model that clients may see."""

    name: str
    version: str
    platform: str  # engine and format, as the protocol names them: "onnxruntime_onnx", ...
    signature: Signature
    max_batch: int
    is_batch_invariant: bool
    digest: str  # hex sha256 of the bundle's manifest
    accept_threshold: float | None  # confidence from which the edge's answer is kept; None: never escalates
    batch_note: str = ""  # why batches have one row although the bundle allows more
    load_ns: int = 0
    memory_bytes: int | None = (
        None  # measured upper bound, without the runtime library's own; None where not measured
    )
    latency_profile: LatencyProfile = ()


@dataclass(slots=True)
class Duration:
    """A count of events and their total time in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


#: Upper bounds of the intervals in which times are counted, from a tenth of a millisecond to ten seconds: three for each
#: factor of ten, so that a quantile read from the counts is at most 2.5 times off.
BOUNDS_NS = (*(int(step * 10**power) for power in range(5, 10) for step in (1, 2.5, 5)), 10**10)


@dataclass(slots=True)
class Distribution(Duration):
    """A Duration that also counts how many events lie in each interval of `BOUNDS_NS`; the last is above all bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns
        self.counts[bisect_left(BOUNDS_NS, ns)] += count


@dataclass(slots=True)
class RequestTotals:
    """The requests for one model: each is in `success` or in `failures`, and in one of `endings`."""

    success: Distribution = field(default_factory=Distribution)  # end to end
    failures: Duration = field(default_factory=Duration)
    rows: int = 0  # rows of requests that were served
    endings: dict[str, int] = field(default_factory=dict)  # "served", or why not
    last_served_ms: int = 0  # unix time


@dataclass(slots=True)
class ModelStatistics:
    """Running totals of one model, named as in the protocol's statistics extension."""

    failures: Duration = field(default_factory=Duration)  # rows of batches that failed
    queue: Distribution = field(default_factory=Distribution)
    compute_input: Duration = field(default_factory=Duration)  # text to tensors
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)  # tensors to answers
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    executions: int = 0  # batches run
    faults: dict[str, int] = field(
        default_factory=dict
    )  # batches that failed, by "raised", "hung", "miscounted"
    replaced: int = 0  # engines that hung and were replaced by a newly loaded one
    refused: dict[str, int] = field(default_factory=dict)  # rows by the kind of refusal
    batch_sizes: dict[int, int] = field(default_factory=dict)  # rows in a batch -> how often
