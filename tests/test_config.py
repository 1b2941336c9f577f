"""Every mistake in a configuration gets one sentence with file, key and fix."""

import pytest

from cloud_fallback.config import load_config as load_cloud
from edge_runtime.config import Config, load_config
from edge_runtime.core.errors import ConfigError
from edge_runtime.core.scheduling.windows import policy_of


def test_nothing_and_an_empty_file_give_the_defaults(tmp_path):
    empty = tmp_path / "edge.toml"
    empty.write_text("")
    assert load_config(None) == load_config(empty) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles = []", ["modles", "unknown key", "models"]),
        ("[cache]\nmax_byte = 3", ["[cache] max_byte", "Did you mean max_bytes?"]),
        ('[cache]\nmax_bytes = "3"', ["[cache] max_bytes", "whole number", "text"]),
        ("[cache]\nmax_bytes = 0", ["[cache] max_bytes", ">= 1"]),
        ("[cache]\ndisk_max_bytes = 1000", ["[cache] disk_max_bytes", ">= 4194304"]),
        ("[cache]\nstale_s = -1", ["[cache] stale_s", ">= 0"]),
        ("[cloud]\ntenant = 'x'", ["[cloud] broker", "missing"]),
        ("[cloud]\nbroker = 'http://x'", ["[cloud] broker", "mqtt://"]),
        ("[cloud]\nbroker = 'mqtt://x'\ntenant = 'A B'", ["[cloud] tenant", "id"]),
        ("[server]\ntcp = 'nonsense'", ["[server] tcp", "HOST:PORT"]),
        ("models = []", ["models", "empty"]),
        ("x = = 1", ["not valid TOML"]),
        ("[cache]\npath = ''", ["[cache] path", "off"]),
        ("[batch]\nwindow = 'fast'", ["[batch] window", "learned"]),
        ("[batch]\nwindow = -1", ["[batch] window", ">= 0"]),
        ("[batch]\nduty_target = 0", ["[batch] duty_target", "> 0"]),
        ("[escalation]\naccept = 2.0", ["[escalation] accept", "<= 1"]),
    ],
)
def test_a_mistake_is_named_with_its_fix(tmp_path, text, words):
    path = tmp_path / "edge.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as failure:
        load_config(path)
    message = str(failure.value)
    assert message.startswith(str(path))
    assert "\n" not in message or "TOML" in message
    for word in words:
        assert word in message


def test_the_worker_speaks_the_same_way(tmp_path):
    path = tmp_path / "cloud.toml"
    path.write_text("brokr = 'mqtt://x'")
    with pytest.raises(ConfigError, match="Did you mean broker"):
        load_cloud(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cloud(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("word", "window_ns"), [('"learned"', None), ('"none"', 0), ("2", 2_000_000), ("0.5", 500_000)]
)
def test_a_window_is_a_word_or_milliseconds(tmp_path, word, window_ns):
    path = tmp_path / "edge.toml"
    path.write_text(f"[batch]\nwindow = {word}")
    assert policy_of(load_config(path).batch.window).window_ns == window_ns
