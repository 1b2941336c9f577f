"""The outcome of one row: the answer, where it comes from, why, and where its time went."""

import msgspec

from edge_runtime.core.messages import DEGRADED_REASONS, Answer, Origin, Reason


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


def payload_bytes(answer: Answer) -> int:
    """What an answer's values take."""
    total = 0
    for value in answer.values:
        total += len(value) if isinstance(value, bytes) else value.nbytes
    for extra in answer.extras:
        total += extra.nbytes
    return total
