"""Small files of the state directory: where they are, how they are written, whose they must be."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from edge_runtime.core.errors import StorageError

SECRET_BYTES = 32


def state_path(setting: str, program: str, file: str) -> Path | None:
    """Where `program` keeps `file` of its state: a path, None for "off".

    "auto" is $STATE_DIRECTORY (set by systemd), else $XDG_STATE_HOME, else ~/.local/state, as the XDG base
    directory specification has it.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    if folder := os.environ.get("STATE_DIRECTORY"):
        return Path(folder.split(":")[0]) / file
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / program / file


def record_path(setting: str, program: str) -> Path | None:
    """Where `program` keeps the version floors of its bundles; see `state_path`."""
    return state_path(setting, program, "versions.json")


def write_durably(path: Path, content: bytes) -> None:
    """Replace the file so that after a power cut it holds the old or the new content, never a part.

    Write beside it, sync, rename, sync the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_or_make_secret(path: Path) -> bytes:
    """The 32 random bytes in `path`, made at the first call.

    Raises OSError, and StorageError where others may read the file or it does not hold 32 bytes.
    """
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, secrets.token_bytes(SECRET_BYTES))
                os.fsync(file)
                # A link appears with its whole content, and fails for the second of two processes: it then reads
                # the secret of the first.
                os.link(aside, path)
            finally:
                os.close(file)
                aside.unlink()
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise StorageError(f"{path.name} may be read by others; run chmod 600 on it, or remove both files")
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise StorageError(
            f"{path.name} does not hold {SECRET_BYTES} bytes; remove it and the file beside it"
        )
    return secret


def check_owner(path: Path) -> os.stat_result:
    """Return the state of a file, folder or socket, once it is certain that no other user can exchange or write it.

    It must belong to the user of this process or to root, and so must a link to it. Other users may not write it, but
    for folders with the sticky bit, such as /tmp, where they can touch no entries of ours, and for sockets, where to
    write means to connect. A group may write: many systems give each user a group of one. Raises OSError where the
    path does not exist, and StorageError.
    """
    for state in (path.lstat(), path.stat()):
        if state.st_uid not in (os.geteuid(), 0):
            raise StorageError(
                f"{path.name} belongs to user {state.st_uid}, not to this user; remove it or give another path"
            )
        is_guarded = (
            stat.S_ISLNK(state.st_mode) or stat.S_ISSOCK(state.st_mode) or state.st_mode & stat.S_ISVTX
        )
        if state.st_mode & stat.S_IWOTH and not is_guarded:
            raise StorageError(f"{path.name} may be written by every user; run chmod o-w on it")
    return state
