"""Bundles: every way in which one may be wrong is refused with a BundleError before it is used."""

import hashlib
import json
import os
import shutil
import socket
import stat
from pathlib import Path

import msgspec
import pytest
import zstandard

from edge_runtime.bundles import folder as folder_module
from edge_runtime.bundles import signing
from edge_runtime.bundles.folder import (
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Trust,
    find_bundle,
    load_bundle,
    pack_folder,
    sign_bundle,
    write_bundle,
)
from edge_runtime.bundles.manifest import MANIFEST
from edge_runtime.compression import compress
from edge_runtime.core.errors import BundleError
from edge_runtime.core.protocol.ids import is_id
from tests.bundles.quick_check import check_in_this_process

FIELDS = {
    "name": "tiny",
    "version": "1",
    "task": "tensors",
    "signature": {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    },
    "engine": "onnx",
    "model": "model.onnx",
    "processing": {"kind": "tensors", "version": "1"},
    "batch": {"max": 8, "invariant": True},
    "licence": "Apache-2.0",
}
PAYLOADS = {"model.onnx": b"not a model, which a bundle need not know" * 3, "notes.txt": b"hello"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "tiny", FIELDS, PAYLOADS)
    return tmp_path / "tiny"


def edit(folder: Path, **changes):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest.update(changes)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_file(folder: Path, **changes):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][0].update(changes)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_payload(folder: Path, stored: bytes, **changes):
    """Put other stored bytes behind the first file, with honest stored size and digest."""
    (folder / "model.onnx.zst").write_bytes(stored)
    digest = hashlib.sha256(stored).hexdigest()
    edit_file(folder, stored_size=len(stored), stored_sha256=digest, **changes)


def refused(folder: Path, words: str = "bundle", trust=None):
    with pytest.raises(BundleError, match=words) as caught:
        load_bundle(folder, trust)
    assert "\n" not in str(caught.value)
    assert str(folder.parent) not in str(caught.value)


def test_what_was_written_is_read(folder):
    bundle = load_bundle(folder)
    assert dict(bundle.files) == PAYLOADS
    assert bundle.manifest.name == "tiny"
    assert bundle.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert bundle.stored_bytes == sum(f.stat().st_size for f in folder.iterdir())


def test_writing_again_replaces(folder):
    write_bundle(folder, FIELDS, {"model.onnx": b"other"})
    assert dict(load_bundle(folder).files) == {"model.onnx": b"other"}
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_each_flipped_payload_byte_is_refused(folder):
    for payload in folder.glob("*.zst"):
        good = payload.read_bytes()
        for at in range(len(good)):
            payload.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            refused(folder, "damaged|open")
        payload.write_bytes(good)
    load_bundle(folder)


def test_a_flipped_manifest_byte_is_refused_or_another_digest(folder):
    path = folder / MANIFEST
    good, digest = path.read_bytes(), load_bundle(folder).digest
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            assert load_bundle(folder).digest != digest
        except BundleError:
            continue


def test_each_truncation_is_refused(folder):
    for path in folder.iterdir():
        good = path.read_bytes()
        for length in range(0, len(good) - 1, 7):  # the manifest ends in a newline, which may go
            path.write_bytes(good[:length])
            refused(folder)
        path.write_bytes(good)


def test_longer_files_are_refused(folder):
    with (folder / "model.onnx.zst").open("ab") as file:
        file.write(b"x")
    refused(folder, "allowed")


@pytest.mark.parametrize("name", ["model.onnx.zst", "notes.txt.zst", MANIFEST, SIGNATURE])
def test_what_is_no_plain_file_of_its_own_is_refused(folder, tmp_path, monkeypatch, name):
    check_in_this_process(monkeypatch)  # without a process for each check
    private, public = signing.generate()
    sign_bundle(folder, private)
    aside, trust = tmp_path / "aside", Trust((public,))
    (folder / name).rename(aside)
    (folder / name).symlink_to(aside)
    refused(folder, "cannot be opened", trust)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    refused(folder, "cannot be opened", trust)
    (folder / name).unlink()
    os.link(aside, folder / name)
    refused(folder, "not a plain file", trust)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "not a plain file", trust)
    (folder / name).unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may have 107 bytes at most
        try:
            listening.bind(name)
        finally:
            os.chdir(here)
    refused(folder, "cannot be opened", trust)
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, "not a plain file", trust)
    (folder / name).rmdir()
    aside.rename(folder / name)
    load_bundle(folder, trust)


