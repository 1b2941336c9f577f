"""Who decides which bundles run: only this user and root, and no process undoes the floor of another."""

import json
import os

import pytest

from edge_runtime.bundles import signing
from edge_runtime.bundles.trust import VersionFloors, read_trust
from edge_runtime.core.errors import BundleError, ConfigError

PUBLIC = signing.generate()[1]


def admit(floors, version, name="m", key="k", digest=None):
    floors.admit(name, "onnx", str(version), digest or f"d{version}", key)


def saved(path):
    return {name: entry["version"] for name, entry in json.loads(path.read_bytes()).items()}


def test_floors_that_two_processes_raise_add_up(tmp_path):
    path = tmp_path / "versions.json"
    one, other = VersionFloors(path), VersionFloors(path)
    admit(one, 5, "m")
    admit(other, 7, "n")  # read before the first was written
    assert saved(path) == {"m": 5, "n": 7}
    with pytest.raises(BundleError, match="version 5 has run"):
        admit(other, 4, "m")
    with pytest.raises(BundleError, match="version 7 has run"):
        admit(one, 6, "n")


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{")])
def test_a_file_that_goes_lowers_no_floor_of_a_process_that_runs(tmp_path, spoil):
    path = tmp_path / "versions.json"
    floors = VersionFloors(path)
    admit(floors, 5, "m")
    admit(floors, 9, "n")
    spoil(path)
    with pytest.raises(BundleError, match="version 5 has run"):
        admit(floors, 4, "m")
    admit(floors, 6, "m")
    assert saved(path) == {"m": 6, "n": 9}


def test_an_older_file_that_is_put_back_lowers_no_floor_of_a_process_that_runs(tmp_path):
    path = tmp_path / "versions.json"
    floors = VersionFloors(path)
    admit(floors, 4)
    old = path.read_bytes()
    admit(floors, 5)
    path.write_bytes(old)
    with pytest.raises(BundleError, match="version 5 has run"):
        admit(floors, 4)


def test_a_refused_version_changes_nothing_on_disk(tmp_path):
    path = tmp_path / "versions.json"
    floors = VersionFloors(path)
    admit(floors, 5)
    before = path.read_bytes()
    for version, digest in ((4, None), (5, "other")):
        with pytest.raises(BundleError):
            admit(floors, version, digest=digest)
    assert path.read_bytes() == before


def test_without_a_file_the_floors_live_as_long_as_the_process():
    floors = VersionFloors(None)
    admit(floors, 5)
    with pytest.raises(BundleError):
        admit(floors, 4)
    admit(floors, 1, key="new")
    floors.admit("m", "onnx", "0", "d", None)  # unsigned: no floor


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "own.pub"
    path.write_bytes(PUBLIC)
    return path


def test_a_trusted_key_is_read_from_a_file_of_this_user(key_file):
    assert read_trust([str(key_file)], allow_unsigned=False).keys == (PUBLIC,)
    key_file.chmod(0o664)  # as a umask of 002 makes it
    assert read_trust([str(key_file)], allow_unsigned=False).keys == (PUBLIC,)


def test_a_key_that_every_user_may_exchange_is_not_trusted(key_file):
    key_file.chmod(0o666)
    with pytest.raises(ConfigError, match=r"\[trust\] keys: own\.pub may be written by every user"):
        read_trust([str(key_file)], allow_unsigned=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("is_link", [False, True])
def test_a_key_of_another_user_is_not_trusted(key_file, tmp_path, is_link):
    path = key_file
    if is_link:
        path = tmp_path / "link.pub"
        path.symlink_to(key_file)
    os.chown(path, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match=r"\[trust\] keys: .* belongs to user 65534"):
        read_trust([str(path)], allow_unsigned=False)
