"""Model bundles: a folder of `manifest.json`, its signature and zstd payloads, verified before use.

Order of trust: the manifest's signature, names and sizes, then the digest of the stored bytes, then capped
decompression, then the digest of the plain bytes; only then may anything parse a payload. `load_bundle` returns the
bytes that were verified, so a file exchanged afterwards changes nothing. This module knows nothing of models or tasks.
"""

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.bundles.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    is_payload,
    parse_manifest,
)
from edge_runtime.bundles.stoppable import Stop
from edge_runtime.compression import compress, decompress
from edge_runtime.core.errors import BundleError, InvalidRequest
from edge_runtime.core.protocol.ids import is_id

SIGNATURE = "manifest.sig"
_STORED = ".zst"  # suffix of a payload as it is stored
MAX_MANIFEST_BYTES = 256 * 1024
MAX_WINDOW_BYTES = 8 * 1024 * 1024
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Trust:
    """Which bundles are loaded: those signed with one of `keys` (public, in PEM); unsigned ones if `allow_unsigned`."""

    keys: tuple[bytes, ...]
    allow_unsigned: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle. `files` maps payload names to plain bytes; `digest` is the manifest's sha256 in hex.

    `signed_by` is the id of the trusted key that signed; None if no signature was checked or required.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    digest: str
    stored_bytes: int
    signed_by: str | None = None


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle.

    A bare name is looked up among the bundles of the installed package, then in the `models/` of a source
    checkout. Text with a path separator is a path, and so is every `Path`, even one of a single level, because it
    was the result of an earlier search. Raises BundleError if absent.
    """
    given = os.fspath(name_or_path)
    if os.sep in given or isinstance(name_or_path, Path):
        path = Path(given)
        if not path.is_dir():
            raise BundleError(f"bundle {path.name!r}: no such folder; give the folder that holds {MANIFEST}")
        return path
    if not is_id(given):
        raise BundleError(f"bundle {given[:80]!r} is neither a name nor a path; write a path as ./folder")
    for folder in (_packaged_folder(), _PACKAGE.parent / "models"):
        if (folder / given / MANIFEST).is_file():
            return folder / given
    raise BundleError(
        f"bundle {given!r} is not installed; give a path such as ./{given}, or see `models list`"
    )


def load_bundle(
    path: str | os.PathLike[str], trust: Trust | None = None, *, stop: Stop | None = None
) -> Bundle:
    """Read and verify the bundle in folder `path`. Raises BundleError and nothing else for a bad bundle.

    Without `trust` only digests are checked: for tools that make bundles, never for serving them. `stop` ends the work
    between two payloads, or in the signature check.
    """
    path = Path(path)
    stop = stop or Stop()
    where = f"bundle {path.name!r}"
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{where} cannot be opened ({error.strerror}); give a readable folder") from None
    # Installers may hard-link package files from their cache (uv does); elsewhere a second name of a file means that
    # somebody can change it from outside the bundle.
    may_be_linked = path.resolve().parent == _packaged_folder().resolve()
    try:
        # Before the signature is believed: nothing else may lie here, whatever the manifest will list.
        _check_names(folder, where)
        raw = _read(folder, MANIFEST, MAX_MANIFEST_BYTES, where, may_be_linked)
        signed_by = None if trust is None else _signer(folder, raw, trust, where, may_be_linked, stop)
        manifest = parse_manifest(raw, where)
        _check_listing(folder, manifest, where)
        files: dict[str, bytes] = {}
        for entry in manifest.files:
            stop.check()
            files[entry.name] = _payload(folder, entry, where, may_be_linked)
    finally:
        os.close(folder)
    stored = len(raw) + sum(entry.stored_size for entry in manifest.files)
    return Bundle(manifest, files, hashlib.sha256(raw).hexdigest(), stored, signed_by)


def write_bundle(
    path: str | os.PathLike[str], fields: Mapping[str, Any], files: Mapping[str, bytes]
) -> Bundle:
    """Write a bundle folder, replacing an older one, and return it as loaded back.

    `fields` are the manifest's fields without `format` and `files`, which are computed. Raises BundleError
    if the result would be refused by `load_bundle`.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        return _write_bundle(path, fresh, fields, files)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_bundle(path: Path, fresh: Path, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> Bundle:
    fresh.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    entries = []
    for name, plain in sorted(files.items()):
        # Level 19 looks for matches of three bytes, which costs quantised weights 3 to 7 % against level 16.
        stored = min((compress(plain, level) for level in (16, 19)), key=len)
        entries.append(
            FileEntry(name, len(plain), _sha256(plain), len(stored), _sha256(stored), compression="zstd")
        )
        (fresh / f"{name}{_STORED}").write_bytes(stored)
    manifest = {"format": FORMAT, **fields, "files": entries}
    (fresh / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    load_bundle(fresh)
    if not path.exists():
        fresh.rename(path)
        return load_bundle(path)
    _check_replaceable(path)
    former = fresh.with_name(f"{fresh.name}.old")
    path.rename(former)
    try:
        fresh.rename(path)
    except BaseException:
        former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)
    return load_bundle(path)


def _check_replaceable(path: Path) -> None:
    """Refuse to replace anything but a bundle: what is replaced is removed."""
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path.name!r} exists and is no bundle; choose another folder")
    others = sorted(entry.name for entry in path.iterdir() if not _may_be_listed(entry.name))
    if others:
        raise BundleError(
            f"{path.name!r} holds {others[0][:80]!r}, which is no part of a bundle; move it or choose another folder"
        )


