"""Files of the state directory: whole after a power cut, for this user alone, and nobody else's."""

import os
import socket

import pytest

from edge_runtime.core.errors import StorageError
from edge_runtime.storage.files import check_owner, read_or_make_secret, state_path, write_durably


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
