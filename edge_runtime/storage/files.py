"""Small files of the state directory: where they are, how they are written, who must own them."""

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_runtime.core.errors import StorageError

SECRET_BYTES = 32
_LOCK_S = 5.0
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def state_path(setting: str, program: str, file: str) -> Path | None:
    """Where `program` keeps `file` of its state: a path, None for "off".

    "auto" is $STATE_DIRECTORY (set by systemd), else $XDG_STATE_HOME, else ~/.local/state, as the XDG base
    directory specification has it.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    # A relative path would mean the working directory; the specification has it ignored.
    folder = Path(os.environ.get("STATE_DIRECTORY", "").split(":")[0])
    if folder.is_absolute():
        return folder / file
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():
        home = _home() / ".local" / "state"
    return home / program / file


def _home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise StorageError(
            'this user has no home directory; set XDG_STATE_HOME, or a path in place of "auto"'
        )
    return home


def record_path(setting: str, program: str) -> Path | None:
    """Where `program` keeps the version floors of its bundles; see `state_path`."""
    return state_path(setting, program, "versions.json")


def write_durably(path: Path, content: bytes) -> None:
    """Replace the file so that after a power cut it holds the old or the new content, never a part.

    Write beside it, sync, rename, sync the folder. File and folder are made for this user alone. Two processes that
    write the same file must hold `locked_folder`, since both write beside it under one name. Raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)  # left behind by a power cut
    try:
        # O_EXCL follows no link and opens no file that is there already.
        with open(os.open(aside, _NEW_FILE, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that call this, so that a file in it can be read, changed and written.

    The kernel drops the lock with the process. Raises OSError: also if another process holds it for five seconds, which
    no write takes.
    """
    import fcntl  # noqa: PLC0415 - Unix only; reading must work elsewhere

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until_s:
                    raise TimeoutError(error.errno, "another process holds the folder") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def read_or_make_secret(path: Path) -> bytes:
    """The 32 random bytes in `path`, made at the first call.

    Raises OSError, and StorageError where another user may know or change them or where they are not 32.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(path.parent)
    with suppress(FileExistsError):
        if not path.exists():
            _make_secret(path)
    # What is checked is what is read: a name could be exchanged in between.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 - a descriptor
        state = os.fstat(file.fileno())
        secret = file.read(SECRET_BYTES + 1)
    check_state(path.name, state)
    if state.st_mode & 0o077:
        raise StorageError(f"{path.name} may be read by others; run chmod 600 on it, or remove both files")
    if len(secret) != SECRET_BYTES:
        raise StorageError(
            f"{path.name} does not hold {SECRET_BYTES} bytes; remove it and the file beside it"
        )
    return secret


def _make_secret(path: Path) -> None:
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    file = os.open(aside, _NEW_FILE, 0o600)
    try:
        os.write(file, secrets.token_bytes(SECRET_BYTES))
        os.fsync(file)
        # A link appears with its whole content, and fails for the second of two processes: it then reads the secret
        # of the first.
        os.link(aside, path)
    finally:
        os.close(file)
        aside.unlink()


def check_owner(path: Path) -> os.stat_result:
    """Return the state of a file, folder or socket, once it is certain that no other user can exchange or write it.

    It must belong to the user of this process or to root, and so must a link to it. Other users may not write it, but
    for folders with the sticky bit, such as /tmp, where they can touch no entries of ours, and for sockets, where to
    write means to connect. A group may write: many systems give each user a group of one. Raises OSError where the
    path does not exist, and StorageError.
    """
    for state in (path.lstat(), path.stat()):
        check_state(path.name, state)
    return state


def check_state(name: str, state: os.stat_result) -> None:
    """As `check_owner`, for the state of a file that is open already."""
    if state.st_uid not in (os.geteuid(), 0):
        raise StorageError(
            f"{name} belongs to user {state.st_uid}, not to this user; remove it or give another path"
        )
    is_guarded = stat.S_ISLNK(state.st_mode) or stat.S_ISSOCK(state.st_mode) or state.st_mode & stat.S_ISVTX
    if state.st_mode & stat.S_IWOTH and not is_guarded:
        raise StorageError(f"{name} may be written by every user; run chmod o-w on it")
