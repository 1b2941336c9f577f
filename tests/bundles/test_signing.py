"""Signatures: who is trusted, what is refused before anything is parsed, and what a user does with keys."""

import asyncio
import base64
import json
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edge_runtime.bundles import folder as folder_module
from edge_runtime.bundles import signing
from edge_runtime.bundles.folder import (
    MANIFEST,
    SIGNATURE,
    Trust,
    development_key,
    load_bundle,
    sign_bundle,
    write_bundle,
)
from edge_runtime.bundles.trust import VersionFloors
from edge_runtime.cli.main import main
from edge_runtime.config import Config, ServerSettings, TrustSettings
from edge_runtime.core.errors import BundleError, ConfigError
from edge_runtime.runtime import Runtime
from tests.bundles.quick_check import check_in_this_process
from tests.bundles.test_folder import FIELDS, PAYLOADS
from tests.loading.test_model import DOUBLE, tensor_bundle

PRIVATE, PUBLIC = signing.generate()
OTHER_PRIVATE, OTHER_PUBLIC = signing.generate()
TRUST = Trust((PUBLIC,))


@pytest.fixture
def folder(tmp_path):
    write_bundle(tmp_path / "tiny", FIELDS, PAYLOADS)
    sign_bundle(tmp_path / "tiny", PRIVATE)
    return tmp_path / "tiny"


@pytest.fixture
def quick(monkeypatch):
    """Check in this process: hundreds of checks, each without a process of its own."""
    check_in_this_process(monkeypatch)


def test_a_signed_bundle_loads_and_names_its_signer(folder):
    assert load_bundle(folder, TRUST).signed_by == signing.key_id(PUBLIC)
    assert load_bundle(folder, Trust((OTHER_PUBLIC, PUBLIC))).signed_by == signing.key_id(PUBLIC)


@pytest.mark.parametrize("spoil", [lambda s: b"", lambda s: s[:-1], lambda s: s + b"x", lambda s: s * 9])
def test_a_signature_file_of_odd_length_is_damaged(folder, quick, spoil):
    (folder / SIGNATURE).write_bytes(spoil((folder / SIGNATURE).read_bytes()))
    with pytest.raises(BundleError, match=r"damaged|bytes where"):
        load_bundle(folder, TRUST)


def test_one_trusted_signature_among_several_is_enough(folder):
    manifest = (folder / MANIFEST).read_bytes()
    both = signing.sign(manifest, OTHER_PRIVATE) + signing.sign(manifest, PRIVATE)
    (folder / SIGNATURE).write_bytes(both)
    assert load_bundle(folder, TRUST).signed_by == signing.key_id(PUBLIC)


def test_a_signature_of_somebody_else_is_refused_with_the_keys_id(folder):
    sign_bundle(folder, OTHER_PRIVATE)
    with pytest.raises(BundleError, match=signing.key_id(OTHER_PUBLIC)):
        load_bundle(folder, TRUST)


def test_a_false_claim_to_a_trusted_key_is_refused(folder):
    forged = (
        bytes.fromhex(signing.key_id(PUBLIC))
        + signing.sign((folder / MANIFEST).read_bytes(), OTHER_PRIVATE)[16:]
    )
    (folder / SIGNATURE).write_bytes(forged)
    with pytest.raises(BundleError, match="not what was signed"):
        load_bundle(folder, TRUST)


def test_unsigned_bundles_load_only_where_that_is_said(folder):
    (folder / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="not signed"):
        load_bundle(folder, TRUST)
    assert load_bundle(folder, Trust((PUBLIC,), allow_unsigned=True)).signed_by is None
    sign_bundle(folder, OTHER_PRIVATE)  # but a wrong signature is never better than none
    with pytest.raises(BundleError):
        load_bundle(folder, Trust((PUBLIC,), allow_unsigned=True))


@pytest.mark.parametrize("text", sorted(signing._SMALL_ORDER))
@pytest.mark.parametrize("sign_bit", [0, 0x80])
def test_keys_that_vouch_for_anything_are_no_keys(folder, quick, text, sign_bit):
    raw = text[:31] + bytes([text[31] | sign_bit])
    prefix = bytes.fromhex("302a300506032b6570032100")  # SubjectPublicKeyInfo of Ed25519 (RFC 8410)
    pem = b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(prefix + raw) + b"\n-----END PUBLIC KEY-----\n"
    with pytest.raises(BundleError, match=r"small order|no Ed25519"):
        load_bundle(folder, Trust((pem,)))


def test_the_key_that_ships_signed_the_bundles_that_ship():
    for name in ("commands", "./models/commands-cloud"):
        loaded = load_bundle(folder_module.find_bundle(name), Trust((development_key(),)))
        assert loaded.signed_by == signing.key_id(development_key())


