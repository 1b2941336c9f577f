"""What all commands share: mistakes end in one sentence, and help is quick."""

import subprocess
import sys

import pytest

from tests.processes import cli


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("aks", "x"), 2, "Did you mean 'ask'"),
        (("models", "verify", "./nowhere"), 1, "nowhere"),
        (("ask", "x", "--config", "/nonexistent.toml"), 2, "cannot be read"),
        (("infer", "nope", "-"), 1, "malformed"),
        (("ask", " "), 2, "nothing to ask"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, code, words):
    done = cli(*arguments, input="{")
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


#: What only some command needs. `--help` and a mistyped command must not wait for it.
HEAVY = ("numpy", "onnxruntime", "msgspec", "rich", "asyncio", "sqlite3", "paho", "prometheus_client")


@pytest.mark.parametrize("program", ["edge_runtime.cli.main", "cloud_fallback.cli"])
def test_help_loads_nothing_that_only_commands_need(program):
    code = (
        f"import sys; from {program} import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print('loaded:', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout + done.stderr


def commands(group, *path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_every_command_says_what_it_does_in_a_sentence():
    from edge_runtime.cli.main import main

    found = dict(commands(main))
    assert {("ask",), ("models", "verify"), ("config", "check")} <= set(found)
    for path, command in found.items():
        assert command.help, path
        assert command.help.splitlines()[0].rstrip().endswith("."), path