def test_a_device_is_refused(folder):
    (folder / "notes.txt.zst").unlink()
    try:
        os.mknod(folder / "notes.txt.zst", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")
    refused(folder, "not a plain file|cannot be opened")


def test_a_folder_may_be_named_by_a_link_and_is_read_as_one(folder, tmp_path):
    (tmp_path / "current").symlink_to(folder)
    assert dict(load_bundle(tmp_path / "current").files) == PAYLOADS


@pytest.mark.parametrize(
    "name", [b"extra.txt", b".hidden", b"model.onnx", b"x.so", b"\xff\xfe", b"a\nb", b"extra.txt.zst"]
)
def test_unlisted_files_are_refused_whatever_they_are(folder, name):
    extra = folder / os.fsdecode(name)
    for make, remove in (
        (extra.touch, extra.unlink),
        (lambda: extra.symlink_to("x"), extra.unlink),
        (extra.mkdir, extra.rmdir),
    ):
        make()
        refused(folder, "not listed")
        remove()
    load_bundle(folder)


def test_missing_files_are_refused(folder):
    (folder / "notes.txt.zst").unlink()
    refused(folder, "cannot be opened")


NAMES = [
    "..",
    "../x.txt",
    "a/../b.txt",
    "%2e%2e",
    "A.txt",
    "x" * 300 + ".txt",
    ".txt",
    "-x.txt",
    "a\\b.txt",
    "a\n.txt",
    "\u0430.txt",
    "a/b.txt",
    "/etc/passwd.txt",
    "a\0.txt",
    "CON.txt",
    "x" * 62 + ".txt",
    "a..txt",
    "%2e.txt",
    "",
]


@pytest.mark.parametrize("name", [*NAMES, "x.pkl", "x.so", "x.py", "x"])
def test_path_like_and_program_names_are_refused(folder, name):
    edit_file(folder, name=name)
    refused(folder, "file")


@pytest.mark.parametrize("name", NAMES)
def test_path_like_names_are_no_ids(name):
    assert not is_id(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "edge-runtime-bundle/2"},
        {"format": None},
        {"format": {}},
        {"name": "../x"},
        {"version": "1/2"},
        {"model": "absent.onnx"},
        {"labels": "absent.json"},
        {"files": []},
        {"batch": {"max": 0, "invariant": True}},
        {"batch": {"max": 10**6, "invariant": True}},
        {"batch": {"max": 1.5, "invariant": True}},
        {"signature": {"inputs": [], "outputs": []}},
        {"signature": {**FIELDS["signature"], "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}]}},
        {"calibration": {"temperature": 0, "knots": [[0, 0], [1, 1]]}},
        {"calibration": {"temperature": 1, "knots": [[0, 0]]}},
        {"calibration": {"temperature": 1, "knots": [[0.5, 0], [0.5, 1]]}},
        {"calibration": {"temperature": 1, "knots": [[0, 1], [1, 0]]}},
        {"calibration": {"temperature": 1, "knots": [[0, 0], [1, 1.5]]}},
        {"calibration": {"temperature": 1, "knots": [[i / 40, i / 40] for i in range(33)]}},
        {"calibration": {"temperature": 1, "knots": [[0, 0], [1, 1]], "accept_threshold": 2}},
    ],
)
def test_unfit_manifests_are_refused(folder, changes):
    edit(folder, **changes)
    refused(folder, MANIFEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "0" * 63},
        {"sha256": "0" * 64},
        {"stored_sha256": "../" + "0" * 61},
        {"size": 0},
        {"size": 2**40},
        {"size": 5},
        {"stored_size": -1},
        {"compression": "gzip"},
    ],
)
def test_unfit_file_entries_are_refused(folder, changes):
    edit_file(folder, **changes)
    refused(folder)


def test_unknown_fields_are_ignored(folder):
    edit(folder, serial=7, note={"deep": [1]})
    load_bundle(folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"format": "\xff"}',
        b'{"format":"\xff',
        b'{"a":' + b"[" * 100_000,
        b'{"format":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
)
def test_unreadable_manifests_are_refused(folder, raw):
    (folder / MANIFEST).write_bytes(raw)
    refused(folder)


def test_bombs_are_refused(folder):
    zeros = bytes(64 * 1024 * 1024)
    replace_payload(folder, compress(zeros, 3))
    refused(folder, "declares")
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    replace_payload(folder, undeclared)
    refused(folder, "does not declare")
    wide = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    frame = zstandard.ZstdCompressor(compression_params=wide).compress(zeros)
    replace_payload(folder, frame, size=len(zeros), sha256=hashlib.sha256(zeros).hexdigest())
    refused(folder, "window")


