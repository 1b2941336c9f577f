"""The outcome of one row: the answer, its origin, the reason for that origin, and the time spent."""

import msgspec

from edge_runtime.core.messages import DEGRADED_REASONS, Answer, Origin, Reason


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


def payload_bytes(answer: Answer) -> int:
    """Bytes of the values and extras of an answer."""
    total = 0
    for value in answer.values:
        total += len(value) if isinstance(value, bytes) else value.nbytes
    for extra in answer.extras:
        total += extra.nbytes
    return total
