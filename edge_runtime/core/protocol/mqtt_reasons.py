"""MQTT v5 reason codes: what each means in words, and what to do about it. Data beside the standard's section 2.4."""

from enum import Enum


class ReasonClass(Enum):
    """What this side does about a reason code."""

    OK = "ok"
    ABSENT = "absent"  # delivered to nobody: fall back now
    RETRY = "retry"  # transient: back off and try again
    CONFIGURATION = "configuration"  # a person must change something: back off long and report it
    PERMANENT = "permanent"  # this message can never pass


NO_MATCHING_SUBSCRIBERS = 0x10
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95

_R, _C, _P = ReasonClass.RETRY, ReasonClass.CONFIGURATION, ReasonClass.PERMANENT

_TABLE: dict[int, tuple[ReasonClass, str]] = {
    NO_MATCHING_SUBSCRIBERS: (ReasonClass.ABSENT, "nobody is subscribed to the topic"),
    0x80: (_R, "the broker gave no reason"),
    0x81: (_P, "the broker could not read a packet of ours"),
    0x82: (_P, "the broker says a packet of ours breaks the protocol"),
    0x83: (_R, "the broker could not do it for a reason of its own"),
    0x84: (_C, "the broker does not speak MQTT version 5; use one that does, such as mosquitto 2"),
    0x85: (_C, "the broker refuses the client id; check the device's name and the broker's access rules"),
    0x86: (_C, "wrong user name or password; check both in the configuration"),
    0x87: (_C, "the broker does not authorise this client; check its access rules"),
    0x88: (_R, "the broker is unavailable"),
    0x89: (_R, "the broker is busy"),
    0x8A: (_C, "the broker has banned this client"),
    0x8B: (_R, "the broker is shutting down"),
    0x8C: (_C, "the broker refuses the authentication method"),
    0x8D: (_R, "the broker heard nothing for too long"),
    SESSION_TAKEN_OVER: (
        _R,
        "another client connected with the same client id; give each device its own name",
    ),
    0x8F: (_C, "the broker refuses the topic filter"),
    0x90: (_P, "the broker refuses the topic name"),
    0x93: (_R, "the broker says more was in flight than it allows"),
    0x94: (_P, "the broker refuses the topic alias"),
    PACKET_TOO_LARGE: (_P, "the packet passes the broker's size limit"),
    0x96: (_R, "the broker says the message rate is too high"),
    0x97: (_R, "a quota of the broker is used up"),
    0x98: (_R, "an administrator of the broker closed the connection"),
    0x99: (_P, "the broker refuses the payload's format"),
    0x9A: (_C, "the broker does not support retained messages, which this runtime needs"),
    0x9B: (_C, "the broker does not support delivery at least once (QoS 1), which this runtime needs"),
    0x9C: (_C, "the broker says to use another server"),
    0x9D: (_C, "the broker has moved to another server"),
    0x9E: (_C, "the broker does not support shared subscriptions, which workers need"),
    0x9F: (_R, "the broker says connections come too fast"),
    0xA0: (_R, "the broker's limit on connection time is over"),
}


def classify(code: int) -> ReasonClass:
    """What to do about a reason code; unknown failures count as transient."""
    if code in _TABLE:
        return _TABLE[code][0]
    return ReasonClass.OK if code < 0x80 else ReasonClass.RETRY


def in_words(code: int) -> str:
    """One clause for logs and `status`, with the code beside it for looking it up in the standard."""
    words = _TABLE[code][1] if code in _TABLE else ("success" if code < 0x80 else "an unknown reason")
    return f"{words} (MQTT reason 0x{code:02X})"
