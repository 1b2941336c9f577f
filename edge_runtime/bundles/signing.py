"""Ed25519 signatures over manifests; the only module that imports `cryptography`.

A signature file holds one or more records of 16 bytes key id and 64 bytes signature, nothing else, so that
nothing has to be parsed before the signature is checked. The signed message is a context word and the manifest's bytes
exactly as stored (RFC 8032; because of the context, the signature is valid for nothing else).

`cryptography` takes 9.5 MB of memory. The runtime therefore checks signatures in an isolated child that runs this
module: a tenth of a second per bundle instead of memory for the life of the daemon. Which key signed is decided here,
not by the child: it only says which of the records with a trusted key id holds, and any other answer is an error.
"""

import base64
import binascii
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from typing import IO

from edge_runtime.bundles.isolated_child import IsolatedChild, leave_folder
from edge_runtime.bundles.stoppable import Stop
from edge_runtime.core.errors import BundleError

CONTEXT = b"edge-runtime/bundle/v1\0"
RECORD_BYTES = 16 + 64
MAX_RECORDS = 8
_CHECK_S = 30.0
_MAX_OUTPUT_BYTES = 4096
_REFUSED = 3  # exit code of the child: none of the signatures holds
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\s([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----")
_KEY_HEAD = bytes.fromhex(
    "302a300506032b6570032100"
)  # SubjectPublicKeyInfo of Ed25519 (RFC 8410), then 32 bytes
_KEY_BYTES = 32
#: Public keys of small order, sign bit cleared: for such a key anybody can make a signature that holds for any
#: message (measured with `cryptography` 50; the list is libsodium's).
_SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)

_NOT_SIGNED = "the manifest is not what was signed; copy the bundle again, or sign it again"


def generate() -> tuple[bytes, bytes]:
    """Make a private key and its public key, both PEM (PKCS#8 without a password, SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def sign(manifest: bytes, private_pem: bytes) -> bytes:
    """Return a signature file with one record. Raises BundleError if `private_pem` is no Ed25519 private key."""
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    try:
        key = form.load_pem_private_key(private_pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(
            "the key file holds no Ed25519 private key; make one with: edge-runtime models keygen"
        )
    raw = key.public_key().public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
    return _id_of(raw) + key.sign(CONTEXT + manifest)


def key_id(public_pem: bytes) -> str:
    """The id of a public key: 32 hex digits of its SHA-256. Raises BundleError."""
    return _id_of(_raw(public_pem)).hex()


def verify(manifest: bytes, signatures: bytes, trusted: Sequence[bytes]) -> str:
    """Return the id of the first trusted key (PEM) that signed. Raises BundleError if none did.

    The library is loaded into this process: for tools and tests.
    """
    for key, signature in _candidates(signatures, trusted):
        if _holds(manifest, key, signature):
            return _id_of(key).hex()
    raise BundleError(_NOT_SIGNED)


def verify_isolated(
    manifest: bytes, signatures: bytes, trusted: Sequence[bytes], *, stop: Stop | None = None
) -> str:
    """As `verify`, in an isolated child; see the text of the module. `stop` kills the child. Raises BundleError."""
    candidates = _candidates(signatures, trusted)
    parts = (manifest, *(key + signature for key, signature in candidates))
    request = json.dumps([base64.b64encode(part).decode() for part in parts]).encode()

    def feed(pipe: IO[bytes]) -> None:
        pipe.write(request)

    child = IsolatedChild(__name__, limit_s=_CHECK_S, max_output_bytes=_MAX_OUTPUT_BYTES)
    try:
        with (stop or Stop()).calls(child.kill):
            done = child.run(feed)
    except OSError as error:
        raise BundleError(f"its signature could not be checked ({error.strerror}); try again") from None
    if done.is_late:
        raise BundleError(f"its signature could not be checked within {_CHECK_S:g} s; try again")
    if done.code == _REFUSED:
        raise BundleError(_NOT_SIGNED)
    ids = [_id_of(key).hex() for key, _ in candidates]
    answer = done.output.decode("ascii", "replace")
    if done.code == 0 and answer in ids:
        return answer
    last = answer.strip().splitlines()[-1:] or [f"exit code {done.code}"]
    raise BundleError(f"its signature could not be checked ({last[0][:200]}); repair the installation")


def main() -> None:
    """The child: read manifest and candidates from standard input, write the id of the key whose signature holds."""
    leave_folder()
    manifest, *candidates = map(base64.b64decode, json.load(sys.stdin))
    for candidate in candidates:
        key, signature = candidate[:_KEY_BYTES], candidate[_KEY_BYTES:]
        if _holds(manifest, key, signature):
            sys.stdout.write(_id_of(key).hex())
            return
    sys.exit(_REFUSED)


def _candidates(signatures: bytes, trusted: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The records with the id of a trusted key, as (raw key, signature). Raises BundleError if there are none."""
    count, rest = divmod(len(signatures), RECORD_BYTES)
    if rest or not 1 <= count <= MAX_RECORDS:
        raise BundleError("the signature file is damaged; copy the bundle again")
    keys = {_id_of(raw): raw for raw in map(_raw, trusted)}
    records = [signatures[i : i + RECORD_BYTES] for i in range(0, len(signatures), RECORD_BYTES)]
    found = [(keys[record[:16]], record[16:]) for record in records if record[:16] in keys]
    if not found:
        raise BundleError(
            f"it is signed by key {records[0][:16].hex()}, which is not trusted here; "
            "add its public half to [trust] keys if you trust its owner"
        )
    return found


def _holds(manifest: bytes, key: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, CONTEXT + manifest)
    except InvalidSignature:
        return False
    return True


def _id_of(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:16]


def _raw(public_pem: bytes) -> bytes:
    """The 32 bytes of a public key, read without the library that checks. Raises BundleError."""
    found = _PEM.search(public_pem)
    try:
        der = b"" if found is None else base64.b64decode(b"".join(found[1].split()), validate=True)
    except binascii.Error:
        der = b""
    raw = der.removeprefix(_KEY_HEAD)
    if not der.startswith(_KEY_HEAD) or len(raw) != _KEY_BYTES:
        raise BundleError(
            "a trusted key is no Ed25519 public key in PEM; use the .pub file that keygen wrote"
        )
    if raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER:
        raise BundleError("a trusted key is of small order: anybody can sign for it; make another one")
    return raw
