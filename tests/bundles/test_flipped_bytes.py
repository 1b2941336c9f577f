"""Every byte of a shipped bundle counts: with any one of them changed it is refused, and no parser has seen it."""

import os
import shutil

import pytest

from edge_runtime.bundles import folder as folder_module
from edge_runtime.bundles import manifest
from edge_runtime.bundles.folder import MANIFEST, SIGNATURE, Trust, development_key, find_bundle, load_bundle
from edge_runtime.core.errors import BundleError
from tests.bundles.quick_check import check_in_this_process

TRUST = Trust((development_key(),))
#: `make fuzz` flips each byte of the payloads too, a quarter of an hour for the model; every test run, many of them.
STRIDE = 1 if "EDGE_RUNTIME_FUZZ" in os.environ else 499


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(find_bundle("commands"), tmp_path / "commands")
    return tmp_path / "commands"


@pytest.fixture
def parsed(monkeypatch):
    """The names of what was handed to a parser, in order: the manifest, then each payload that was unpacked."""
    seen = []

    def spied(parse, name):
        def spy(*arguments, **options):
            seen.append(name)
            return parse(*arguments, **options)

        return spy

    monkeypatch.setattr(folder_module, "parse_manifest", spied(manifest.parse_manifest, MANIFEST))
    monkeypatch.setattr(folder_module, "decompress", spied(folder_module.decompress, "payload"))
    # In this process: thousands of checks, each without a process of its own.
    check_in_this_process(monkeypatch)
    return seen


def flips(path, positions):
    """Change one byte after the other in place; each is put back before the next."""
    with path.open("r+b", buffering=0) as file:
        for at in positions:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ (1 << at % 8)]))
            yield at
            file.seek(at)
            file.write(byte)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_no_byte_of_what_is_signed_may_change(copy, parsed, name):
    path = copy / name
    for at in flips(path, range(path.stat().st_size)):
        with pytest.raises(BundleError, match="bundle 'commands'"):
            load_bundle(copy, TRUST)
        assert parsed == [], at
    load_bundle(copy, TRUST)
    assert parsed[0] == MANIFEST


@pytest.mark.parametrize("name", ["labels.json.zst", "model.onnx.zst"])
def test_no_byte_of_a_payload_may_change(copy, parsed, name):
    entries = [f"{entry.name}.zst" for entry in load_bundle(copy).manifest.files]
    before = [MANIFEST] + ["payload"] * entries.index(name)
    path = copy / name
    size = path.stat().st_size
    positions = range(0, size, STRIDE if size > 5000 else 1)
    assert len(positions) > 900
    for at in flips(path, positions):
        parsed.clear()
        with pytest.raises(BundleError, match="damaged"):
            load_bundle(copy, TRUST)
        assert parsed == before, at
    load_bundle(copy, TRUST)
