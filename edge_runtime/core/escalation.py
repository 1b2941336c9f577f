"""Keep the edge's answer or ask the cloud: one pure decision with the reason everybody reads."""

from dataclasses import dataclass

from edge_runtime.core.messages import Reason


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
