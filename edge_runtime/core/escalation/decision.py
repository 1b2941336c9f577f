"""Keep the edge's answer or ask the cloud: one pure decision with the reason everybody reads."""

from dataclasses import dataclass
from enum import Enum

from edge_runtime.core.errors import CloudError, RefusalKind
from edge_runtime.core.messages import Reason


class Peer(Enum):
    """What an outcome says about the cloud; the breaker counts nothing else."""

    FAULTY = "faulty"  # silence or nonsense
    ALIVE = "alive"  # it answered sensibly, if only with a refusal
    UNKNOWN = "unknown"  # the link or we ourselves stood in the way


class CloudUnavailable(CloudError):  # noqa: N818 - the fact it states
    """The cloud gave no usable answer; `reason` is the word the caller sees."""

    def __init__(self, reason: Reason, message: str, peer: Peer = Peer.UNKNOWN) -> None:
        super().__init__(message)
        self.reason = reason
        self.peer = peer


@dataclass(frozen=True, slots=True)
class LinkState:
    """What is known of the way to the cloud at the moment of deciding."""

    is_connected: bool
    is_breaker_open: bool
    reply_p95_ns: int  # how long an answer takes, pessimistically; 0 while nothing is known


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to ask the cloud, and why (not)."""

    escalate: bool
    reason: Reason


def decide(
    *,
    confidence: float | None,
    accept_threshold: float | None,
    link: LinkState | None,
    is_private: bool,
    remaining_ns: int | None,
) -> Decision:
    """Decide for one answered row; the first rule that applies gives the reason.

    Args:
        confidence: calibrated probability that the edge's answer is right; None where the task has none.
        accept_threshold: keep at or above this; None where the model never escalates.
        link: state of the uplink; None where no cloud is configured.
        is_private: the caller forbids leaving the device.
        remaining_ns: time to the deadline; None without one.
    """
    if confidence is None or accept_threshold is None:
        return Decision(False, Reason.LOCAL_ONLY)
    if confidence >= accept_threshold:
        return Decision(False, Reason.CONFIDENT)
    if link is None:
        return Decision(False, Reason.LOCAL_ONLY)
    if is_private:
        return Decision(False, Reason.PRIVATE)
    if not link.is_connected:
        return Decision(False, Reason.LINK_DOWN)
    if link.is_breaker_open:
        return Decision(False, Reason.CLOUD_OPEN)
    if remaining_ns is not None and link.reply_p95_ns >= remaining_ns:
        return Decision(False, Reason.TOO_LATE)
    return Decision(True, Reason.UNSURE)


def may_hand_over(
    kind: RefusalKind,
    *,
    accept_threshold: float | None,
    link: LinkState,
    is_private: bool,
    remaining_ns: int,
) -> bool:
    """Whether the cloud may answer what the edge refused: for want of time or room, and where it can in time.

    A quota is not got round by the cloud, and a runtime that shuts down starts nothing. Arguments as in `decide`.
    """
    return (
        kind in {RefusalKind.FULL, RefusalKind.LATE}
        and accept_threshold is not None
        and not is_private
        and link.is_connected
        and not link.is_breaker_open
        and link.reply_p95_ns < remaining_ns
    )
