"""The commands as a user types them, in processes of their own."""

import json
import signal
import subprocess
import sys

import pytest


def cli(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", "from edge_runtime.cli import main; main()", *args],
        capture_output=True, text=True, timeout=60, check=False, **kwargs,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text(f'[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "127.0.0.1:0"\n')
    return path


@pytest.fixture
def daemon(config):
    process = subprocess.Popen(
        [sys.executable, "-c", "from edge_runtime.cli import main; main()", "serve", "--config", str(config)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("ready:"):
            break
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


def test_ask_works_without_a_daemon_and_with_one(config, daemon):
    answer = json.loads(cli("ask", "turn the lights off", "--json", "--config", str(config)).stdout)
    assert (answer["intent"], answer["origin"]) == ("smart_home", "local")
    again = json.loads(cli("ask", "turn the lights off", "--json", "--config", str(config)).stdout)
    assert again["origin"] == "cache"  # kept by the daemon, so it was the daemon that answered
    status = json.loads(cli("status", "--json", "--config", str(config)).stdout)
    assert status["models"][0]["rows"] == 2
    assert "commands" in cli("status", "--config", str(config)).stdout
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    alone = cli("ask", "turn the lights off", "--config", str(config))
    assert alone.returncode == 0
    assert alone.stdout.startswith("smart_home  ")
    gone = cli("status", "--config", str(config))
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "edge-runtime serve" in gone.stderr


def test_a_second_daemon_on_the_same_socket_is_refused_in_one_sentence(config, daemon):
    second = cli("serve", "--config", str(config))
    assert second.returncode == 2
    assert "already listens" in second.stderr
    assert "Traceback" not in second.stderr


def test_infer_models_and_config_commands(config, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(
        '{"inputs":[{"name":"text","shape":[2],"datatype":"BYTES","data":["flip a coin","hm"]}]}'
    )
    reply = json.loads(cli("infer", "commands", str(request), "--config", str(config)).stdout)
    assert reply["outputs"][0]["data"][0] == "flip_coin"
    assert json.loads(cli("models", "list", "--json").stdout)[0]["name"] == "commands"
    assert json.loads(cli("models", "show", "commands", "--json").stdout)["loaded"]["batch_invariant"]
    assert cli("models", "verify", "commands").stdout.startswith("ok: commands")
    assert cli("config", "check", str(config)).returncode == 0
    assert json.loads(cli("config", "show", "--json", "--config", str(config)).stdout)["models"] == [
        "commands"
    ]
    assert "max_bytes = " in cli("config", "show").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("aks", "x"), 2, "Did you mean 'ask'"),
        (("models", "verify", "./nowhere"), 1, "nowhere"),
        (("ask", "x", "--config", "/nonexistent.toml"), 2, "cannot be read"),
        (("infer", "nope", "-"), 1, "malformed"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, code, words):
    done = cli(*arguments, input="{")
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
