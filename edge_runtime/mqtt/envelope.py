"""An Open Inference Protocol body inside an MQTT message: HTTP's headers become properties, large bodies shrink."""

import binascii
import hashlib
import re
from dataclasses import dataclass

from edge_runtime.compression import compress, decompress
from edge_runtime.core.errors import InvalidRequest, TooLarge, Unsupported

#: Below this a body of text gains nothing that the two extra properties do not cost again.
_COMPRESS_FROM_BYTES = 512
_MAX_PLAIN_BYTES = 8 << 20
_MAX_PROPERTIES = 16
_MAX_PROPERTY_BYTES = 1024
_JSON_LENGTH = "Inference-Header-Content-Length"
_DIGEST = "Content-Digest"
_ENCODING = "Content-Encoding"
_ACCEPT = "Accept-Encoding"
#: What earlier releases sent: the digest of the body before its compression, bare.
_BARE_HEX = re.compile(r"[0-9a-f]{64}")
#: A member of RFC 9530's dictionary of digests: algorithm, and base64 between colons (RFC 8941).
_DIGEST_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):\s*")


@dataclass(frozen=True, slots=True)
class Message:
    """What is published or received. `correlation` is the 16-byte request id, or empty."""

    topic: str
    payload: bytes
    content_type: str = ""
    correlation: bytes = b""
    expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()
    retain: bool = False

    @property
    def packet_bytes(self) -> int:
        """Upper bound of the bytes that the PUBLISH of this message takes at QoS 1 (MQTT v5, 3.3)."""
        # Fixed header 5, topic length 2, packet id 2, length of the properties 4, payload format 2, expiry 5; each
        # string or binary property has an identifier and a length of 2 before each of its texts.
        user = sum([5 + len(key.encode()) + len(value.encode()) for key, value in self.user])
        fixed = 26 + len(self.topic.encode()) + len(self.content_type) + len(self.correlation)
        return fixed + user + len(self.payload)


def pack(
    topic: str,
    body: bytes,
    json_length: int | None,
    *,
    correlation: bytes,
    expiry_s: int | None,
    may_compress: bool = True,
    accept_zstd: bool = False,
) -> Message:
    """Wrap a body for the wire. `accept_zstd` tells the receiver that its reply may be compressed."""
    user: list[tuple[str, str]] = [(_ACCEPT, "zstd")] if accept_zstd else []
    content_type = "application/json"
    if json_length is not None:
        user.append((_JSON_LENGTH, str(json_length)))
        content_type = "application/octet-stream"
    payload = body
    if may_compress and len(body) >= _COMPRESS_FROM_BYTES:
        payload = compress(body, 3)
        user += [(_ENCODING, "zstd"), (_DIGEST, _digest_of(payload))]
    return Message(topic, payload, content_type, correlation, expiry_s, tuple(user))


def reads_zstd(message: Message) -> bool:
    """Whether the sender of a request can read a compressed reply; a person with a stock client cannot."""
    return any(pair in ((_ACCEPT, "zstd"), (_ENCODING, "zstd")) for pair in message.user)


def is_compressed(message: Message) -> bool:
    """Whether a body may be many times its message."""
    return any(key == _ENCODING for key, _ in message.user)


def unpack(message: Message) -> tuple[bytes, int | None]:
    """Body and JSON length of a received message. Raises InvalidRequest, TooLarge, Unsupported."""
    if len(message.user) > _MAX_PROPERTIES:
        raise TooLarge(f"More than {_MAX_PROPERTIES} user properties.")
    if any(len(key) > 64 or len(value) > _MAX_PROPERTY_BYTES for key, value in message.user):
        raise TooLarge(f"A user property is longer than {_MAX_PROPERTY_BYTES} characters.")
    if message.correlation and len(message.correlation) != 16:
        raise InvalidRequest("Correlation data must be the 16 bytes of the request id, or absent.")
    user = dict(message.user)
    body = message.payload
    digest = user.get(_DIGEST)
    if digest is not None and not _BARE_HEX.fullmatch(digest):
        _check_digest(digest, body)
    encoding = user.get(_ENCODING)
    if encoding == "zstd":
        body = decompress(body, max_bytes=_MAX_PLAIN_BYTES, max_window_bytes=_MAX_PLAIN_BYTES)
    elif encoding is not None:
        raise Unsupported("Content-Encoding must be zstd or absent.")
    if digest is not None and _BARE_HEX.fullmatch(digest) and digest != hashlib.sha256(body).hexdigest():
        raise InvalidRequest("The body does not match its Content-Digest.")
    length = user.get(_JSON_LENGTH)
    if length is None:
        return body, None
    if not (length.isascii() and length.isdecimal() and len(length) <= 10):
        raise InvalidRequest(f"{_JSON_LENGTH} must be a number of bytes.")
    return body, int(length)


def _digest_of(payload: bytes) -> str:
    """`Content-Digest` of what is sent, after its compression (RFC 9530, section 2)."""
    digest = binascii.b2a_base64(hashlib.sha256(payload).digest(), newline=False).decode("ascii")
    return f"sha-256=:{digest}:"


def _check_digest(digest: str, payload: bytes) -> None:
    """Check SHA-256 where it is given; digests of other algorithms are ignored, as RFC 9530 asks.

    Raises InvalidRequest for a digest that does not fit, and for what is no digest at all.
    """
    members = [_DIGEST_MEMBER.fullmatch(member) for member in digest.split(",")]
    found = {member[1]: member[0].strip() for member in members if member is not None}
    if None in members:
        raise InvalidRequest('Content-Digest must be written as "sha-256=:<base64>:" (RFC 9530).')
    if found.get("sha-256") not in (None, _digest_of(payload)):
        raise InvalidRequest("The body does not match its Content-Digest.")
