"""Record files: no change of one process undoes that of another, and no other user decides what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_runtime.core.errors import ConfigError
from edge_runtime.storage.record_file import RecordFile


class Number(msgspec.Struct, frozen=True):
    n: int


def opened(path):
    return RecordFile(path, Number, event="numbers", setting="[trust] record")


def add(path, name, n):
    return opened(path).update(lambda saved: saved | {name: Number(n)})


def test_entries_outlive_the_object_and_changes_add_up(tmp_path):
    path = tmp_path / "state" / "numbers.json"
    early, late = opened(path), opened(path)
    assert early.read() == {}
    early.update(lambda saved: saved | {"a": Number(1)})
    late.update(lambda saved: saved | {"b": Number(2)})  # which has not seen the change of the other
    assert opened(path).read() == {"a": Number(1), "b": Number(2)}


def test_none_keeps_nothing():
    record = opened(None)
    assert record.update(lambda saved: saved | {"a": Number(1)}) == {"a": Number(1)}
    assert record.read() == {}


COUNT_UP = """
import sys
from pathlib import Path
from tests.storage.test_record_file import Number, opened
for _ in range(30):
    opened(Path(sys.argv[1])).update(lambda saved: {"n": Number(saved["n"].n + 1 if saved else 1)})
"""


def test_processes_that_change_one_file_at_once_lose_nothing(tmp_path):
    path = tmp_path / "numbers.json"
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", COUNT_UP, path], env=here) for _ in range(3)]
    for process in processes:
        assert process.wait(60) == 0
    assert opened(path).read() == {"n": Number(90)}
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


def test_an_unchanged_file_is_not_written(tmp_path):
    add(tmp_path / "numbers.json", "a", 1)
    before = (tmp_path / "numbers.json").stat().st_ino
    add(tmp_path / "numbers.json", "a", 1)
    assert (tmp_path / "numbers.json").stat().st_ino == before


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"a": {"n": "x"}}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_counts_as_empty_and_is_reported(tmp_path, caplog, raw):
    path = tmp_path / "numbers.json"
    path.write_bytes(raw)
    assert opened(path).read() == {}
    assert "event=numbers_reset" in caplog.text
    add(path, "a", 1)
    assert json.loads(path.read_bytes()) == {"a": {"n": 1}}


def test_a_change_that_raises_leaves_the_file_and_releases_the_lock(tmp_path):
    path = tmp_path / "numbers.json"
    add(path, "a", 1)

    def refuse(saved):
        raise ValueError(saved)

    with pytest.raises(ValueError):
        opened(path).update(refuse)
    assert add(path, "b", 2) == {"a": Number(1), "b": Number(2)}


def test_a_file_that_cannot_be_written_is_reported_and_the_change_holds(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert add(tmp_path / "file" / "numbers.json", "a", 1) == {"a": Number(1)}
    assert "event=numbers_not_saved" in caplog.text


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o666), lambda path: path.parent.chmod(0o777)])
def test_a_file_that_every_user_may_change_is_refused(tmp_path, spoil):
    path = tmp_path / "state" / "numbers.json"
    add(path, "a", 1)
    spoil(path)
    with pytest.raises(ConfigError, match=r"\[trust\] record: .* chmod o-w"):
        opened(path).read()
    with pytest.raises(ConfigError, match=r"\[trust\] record"):
        add(path, "a", 2)
    assert json.loads(path.read_bytes()) == {"a": {"n": 1}}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_file_of_another_user_is_refused(tmp_path, which):
    path = tmp_path / "state" / "numbers.json"
    add(path, "a", 1)
    os.chown(path if which == "file" else path.parent, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        opened(path).read()
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        add(path, "a", 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_an_empty_folder_of_another_user_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        add(folder / "numbers.json", "a", 1)
    assert list(folder.iterdir()) == []
