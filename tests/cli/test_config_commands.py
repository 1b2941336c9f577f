"""The commands about the configuration."""

import json

import pytest

from edge_runtime.config import load_config
from tests.processes import cli


def test_a_file_is_checked_and_shown(config):
    assert cli("config", "check", str(config)).returncode == 0
    shown = json.loads(cli("config", "show", "--json", "--config", str(config)).stdout)
    assert shown["models"] == ["commands"]


def test_what_is_shown_can_be_saved_and_means_the_same(config, tmp_path):
    done = cli("config", "show", "--config", str(config))
    assert "max_bytes = " in done.stdout
    saved = tmp_path / "saved.toml"
    saved.write_text(done.stdout)
    assert load_config(saved) == load_config(config)


def test_a_former_name_is_read_and_the_new_one_named_on_stderr(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text('[batch]\nwindow = "none"\n')
    done = cli("config", "check", str(path))
    assert (done.returncode, done.stdout) == (0, f"ok: {path}\n")
    assert f'{path}: [batch] window = "none" is now "off"' in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('models = ["./nowhere"]', ["nowhere"]),
        ('[trust]\nkeys = ["/nowhere.pub"]', ["[trust] keys: /nowhere.pub cannot be read"]),
        (
            '[cloud]\nbroker = "mqtt://x"\npassword_file = "/nowhere"',
            ["password_file: /nowhere cannot be read"],
        ),
        ('[cloud]\nbroker = "mqtt://x"\ndevice = "a..b"', ["[cloud] device"]),
        ('[server]\ntcp = "0.0.0.0:1"', ["[server] tcp", "not a loopback address"]),
        ('models = ["commands", "commands"]', ["listed twice"]),
    ],
)
def test_what_serve_refuses_check_refuses(tmp_path, text, words):
    path = tmp_path / "edge.toml"
    path.write_text(text)
    for command in (("config", "check", str(path)), ("serve", "--config", str(path))):
        done = cli(*command)
        assert done.returncode in ((2,) if command[0] == "config" else (1, 2)), done.stderr
        assert all(word in done.stderr for word in words), done.stderr
        assert "Traceback" not in done.stderr
