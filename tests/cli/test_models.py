"""The commands about bundles."""

import json

from tests.processes import cli


def test_models_are_listed_shown_and_verified():
    assert json.loads(cli("models", "list", "--json").stdout)[0]["name"] == "commands"
    assert json.loads(cli("models", "show", "commands", "--json").stdout)["loaded"]["batch_invariant"]
    assert cli("models", "verify", "commands").stdout.startswith("ok: commands")
