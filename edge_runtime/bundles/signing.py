"""Ed25519 signatures over manifests; the only module that imports `cryptography`.

A signature file holds one or more records of 16 bytes key id and 64 bytes signature, nothing else, so that
nothing has to be parsed before the signature is checked. The signed message is a context word and the manifest's bytes
exactly as stored (RFC 8032; because of the context, the signature is valid for nothing else).

`cryptography` takes 9.5 MB of memory. The runtime therefore checks signatures in a child process that runs this
module: a tenth of a second per bundle instead of memory for the life of the daemon.
"""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence

from edge_runtime.core.errors import BundleError

CONTEXT = b"edge-runtime/bundle/v1\0"
RECORD_BYTES = 16 + 64
MAX_RECORDS = 8
_CHECK_S = 30.0
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
    """Return the id of the first trusted key (PEM) that signed. Raises BundleError if none did."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    count, rest = divmod(len(signatures), RECORD_BYTES)
    if rest or not 1 <= count <= MAX_RECORDS:
        raise BundleError("the signature file is damaged; copy the bundle again")
    keys = {_id_of(raw): raw for raw in map(_raw, trusted)}
    records = [signatures[i : i + RECORD_BYTES] for i in range(0, len(signatures), RECORD_BYTES)]
    known = [record for record in records if record[:16] in keys]
    if not known:
        raise BundleError(
            f"it is signed by key {records[0][:16].hex()}, which is not trusted here; "
            "add its public half to [trust] keys if you trust its owner"
        )
    for record in known:
        try:
            Ed25519PublicKey.from_public_bytes(keys[record[:16]]).verify(record[16:], CONTEXT + manifest)
        except InvalidSignature:
            continue
        return record[:16].hex()
    raise BundleError("the manifest is not what was signed; copy the bundle again, or sign it again")


def verify_apart(manifest: bytes, signatures: bytes, trusted: Sequence[bytes]) -> str:
    """`verify` in a child process; see the text of the module. Raises BundleError."""
    question = json.dumps([base64.b64encode(part).decode() for part in (manifest, signatures, *trusted)])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime.bundles.signing"],
            input=question, capture_output=True, text=True, timeout=_CHECK_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BundleError(f"its signature could not be checked ({error}); try again") from None
    if done.returncode == 0:
        return done.stdout.strip()
    # Exit code 3 comes with a sentence of ours; any other code is a failure of the checking process itself.
    sentence = done.stderr.strip().splitlines()[-1:] or ["the checking process gave no reason"]
    if done.returncode == 3:
        raise BundleError(sentence[0])
    raise BundleError(f"its signature could not be checked ({sentence[0][:200]}); repair the installation")


def _id_of(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:16]


def _raw(public_pem: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization as form  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        key = form.load_pem_public_key(public_pem)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(
            "a trusted key is no Ed25519 public key in PEM; use the .pub file that keygen wrote"
        )
    raw = key.public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
    if raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER:
        raise BundleError("a trusted key is of small order: anybody can sign for it; make another one")
    return raw


def _main() -> int:
    manifest, signatures, *trusted = map(base64.b64decode, json.load(sys.stdin))
    try:
        sys.stdout.write(verify(manifest, signatures, trusted))
    except BundleError as error:
        sys.stderr.write(str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(_main())
