"""Files of the state directory: whole after a power cut, for this user alone, and nobody else's."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.core.errors import StorageError
from edge_runtime.storage import files
from edge_runtime.storage.files import (
    check_owner,
    locked_folder,
    read_or_make_secret,
    state_path,
    write_durably,
)


def test_a_secret_that_others_can_read_or_that_is_cut_is_refused(tmp_path):
    path = tmp_path / "secret"
    secret = read_or_make_secret(path)
    assert len(secret) == 32
    assert read_or_make_secret(path) == secret
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        read_or_make_secret(path)
    path.chmod(0o600)
    path.write_bytes(secret[:31])
    with pytest.raises(StorageError, match="32 bytes"):
        read_or_make_secret(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_a_secret_that_another_user_made_is_refused(tmp_path):
    """Its mode looks private, and root could read it: the other user knows it all the same."""
    path = tmp_path / "secret"
    read_or_make_secret(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(StorageError, match="belongs to user 65534"):
        read_or_make_secret(path)
    path.unlink()
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(StorageError, match="belongs to user 65534"):
        read_or_make_secret(path)
    assert not path.exists()


def test_a_secret_is_read_through_no_link(tmp_path):
    read_or_make_secret(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="symbolic"):
        read_or_make_secret(tmp_path / "link")


@pytest.mark.parametrize("relative", ["state", ".", "../x", "~/state", ""])
def test_no_relative_place_of_the_environment_is_used(tmp_path, monkeypatch, relative):
    """It would mean the working directory, which may be a download with a record of somebody else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", relative)
    monkeypatch.setenv("STATE_DIRECTORY", relative)
    assert state_path("auto", "p", "f") == tmp_path / ".local" / "state" / "p" / "f"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(StorageError, match="set XDG_STATE_HOME"):
        state_path("auto", "p", "f")
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    with pytest.raises(StorageError, match="set XDG_STATE_HOME"):
        state_path("auto", "p", "f")
    assert state_path("off", "p", "f") is None


def test_state_lies_where_systemd_or_the_desktop_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_path("auto", "p", "f") == tmp_path / ".local" / "state" / "p" / "f"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_path("auto", "p", "f") == tmp_path / "xdg" / "p" / "f"
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/systemd:{tmp_path}/second")
    assert state_path("auto", "p", "f") == tmp_path / "systemd" / "f"
    assert state_path("off", "p", "f") is None
    assert state_path(f"{tmp_path}/own", "p", "f") == tmp_path / "own"


def test_a_file_is_synced_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    path, calls = tmp_path / "new" / "state", []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        calls.append(("sync", os.path.realpath(f"/proc/self/fd/{handle}")))
        real_sync(handle)

    def replace(source, target):
        calls.append(("replace", os.path.realpath(source)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["state"]
    for content, renamed, folder in zip(calls[::3], calls[1::3], calls[2::3], strict=True):
        assert (content[0], renamed[0]) == ("sync", "replace")
        assert content[1] == renamed[1]
        assert folder == ("sync", str(path.parent))


def test_a_written_file_is_for_this_user_alone_and_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "file").symlink_to(outside)
    (folder / "file.new").symlink_to(outside)
    write_durably(folder / "file", b"state")
    assert outside.read_bytes() == b"precious"
    assert not (folder / "file").is_symlink()
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600
    assert [p.name for p in folder.iterdir()] == ["file"]
    write_durably(tmp_path / "made" / "file", b"state")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700


def test_a_write_that_fails_leaves_nothing_beside_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_lock_keeps_others_out_and_goes_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_S", 0.05)
    program = (
        "import sys\nfrom pathlib import Path\nfrom edge_runtime.storage.files import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TimeoutError, match="another process"), locked_folder(tmp_path):
            pytest.fail("two processes hold one lock")
        holder.kill()
        holder.wait()
    with locked_folder(tmp_path):
        pass


def test_what_this_user_or_root_alone_may_change_is_relied_on(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o777)
        for path in (tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "socket"):
            assert check_owner(path).st_uid == os.geteuid()
    with pytest.raises(FileNotFoundError):
        check_owner(tmp_path / "absent")


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_what_every_user_may_write_is_not(tmp_path, mode):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StorageError, match="chmod o-w"):
        check_owner(folder)
    folder.chmod(mode | 0o1000)  # as /tmp is
    check_owner(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_what_another_user_owns_is_not(tmp_path):
    for name in ("target", "link"):
        (tmp_path / "target").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "target")
        os.chown(tmp_path / name, 65534, 65534, follow_symlinks=False)
        with pytest.raises(StorageError, match="belongs to user 65534"):
            check_owner(tmp_path / "link")
        (tmp_path / "target").unlink()
        (tmp_path / "link").unlink()
