"""Statuses and bytes of answers: the error tree of the core in the words of HTTP."""

import msgspec

from edge_runtime.core.errors import (
    CloudError,
    EdgeRuntimeError,
    InvalidRequest,
    RefusalKind,
    Refused,
    TooLarge,
    UnknownModel,
    Unsupported,
)
from edge_runtime.core.protocol import oip
from edge_runtime.server.events import Refusal

_PHRASES = {
    200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type",
    417: "Expectation Failed", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip
_REFUSED = {
    RefusalKind.FULL: 429,
    RefusalKind.QUOTA: 429,
    RefusalKind.LATE: 504,
    RefusalKind.DRAINING: 503,
}
_KINDS: tuple[tuple[type[EdgeRuntimeError], int], ...] = (
    (TooLarge, 413),
    (UnknownModel, 404),
    (Unsupported, 501),
    (InvalidRequest, 400),
    (CloudError, 502),
)


class HttpAnswer(msgspec.Struct, frozen=True):
    """One answer before it is written. `json_length` is set where raw tensors follow the JSON."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    json_length: int | None = None
    retry_after_s: float | None = None
    allow: str = ""

    def encode(self, *, keep_alive: bool, version: str = "1.1", is_bodiless: bool = False) -> bytes:
        """Head and body in one piece, so that one write sends it.

        The answer to a HEAD is `is_bodiless`: its Content-Length is that of the answer to a GET (RFC 9110, 9.3.2).
        A client of HTTP/1.0 reads to the end of the connection unless it is told otherwise (RFC 9112, 9.3).
        """
        if self.json_length is not None:
            fields = f"Inference-Header-Content-Length: {self.json_length}\r\nContent-Type: application/octet-stream\r\n"
        else:
            fields = f"Content-Type: {self.content_type}\r\n" if self.body else ""
        if not keep_alive:
            fields += "Connection: close\r\n"
        elif version == "1.0":
            fields += "Connection: keep-alive\r\n"
        if self.retry_after_s is not None:
            fields += f"Retry-After: {max(1, round(self.retry_after_s))}\r\n"
        if self.allow:
            fields += f"Allow: {self.allow}\r\n"
        length = len(self.body)
        head = f"HTTP/1.1 {self.status} {_PHRASES[self.status]}\r\nContent-Length: {length}\r\n{fields}\r\n"
        return head.encode("latin-1") if is_bodiless else head.encode("latin-1") + self.body


def refusal_answer(refusal: Refusal) -> HttpAnswer:
    """The answer to a request that is refused before it reaches a route."""
    body = oip.encode_error(refusal.message, reason=refusal.reason)
    return HttpAnswer(refusal.status, body, retry_after_s=refusal.retry_after_s)


def error_answer(status: int, message: str, *, allow: str = "") -> HttpAnswer:
    """An error in the protocol's form."""
    return HttpAnswer(status, oip.encode_error(message), allow=allow)


def answer_for(error: EdgeRuntimeError) -> HttpAnswer:
    """The answer an error of the tree deserves."""
    if isinstance(error, Refused):
        body = oip.encode_error(str(error), reason=error.kind.value)
        return HttpAnswer(_REFUSED[error.kind], body, retry_after_s=error.retry_after_s)
    for kind, status in _KINDS:
        if isinstance(error, kind):
            return error_answer(status, str(error))
    return error_answer(500, str(error))
