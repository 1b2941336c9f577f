"""The commands about bundles."""

import json
import shutil

import pytest

from edge_runtime.bundles.folder import find_bundle
from tests.processes import cli


def test_models_are_listed_shown_and_verified():
    assert json.loads(cli("models", "list", "--json").stdout)[0]["name"] == "commands"
    assert json.loads(cli("models", "show", "commands", "--json").stdout)["loaded"]["batch_invariant"]
    assert cli("models", "verify", "commands").stdout.startswith("ok: commands")


@pytest.fixture
def forged(tmp_path):
    """A bundle whose manifest was changed after it was signed, and a configuration that serves it."""
    folder = tmp_path / "forged"
    shutil.copytree(find_bundle("commands"), folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"licence": "', '"licence": "not '))
    config = tmp_path / "edge.toml"
    config.write_text(f'models = ["{folder}"]\n[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "127.0.0.1:0"\n')
    return folder, str(config)


@pytest.mark.parametrize(
    "arguments",
    [
        ("models", "show", "FOLDER"),
        ("models", "show", "FOLDER", "--json"),
        ("models", "verify", "FOLDER"),
        ("models", "verify", "FOLDER", "--again"),
        ("models", "list", "--config", "CONFIG"),
        ("serve", "--config", "CONFIG"),
        ("ask", "hi", "--config", "CONFIG"),
        ("infer", "commands", "-", "--config", "CONFIG"),
    ],
    ids=" ".join,
)
def test_no_command_uses_a_bundle_whose_signature_fails(forged, arguments):
    folder, config = forged
    places = {"FOLDER": str(folder), "CONFIG": config}
    request = '{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["hi"]}]}'
    done = cli(*[places.get(word, word) for word in arguments], input=request)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: " in done.stderr
    assert "manifest is not what was signed" in done.stderr


def test_a_bundle_is_shown_under_the_keys_that_its_configuration_trusts(tmp_path):
    """The development key is not trusted beside keys of one's own."""
    cli("models", "keygen", "key", cwd=tmp_path)
    config = tmp_path / "edge.toml"
    config.write_text(f'[trust]\nkeys = ["{tmp_path}/key.pub"]\n')
    refused = cli("models", "show", "commands", "--config", str(config))
    assert (refused.returncode, refused.stdout) == (1, "")
    folder = tmp_path / "mine"
    shutil.copytree(find_bundle("commands"), folder)
    assert cli("models", "sign", str(folder), "--key", str(tmp_path / "key")).returncode == 0
    shown = cli("models", "show", str(folder), "--config", str(config), "--json")
    assert json.loads(shown.stdout)["name"] == "commands", shown.stderr
