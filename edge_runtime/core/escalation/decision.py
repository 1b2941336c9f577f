"""Keep the edge's answer, ask the cloud, spill or refuse: one pure decision, with its reason and all it rests on.

A `Decision` carries the `Features` it was made from. Both survive a round trip through a line of JSON, so a log of
decisions can be replayed: `decide` of the logged features gives the logged action and reason.
"""

from enum import Enum, StrEnum

import msgspec

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


class LinkState(msgspec.Struct, frozen=True, gc=False):
    """The state of the link to the cloud at the time of the decision."""

    is_connected: bool
    is_breaker_open: bool
    reply_p95_ns: int  # pessimistic estimate of the time to a reply; 0 while nothing is known


class Action(StrEnum):
    """What is done with a row."""

    KEEP = "keep"  # the edge's answer is the answer
    ESCALATE = "escalate"  # the cloud is asked; the edge's answer is the fallback
    SPILL = "spill"  # the cloud is asked in place of the edge, which had no time or room
    REFUSE = "refuse"  # the edge had no time or room, and the cloud may not or cannot help


#: Refusals of the edge that may spill to the cloud: a lack of room or of time. A quota must not be circumvented by way
#: of the cloud, and a runtime that shuts down starts nothing.
SPILLABLE = frozenset({RefusalKind.FULL, RefusalKind.LATE})


class Features(msgspec.Struct, frozen=True, gc=False):
    """What a decision rests on.

    Attributes:
        confidence: calibrated probability that the edge's answer is right; None where the task has none, or where
            the edge refused the row.
        raw_score: what the confidence was calibrated from; None as above.
        threshold: the confidence from which the edge's answer is kept; None where the model never escalates.
        label: the label of the edge's answer; "" where the task has none.
        link: the state of the uplink; None where no cloud is configured.
        is_private: the caller forbids that the row leaves the device.
        remaining_ns: time to the deadline; None without one.
        refused: why the edge refused the row (one of SPILLABLE); None where it answered.
    """

    confidence: float | None
    raw_score: float | None
    threshold: float | None
    label: str
    link: LinkState | None
    is_private: bool
    remaining_ns: int | None
    refused: RefusalKind | None = None


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What is done with a row, why, and what that rests on."""

    action: Action
    reason: Reason
    features: Features


def decide(features: Features) -> Decision:
    """Decide for one row; the first rule that applies gives the reason.

    For REFUSE the reason says why the cloud is not asked in place of the edge.
    """
    threshold = features.threshold
    if features.refused is not None:
        barred = Reason.LOCAL_ONLY if threshold is None else _bar(features)
        if barred is not None:
            return Decision(Action.REFUSE, barred, features)
        return Decision(Action.SPILL, Reason.OVERLOADED, features)
    confidence = features.confidence
    if confidence is None or threshold is None:
        return Decision(Action.KEEP, Reason.LOCAL_ONLY, features)
    if confidence >= threshold:
        return Decision(Action.KEEP, Reason.CONFIDENT, features)
    barred = _bar(features)
    if barred is not None:
        return Decision(Action.KEEP, barred, features)
    return Decision(Action.ESCALATE, Reason.UNSURE, features)


def _bar(features: Features) -> Reason | None:
    """Return what keeps the row from the cloud, or None."""
    link = features.link
    if link is None:
        return Reason.LOCAL_ONLY
    if features.is_private:
        return Reason.PRIVATE
    if not link.is_connected:
        return Reason.LINK_DOWN
    if link.is_breaker_open:
        return Reason.CLOUD_OPEN
    if features.remaining_ns is not None and link.reply_p95_ns >= features.remaining_ns:
        return Reason.TOO_LATE
    return None
