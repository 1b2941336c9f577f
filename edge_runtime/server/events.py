"""What the HTTP/1.1 machine says about the bytes of a connection: small frozen values."""

from collections.abc import Callable

import msgspec


class RequestHead(msgspec.Struct, frozen=True):
    """Request line and headers.

    Header names are lower case; a header that is given twice has its values joined by commas (RFC 9110, 5.3). `target`
    is a path, or "*"; `length` is None for a chunked body.
    """

    method: str
    target: str
    version: str
    headers: dict[str, str]
    length: int | None
    keep_alive: bool
    expects_continue: bool


class BodyPart(msgspec.Struct, frozen=True):
    """Some bytes of the body, without their chunk framing."""

    data: bytes


class RequestEnd(msgspec.Struct, frozen=True):
    """The request is complete."""


class Refusal(msgspec.Struct, frozen=True):
    """The connection cannot go on: answer with `status` and one sentence, then close.

    `reason` is one word of a closed list, for counters and programs. `is_bodiless` where the request was a HEAD.
    """

    status: int
    message: str
    reason: str = "malformed"
    retry_after_s: float | None = None
    is_bodiless: bool = False


Event = RequestHead | BodyPart | RequestEnd | Refusal
#: Local policy: None lets a head pass.
CheckHead = Callable[[RequestHead], Refusal | None]
