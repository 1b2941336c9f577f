"""The outcome of one row: the answer, its origin, the reason for that origin, and the time spent."""

import msgspec
import numpy as np
from msgspec.structs import replace

from edge_runtime.core.messages import DEGRADED_REASONS, Answer, Array, Origin, Reason

#: Bytes of the objects around values on CPython 3.11 with numpy, each with its place in a tuple. An array has 16 more
#: for each dimension (lengths and strides).
_BYTES_OBJECT, _SCALAR_OBJECT, _ARRAY_OBJECT = 41, 32, 120


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One row's answer with its origin and reason; `queue_ns`, `infer_ns` and `cloud_ns` are nanoseconds spent.

    `cloud_version` is the version of the cloud's model if that model gave the answer, else "".
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
        """Whether the cloud should have answered and could not."""
        return self.reason in DEGRADED_REASONS

    @property
    def is_stale(self) -> bool:
        """Whether the answer is an earlier one of the cloud, past its time to live."""
        return self.reason is Reason.STALE

    def as_cached(self) -> "Outcome":
        """The outcome of a cache hit with this answer: no time was spent on it."""
        return Outcome(self.answer, Origin.CACHE, self.reason, cloud_version=self.cloud_version)

    def as_stale(self, local: "Outcome") -> "Outcome":
        """The outcome if this expired answer replaces the degraded outcome `local`, whose time was spent anyway."""
        return Outcome(
            self.answer, Origin.CACHE, Reason.STALE, local.queue_ns, local.infer_ns, local.cloud_ns,
            self.cloud_version,
        )  # fmt: skip


def with_own_values(answer: Answer) -> Answer:
    """Return the answer as it may be kept: its arrays own their bytes and are read-only.

    Engines return rows that are views of their whole batch: one kept row would pin all of it. A copy is made even of
    an array that owns its bytes, since the caller of the request has that array and may write to it.
    """
    if not answer.extras:
        for value in answer.values:
            if isinstance(value, np.ndarray):
                break
        else:
            return answer
    return replace(
        answer,
        values=tuple([_owned(value) if isinstance(value, np.ndarray) else value for value in answer.values]),
        extras=tuple([_owned(extra) for extra in answer.extras]),
    )


def pinned_bytes(answer: Answer) -> int:
    """Bytes that the values and extras of an answer keep in memory, with their objects; a view counts its base."""
    total = 0
    for value in (*answer.values, *answer.extras) if answer.extras else answer.values:
        if isinstance(value, bytes):
            total += _BYTES_OBJECT + len(value)
        elif isinstance(value, np.ndarray):
            total += _bytes_of_array(value)
        else:
            total += _SCALAR_OBJECT + value.nbytes
    return total


def _owned(array: Array) -> Array:
    owned = np.array(array)
    owned.flags.writeable = False
    return owned


def _bytes_of_array(value: Array) -> int:
    size = _ARRAY_OBJECT + 16 * value.ndim + value.nbytes
    base = value.base
    while isinstance(base, np.ndarray):
        size = max(size, _ARRAY_OBJECT + 16 * base.ndim + base.nbytes)
        base = base.base
    return size if base is None else size + len(memoryview(base).cast("B"))
