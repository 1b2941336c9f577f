"""Asking as a user types it: of a daemon, and without one."""

import asyncio
import json
import signal
import socket

import pytest

from edge_runtime.cli import ask
from edge_runtime.config import CloudSettings, Config
from edge_runtime.core.messages import InferRequest, Tensor
from tests.processes import cli
from tests.uplink.test_escalation import HARD, Cloud


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
    socket_path = config.parent / "e.sock"
    assert f"No daemon listens on {socket_path}; start one with: edge-runtime serve" in gone.stderr


def test_status_without_a_socket_says_which_key_to_change(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text('[server]\nsocket = "off"\n')
    done = cli("status", "--config", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert '[server] socket is "off"' in done.stderr


@pytest.mark.parametrize(("text", "code"), [("turn the lights off", 0), (HARD, 3)])
def test_a_degraded_reply_has_an_exit_code_of_its_own(tmp_path, silent_broker, text, code):
    path = tmp_path / "edge.toml"
    path.write_text(f'[server]\nsocket = "off"\n[cloud]\nbroker = "{silent_broker}"\n')
    request = json.dumps({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]})
    done = cli("infer", "commands", "-", "--config", str(path), input=request)
    assert done.returncode == code
    assert json.loads(done.stdout)["parameters"]["degraded"] is (code == 3)
    assert cli("ask", text, "--config", str(path)).returncode == code


def test_infer_sends_a_request_of_the_protocol(config, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(
        '{"inputs":[{"name":"text","shape":[2],"datatype":"BYTES","data":["flip a coin","hm"]}]}'
    )
    reply = json.loads(cli("infer", "commands", str(request), "--config", str(config)).stdout)
    assert reply["outputs"][0]["data"][0] == "flip_coin"


@pytest.fixture
def silent_broker():
    """The address of a listener that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"


def here(text, broker):
    request = InferRequest((Tensor("text", "BYTES", (1,), (text.encode(),)),))
    return ask.infer_here("commands", request, Config(cloud=CloudSettings(broker=broker)))


@pytest.fixture
def endless(monkeypatch):
    """A broker that is waited for is waited for until the test's own time limit."""
    monkeypatch.setattr(ask, "_CONNECT_S", 3600.0)


def test_a_sure_answer_does_not_wait_for_a_broker_that_says_nothing(silent_broker, endless):
    async def scenario():
        async with asyncio.timeout(30):
            reply = await here("turn the lights off", silent_broker)
            assert (reply.parameters["origin"], reply.parameters["degraded"]) == ("local", False)

    asyncio.run(scenario())


def test_an_unsure_answer_waits_for_the_broker_and_comes_from_the_cloud(broker, endless):
    async def scenario():
        async with asyncio.timeout(30), Cloud(broker) as cloud:
            reply = await here(HARD, broker.url)
            assert reply.parameters["origin"] == "cloud"
            assert reply.outputs[0].data[0] == cloud.label

    asyncio.run(scenario())


def test_an_unsure_answer_is_given_degraded_when_the_broker_does_not_come_in_time(silent_broker, monkeypatch):
    monkeypatch.setattr(ask, "_CONNECT_S", 0.01)

    async def scenario():
        async with asyncio.timeout(30):
            reply = await here(HARD, silent_broker)
            assert (reply.parameters["origin"], reply.parameters["reason"]) == ("local", "link_down")
            assert reply.parameters["degraded"] is True

    asyncio.run(scenario())