def test_a_device_that_trusts_only_its_own_keys_refuses_the_projects(tmp_path):
    (tmp_path / "own.pub").write_bytes(PUBLIC)
    quiet = ServerSettings(tcp="off", socket="off")

    async def opened(keys):
        async with Runtime.open(Config(server=quiet, trust=TrustSettings(keys=keys))):
            pass

    with pytest.raises(BundleError, match="not trusted here"):
        asyncio.run(opened((str(tmp_path / "own.pub"),)))
    with pytest.raises(ConfigError, match=r"nothing\.pub"):
        asyncio.run(opened((str(tmp_path / "nothing.pub"),)))


def test_the_runtime_never_holds_the_library_that_checked():
    """9.5 MB of memory on a device, and its whole attack surface."""
    program = (
        "import asyncio, sys\nfrom edge_runtime import Runtime\n"
        "async def main():\n    async with Runtime.open():\n        print('cryptography' in sys.modules)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_keygen_sign_and_verify_as_a_user_does_them(folder, tmp_path):
    def run(*words):
        return CliRunner().invoke(main, [str(word) for word in words])

    made = run("models", "keygen", tmp_path / "mine", "--json")
    assert made.exit_code == 0
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600
    again = run("models", "keygen", tmp_path / "mine")
    assert (again.exit_code, "cannot be written" in again.output) == (1, True)
    assert run("models", "sign", folder, "--key", tmp_path / "mine").exit_code == 0
    assert run("models", "verify", folder).exit_code == 1  # the default trusts the project alone
    config = tmp_path / "edge.toml"
    config.write_text(f'[trust]\nkeys = ["{tmp_path}/mine.pub"]\n')
    verified = run("models", "verify", folder, "--config", config, "--json")
    assert json.loads(verified.output)["signed_by"] == json.loads(made.output)["key"]
    assert run("models", "sign", folder, "--key", tmp_path / "mine.pub").exit_code == 1


def signed(folder, version, private=PRIVATE, **changes):
    tensor_bundle(folder, DOUBLE, version=version, **changes)
    sign_bundle(folder, private)


def test_an_older_version_is_refused_after_a_newer_one_has_run(tmp_path):
    (tmp_path / "own.pub").write_bytes(PUBLIC)
    (tmp_path / "other.pub").write_bytes(OTHER_PUBLIC)
    record = tmp_path / "state" / "versions.json"
    keys = (str(tmp_path / "own.pub"), str(tmp_path / "other.pub"))
    config = Config(
        models=(str(tmp_path / "m"),),
        server=ServerSettings(tcp="off", socket="off"),
        trust=TrustSettings(keys=keys, record=str(record)),
    )

    def start():
        async def opened():
            async with Runtime.open(config):
                pass

        asyncio.run(opened())

    for version in ("5", "5", "7"):
        signed(tmp_path / "m", version)
        start()
    before = record.read_bytes()
    signed(tmp_path / "m", "6")
    with pytest.raises(BundleError, match="version 7 has run"):
        start()
    signed(tmp_path / "m", "7", licence="changed")
    with pytest.raises(BundleError, match="another version 7"):
        start()
    assert record.read_bytes() == before
    signed(tmp_path / "m", "2", OTHER_PRIVATE)  # a new key begins anew
    start()
    record.write_bytes(b"{")  # a lost record is said aloud, and begun anew
    start()
    assert json.loads(record.read_bytes())["tiny"]["version"] == 2


def test_a_state_folder_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    record = VersionFloors(tmp_path / "file" / "versions.json")
    record.admit("m", "onnx", "1", "d", "k")
    assert "version_floors_not_saved" in caplog.text
    with pytest.raises(BundleError):
        record.admit("m", "onnx", "0", "d", "k")


def test_a_folder_becomes_a_signed_bundle(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (tmp_path / "key").write_bytes(PRIVATE)

    def pack(*more):
        words = ["models", "pack", str(source), str(out), *more]
        return CliRunner().invoke(main, words)

    assert "cannot be read" in pack().output
    (source / MANIFEST).write_text("{")
    assert pack().exit_code == 1
    (source / MANIFEST).write_text(json.dumps(FIELDS))
    assert pack().exit_code == 1  # the model that the manifest names is missing
    for name, content in PAYLOADS.items():
        (source / name).write_bytes(content)
    assert pack("--key", str(tmp_path / "key")).exit_code == 0
    assert load_bundle(out, TRUST).files == PAYLOADS
    assert "not signed" in pack().output  # packed again: what was signed is gone
    with pytest.raises(BundleError, match="not signed"):
        load_bundle(out, TRUST)
    (tmp_path / "precious").mkdir()
    words = ["models", "pack", str(source), str(tmp_path / "precious")]
    assert "exists and is no bundle" in CliRunner().invoke(main, words).output