def test_second_and_trailing_frames_are_refused(folder):
    frame = (folder / "model.onnx.zst").read_bytes()
    for tail in (b"x", compress(b"more"), b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"):
        replace_payload(folder, frame + tail)
        refused(folder, "unpacked")
    replace_payload(folder, b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd")
    refused(folder, "unpacked")


def test_a_swapped_payload_with_an_honest_stored_digest_is_refused(folder):
    plain = PAYLOADS["model.onnx"]
    replace_payload(folder, compress(plain[::-1]))
    refused(folder, "not what")


def test_no_payload_is_unpacked_before_its_digest_holds(folder, monkeypatch):
    def parse(*_args, **_kwargs):
        raise AssertionError("unpacked unverified bytes")

    monkeypatch.setattr("edge_runtime.bundles.folder.decompress", parse)
    stored = (folder / "model.onnx.zst").read_bytes()
    (folder / "model.onnx.zst").write_bytes(bytes(len(stored)))
    refused(folder, "damaged")


def test_finding(folder, tmp_path):
    assert find_bundle(str(folder)) == folder
    assert find_bundle("commands").name == "commands"
    for absent in ("no-such-bundle", "Not An Id", "..", str(tmp_path / "absent")):
        with pytest.raises(BundleError):
            find_bundle(absent)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")
    refused(tmp_path / "absent")


def test_manifest_is_for_people(folder):
    text = (folder / MANIFEST).read_text()
    assert text.count("\n") > 20
    assert msgspec.json.decode(text)["files"][0]["name"] == "model.onnx"


def test_a_path_of_one_level_is_never_taken_for_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "commands")  # as a shipped bundle is named
    found = find_bundle("./commands")
    assert found == Path("commands")
    assert find_bundle(found).resolve() == tmp_path / "commands"


def test_writing_touches_nothing_beside_and_follows_a_link(folder, tmp_path):
    bundle = load_bundle(folder)
    fields = {k: v for k, v in msgspec.to_builtins(bundle.manifest).items() if k not in ("format", "files")}
    beside = tmp_path / "mine.new"
    beside.mkdir()
    (beside / "file.txt").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out in (tmp_path / "mine", tmp_path / "mine", tmp_path / "link"):
        assert write_bundle(out, fields, bundle.files).digest
    assert (beside / "file.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == ["link", "mine", "mine.new"]
    assert (tmp_path / "link").is_symlink()


# What is removed is what was made here


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx", ".git", "weights.pt"])
def test_a_folder_with_anything_but_a_bundle_is_never_replaced(folder, name):
    (folder / name).write_text("precious")
    with pytest.raises(BundleError, match="no part of a bundle"):
        write_bundle(folder, FIELDS, PAYLOADS)
    (folder / name).rename(folder.parent / "kept")
    (folder / MANIFEST).unlink()
    (folder.parent / "kept").rename(folder / name)
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write_bundle(folder, FIELDS, PAYLOADS)
    assert (folder / name).read_text() == "precious"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_file_in_the_place_of_a_bundle_is_left_alone(tmp_path):
    (tmp_path / "tiny").write_text("precious")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write_bundle(tmp_path / "tiny", FIELDS, PAYLOADS)
    assert (tmp_path / "tiny").read_text() == "precious"


def test_a_bundle_packed_onto_its_own_source_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / MANIFEST).write_text(json.dumps(FIELDS))
    for name, content in PAYLOADS.items():
        (source / name).write_bytes(content)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with pytest.raises(BundleError, match="no part of a bundle"):
        pack_folder(source, source)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_replacement_that_fails_leaves_the_former_bundle(folder, monkeypatch):
    real = Path.rename

    def fail(path, target):
        if Path(target) == folder and ".old" not in path.name:
            raise OSError(28, "No space left on device")
        return real(path, target)

    before = load_bundle(folder).digest
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write_bundle(folder, FIELDS | {"version": "99"}, PAYLOADS)
    assert load_bundle(folder).digest == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_signing_writes_through_no_link(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (folder / SIGNATURE).symlink_to(outside)
    private, public = signing.generate()
    sign_bundle(folder, private)
    assert outside.read_text() == "precious"
    assert load_bundle(folder, Trust((public,))).signed_by == signing.key_id(public)


def test_a_manifest_that_changes_between_check_and_signature_is_not_signed(folder, monkeypatch):
    real = folder_module.load_bundle

    def load_and_change(path):
        loaded = real(path)
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" ")
        return loaded

    monkeypatch.setattr(folder_module, "load_bundle", load_and_change)
    with pytest.raises(BundleError, match="was changed while"):
        sign_bundle(folder, signing.generate()[0])
    assert not (folder / SIGNATURE).exists()
