"""What comes back for a request: a reply or an error. On MQTT no status code tells them apart, so the body does.

The rule: a body that is JSON alone and whose object has the member `error` is the protocol's error form. Its place in
the object, white space and other members do not matter.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from edge_runtime.core.messages import InferReply, Scalar
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.oip_checks import LIMITS


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error reply: its sentence, and its other members (`reason`, `retry_after_ms`)."""

    message: str
    fields: dict[str, Scalar]


class _MayBeError(msgspec.Struct):
    error: Any = None


_decoder = msgspec.json.Decoder(_MayBeError)


def decode_any_reply(body: bytes, json_length: int | None) -> InferReply | ErrorReply:
    """Decode what a worker sent for a request. Raises InvalidRequest and its kin."""
    if json_length is None and _is_error(body):
        return ErrorReply(*oip.decode_error(body))
    return oip.decode_reply(body, json_length)


def _is_error(body: bytes) -> bool:
    if len(body) > LIMITS.json_bytes:
        return False  # `decode_reply` refuses it
    try:
        return _decoder.decode(body).error is not None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # `decode_reply` says what is wrong with it
