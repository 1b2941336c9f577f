"""Frozen values that travel between the parts: tensors, requests, answers, replies. No behaviour beyond reading."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scalar = str | int | float | bool
Array = NDArray[Any]
#: What one row of a batch is to an engine: one array per model input or output, without the batch axis.
Row = tuple[Array, ...]
#: The shapes of a row's arrays, without the batch axis: rows of equal shapes may share a batch.
Shapes = tuple[tuple[int, ...], ...]
#: What batches cost: (rows, median nanoseconds), by rising rows.
LatencyProfile = tuple[tuple[int, int], ...]

#: Datatype words of the Open Inference Protocol and what they are in memory: little-endian, as on the wire.
#: BYTES has no array type, and BF16 none in numpy.
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
    """Where an answer was computed (or kept)."""

    LOCAL = "local"
    CACHE = "cache"
    CLOUD = "cloud"


class Reason(StrEnum):
    """Why an answer comes from where it comes; the closed list that logs, metrics, tests and users share."""

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
    STALE = "stale"  # unsure, the cloud out of reach, and an earlier answer of it kept past its time


#: Reasons with which an unsure local answer, or an old one, is given although the cloud should have been asked.
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

    `datatype` is an Open Inference Protocol word ("BYTES", "FP32", "INT64", ...); `shape` includes the
    leading batch axis as -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a task promises: equal on both tiers. `on_request` are outputs a caller gets only by naming them."""

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
    """An output the caller asks for, and whether it wants raw bytes instead of JSON."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One decoded request. `outputs` empty means all; `binary_default` holds for outputs not named.

    `id` is the caller's own label and comes back unchanged; it is never part of a cache key.
    """

    inputs: tuple[Tensor, ...]
    id: str = ""
    parameters: dict[str, Scalar] = field(default_factory=dict)
    outputs: tuple[OutputRequest, ...] = ()
    binary_default: bool = False


@dataclass(frozen=True, slots=True)
class InferReply:
    """One reply, ready to be encoded. `binary_outputs` names the outputs to be sent as raw bytes."""

    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: dict[str, Scalar] = field(default_factory=dict)
    binary_outputs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says about one row: one value per output of the signature, in its order.

    A value is `bytes` for BYTES outputs, else an array (or numpy scalar) of one row.
    `confidence` is the calibrated probability that this answer is right, or None where the task has none.
    `extras` are the values of the signature's outputs on request, in their order. `raw_score` is what the
    confidence was calibrated from: a calibration that moves can be applied again without running the model.
    """

    values: tuple[bytes | Array | np.generic, ...]
    confidence: float | None
    extras: tuple[Array, ...] = ()
    raw_score: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What clients may know of a loaded model."""

    name: str
    version: str
    platform: str  # engine in the words of the protocol: "onnxruntime_onnx", ...
    signature: Signature
    max_batch: int
    is_batch_invariant: bool
    digest: str  # hex sha256 of the bundle's manifest
    accept_threshold: float | None  # confidence from which the edge's answer is kept; None: never escalates
    batch_note: str = ""  # why it runs single rows although its bundle allows more
    load_ns: int = 0
    memory_bytes: int | None = None  # at most, beside the runner's own; None where it was not measured
    latency_profile: LatencyProfile = ()


@dataclass(slots=True)
class Duration:
    """How often something happened and the time it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class ModelStatistics:
    """Running totals of one model, in the words of the protocol's statistics extension."""

    requests: Duration = field(default_factory=Duration)  # rows answered, end to end
    failures: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)  # text to tensors
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)  # tensors to answers
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    executions: int = 0  # batches run
    faults: dict[str, int] = field(
        default_factory=dict
    )  # batches that failed, by "raised", "hung", "miscounted"
    replaced: int = 0  # engines that hung and were loaded anew
    refused: dict[str, int] = field(default_factory=dict)  # rows by the kind of refusal
    last_inference_ms: int = 0  # unix time
    batch_sizes: dict[int, int] = field(default_factory=dict)  # rows in a batch -> how often
