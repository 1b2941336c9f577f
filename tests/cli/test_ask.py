"""Asking as a user types it: of a daemon, and without one."""

import json
import signal

from tests.processes import cli


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
    alone = json.loads(cli("ask", "turn the lights off", "--json", "--config", str(config)).stdout)
    assert (alone["intent"], alone["origin"]) == ("smart_home", "local")
    spoken = cli("ask", "turn the lights off", "--config", str(config))
    assert spoken.returncode == 0
    assert spoken.stdout.startswith("smart_home  ")
    gone = cli("status", "--config", str(config))
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "edge-runtime serve" in gone.stderr


def test_infer_sends_a_request_of_the_protocol(config, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(
        '{"inputs":[{"name":"text","shape":[2],"datatype":"BYTES","data":["flip a coin","hm"]}]}'
    )
    reply = json.loads(cli("infer", "commands", str(request), "--config", str(config)).stdout)
    assert reply["outputs"][0]["data"][0] == "flip_coin"