def pack_folder(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Bundle:
    """Make a bundle of a folder that holds `manifest.json` and the plain payloads beside it.

    `format` and `files` of the manifest are computed. Raises BundleError.
    """
    source = Path(source)
    where = f"folder {source.name!r}"
    try:
        names = sorted(entry.name for entry in os.scandir(source) if entry.is_file(follow_symlinks=False))
        fields = msgspec.json.decode((source / MANIFEST).read_bytes(), type=dict[str, Any])
        files = {name: (source / name).read_bytes() for name in names if name != MANIFEST}
    except OSError as error:
        raise BundleError(
            f"{where} cannot be read ({error.strerror}); it must contain {MANIFEST} and the payloads"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST} cannot be read ({error}); repair it") from None
    if Path(out).exists():  # before the minutes that compression may take
        _check_replaceable(Path(out).resolve())
    computed = {"format", "files"}
    return write_bundle(out, {key: fields[key] for key in fields if key not in computed}, files)


def sign_bundle(path: str | os.PathLike[str], private_pem: bytes) -> Bundle:
    """Sign a bundle after its digests were verified; earlier signatures are replaced. Raises BundleError."""
    from edge_runtime.bundles.signing import sign  # noqa: PLC0415 - its library takes 9.5 MB

    path = Path(path)
    bundle = load_bundle(path)
    raw = (path / MANIFEST).read_bytes()
    if _sha256(raw) != bundle.digest:
        raise BundleError(
            f"bundle {path.name!r} was changed while it was checked; sign it when it is complete"
        )
    signature = sign(raw, private_pem)
    aside = path / f"{SIGNATURE}.{secrets.token_hex(8)}"
    try:
        # A signature that is there already may be a link: it is replaced, and what it points to stays as it is.
        with aside.open("xb") as file:
            file.write(signature)
        aside.replace(path / SIGNATURE)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise BundleError(
            f"bundle {path.name!r} cannot be signed ({error.strerror}); give a folder that may be written"
        ) from None
    return bundle


def development_key() -> bytes:
    """The public key with which the shipped bundles are signed."""
    return (_PACKAGE / "keys" / "development.pub").read_bytes()


def _signer(folder: int, raw: bytes, trust: Trust, where: str, may_be_linked: bool, stop: Stop) -> str | None:
    from edge_runtime.bundles.signing import MAX_RECORDS, RECORD_BYTES, verify_isolated  # noqa: PLC0415

    if SIGNATURE not in os.listdir(folder):
        if trust.allow_unsigned:
            return None
        raise BundleError(
            f"{where} is not signed; sign it with: edge-runtime models sign, or set [trust] unsigned = true"
        )
    signatures = _read(folder, SIGNATURE, MAX_RECORDS * RECORD_BYTES, where, may_be_linked)
    try:
        return verify_isolated(raw, signatures, trust.keys, stop=stop)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _packaged_folder() -> Path:
    return _PACKAGE / "bundled"


def _read(folder: int, name: str, limit: int, where: str, may_be_linked: bool) -> bytes:
    """Read a regular file of at most `limit` bytes, by name relative to an open folder."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode) or (state.st_nlink != 1 and not may_be_linked):
                raise BundleError(
                    f"{where}: {name} is not a plain file of its own; copy the bundle without links"
                )
            if state.st_size > limit:
                raise BundleError(
                    f"{where}: {name} has {state.st_size} bytes where {limit} are allowed; copy it again"
                )
            with open(handle, "rb", closefd=False) as file:
                return file.read(limit + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise BundleError(
            f"{where}: {name} cannot be opened ({error.strerror}); copy the bundle again"
        ) from None


def _check_names(folder: int, where: str) -> None:
    """Refuse files that no manifest could list."""
    foreign = sorted(name for name in os.listdir(folder) if not _may_be_listed(name))
    if foreign:
        raise _unlisted(foreign[0], where)


def _may_be_listed(name: str) -> bool:
    return name in (MANIFEST, SIGNATURE) or (
        name.endswith(_STORED) and is_payload(name.removesuffix(_STORED))
    )


def _check_listing(folder: int, manifest: Manifest, where: str) -> None:
    listed = {MANIFEST, SIGNATURE, *(f"{entry.name}{_STORED}" for entry in manifest.files)}
    unlisted = sorted(set(os.listdir(folder)) - listed)
    if unlisted:
        raise _unlisted(unlisted[0], where)


def _unlisted(name: str, where: str) -> BundleError:
    return BundleError(f"{where}: {name[:80]!r} is not listed in {MANIFEST}; remove it or copy again")


def _payload(folder: int, entry: FileEntry, where: str, may_be_linked: bool) -> bytes:
    stored_name = f"{entry.name}{_STORED}"
    stored = _read(folder, stored_name, entry.stored_size, where, may_be_linked)
    if len(stored) != entry.stored_size or _sha256(stored) != entry.stored_sha256:
        raise BundleError(
            f"{where}: {stored_name} is damaged or cut off (wrong size or digest); copy it again"
        )
    try:
        plain = decompress(stored, max_bytes=entry.size, max_window_bytes=MAX_WINDOW_BYTES)
    except InvalidRequest as error:
        raise BundleError(f"{where}: {stored_name} cannot be unpacked: {error}") from None
    if len(plain) != entry.size or _sha256(plain) != entry.sha256:
        raise BundleError(f"{where}: {entry.name} is not what {MANIFEST} lists; make the bundle again")
    return plain
