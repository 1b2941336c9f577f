"""The commands as a user types them, in processes of their own."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest

from edge_runtime.client import _UnixConnection


def cli(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", "from edge_runtime.cli.main import main; main()", *args],
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
        [sys.executable, "-c", "from edge_runtime.cli.main import main; main()", "serve", "--config", str(config)],
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
        (("ask", " "), 2, "nothing to ask"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, code, words):
    done = cli(*arguments, input="{")
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def infer_body(text):
    return json.dumps({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]})


def test_sigterm_under_load_answers_what_it_took_and_exits_0(config, tmp_path, daemon):
    """Every answer that began arrives whole; what was not taken is refused or finds the door closed."""
    answered, cut = [], []
    begun = threading.Barrier(9)

    def caller(number):
        begun.wait()
        for i in range(10_000):
            connection = _UnixConnection(tmp_path / "e.sock", 20.0)
            try:
                connection.request("POST", "/v2/models/commands/infer", infer_body(f"{number} {i}"))
                reply = connection.getresponse()
                tree = json.loads(reply.read())
                (answered if reply.status == 200 else cut).append(tree)
            except http.client.IncompleteRead as half:  # an answer that broke off
                cut.append(half)
                return
            except (OSError, http.client.HTTPException):
                return  # the door is closed
            finally:
                connection.close()

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in callers:
        thread.start()
    begun.wait()
    while len(answered) < 50:
        assert any(thread.is_alive() for thread in callers)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    for thread in callers:
        thread.join(20)
    assert all("outputs" in tree for tree in answered)
    assert all(isinstance(tree, dict) and "error" in tree for tree in cut)


def test_a_second_sigterm_ends_at_once(config, tmp_path, daemon):
    """A peer that never finishes its request holds the drain; the second signal does not wait for it."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "e.sock"))
        peer.sendall(b"POST /v2/models/commands/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) in (0, 1)


def test_an_unreachable_broker_shows_in_status_and_answers_go_on(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text(
        f'[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "off"\n[cloud]\nbroker = "mqtt://127.0.0.1:1"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from edge_runtime.cli.main import main; main()", "serve", "--config", str(path)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert any(line.startswith("ready:") for line in process.stderr)
        answer = json.loads(
            cli("ask", "could you sort out that plastic", "--json", "--config", str(path)).stdout
        )
        assert (answer["origin"], answer["reason"], answer["degraded"]) == ("local", "link_down", True)
        cloud = json.loads(cli("status", "--json", "--config", str(path)).stdout)["cloud"]
        assert cloud["connected"] is False
        assert "refused" in cloud["why_not"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
