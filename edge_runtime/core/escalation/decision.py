"""Whether to keep the edge's answer or ask the cloud: a pure function that returns the decision and its reason."""

from dataclasses import dataclass
from enum import Enum

from edge_runtime.core.errors import CloudError, RefusalKind
from edge_runtime.core.messages import Reason


class Peer(Enum):
    """What the outcome of a request says about the cloud. Only this reaches the breaker."""

    FAULTY = "faulty"  # no reply, or an unusable one
    ALIVE = "alive"  # a well-formed reply, which may be a refusal
    UNKNOWN = "unknown"  # the request failed on the link or on this device


class CloudUnavailable(CloudError):  # noqa: N818 - the fact it states
    """The cloud gave no usable answer. The caller sees `reason`."""

    def __init__(self, reason: Reason, message: str, peer: Peer = Peer.UNKNOWN) -> None:
        super().__init__(message)
        self.reason = reason
        self.peer = peer


@dataclass(frozen=True, slots=True)
class LinkState:
    """The state of the link to the cloud at the time of the decision."""

    is_connected: bool
    is_breaker_open: bool
    reply_p95_ns: int  # pessimistic estimate of the time to a reply; 0 while nothing is known


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to ask the cloud, and the reason for either choice."""

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
    """Decide for one row that the edge has answered. The first rule that applies gives the reason.

    Args:
        confidence: calibrated probability that the edge's answer is right; None where the task has none.
        accept_threshold: the answer is kept from this confidence on; None where the model never escalates.
        link: the state of the link; None where no cloud is configured.
        is_private: the request must not leave the device.
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


def may_spill(
    kind: RefusalKind,
    *,
    accept_threshold: float | None,
    link: LinkState,
    is_private: bool,
    remaining_ns: int,
) -> bool:
    """Whether a request that the edge refused may spill to the cloud. Arguments as in `decide`.

    Only a lack of time or room spills, and only where the cloud can answer in time. A quota must not be circumvented by
    way of the cloud, and a runtime that shuts down starts nothing.
    """
    return (
        kind in {RefusalKind.FULL, RefusalKind.LATE}
        and accept_threshold is not None
        and not is_private
        and link.is_connected
        and not link.is_breaker_open
        and link.reply_p95_ns < remaining_ns
    )
