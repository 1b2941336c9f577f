"""The daemon as a process: it starts, is asked to stop, and leaves nothing unanswered."""

import asyncio
import http.client
import json
import signal
import threading
import urllib.request
from types import SimpleNamespace

import pytest

from edge_runtime.client import _UnixConnection
from edge_runtime.core.protocol import oip
from edge_runtime.daemon import _drain
from edge_runtime.mqtt.envelope import Message
from tests.processes import EDGE, cli, running, until_line
from tests.uplink.test_escalation import HARD, Listener


def test_a_second_daemon_on_the_same_socket_is_refused_in_one_sentence(config, daemon):
    second = cli("serve", "--config", str(config))
    assert second.returncode == 2
    assert "already listens" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_daemon_removes_its_own_socket_and_leaves_that_of_another(config, tmp_path):
    """Somebody removed the socket of a running daemon, and a second one was started at the same path."""
    path = tmp_path / "e.sock"
    with running(*EDGE, "serve", "--config", str(config)) as first:
        path.unlink()
        with running(*EDGE, "serve", "--config", str(config)) as second:
            first.send_signal(signal.SIGTERM)
            assert first.wait(20) == 0
            assert ask(path, "turn the lights off")[0] == 200
            second.send_signal(signal.SIGTERM)
            assert second.wait(20) == 0
    assert not path.exists()


def test_status_names_the_addresses_that_answer(config, daemon, tmp_path):
    status = json.loads(cli("status", "--json", "--config", str(config)).stdout)
    assert (status["state"], status["ready"], status["problems"]) == ("ready", True, [])
    unix, http = status["addresses"]
    assert unix == f"unix:{tmp_path}/e.sock"
    with urllib.request.urlopen(f"{http}/v2/health/ready", timeout=20) as reply:
        assert reply.status == 200
    assert http in cli("status", "--config", str(config)).stdout


def test_a_daemon_that_drains_is_not_ready_before_it_stops_listening():
    """Else a supervisor that still has a connection would go on to send requests here."""
    seen = []

    class Ingress:
        async def close_ingress(self):
            seen.append("closes")

        async def drain(self, deadline_s):
            seen.append(("drains", deadline_s))
            return True

    service = SimpleNamespace(drain=lambda limit_s: seen.append(("is not ready", limit_s)))
    asyncio.run(_drain(SimpleNamespace(service=service), Ingress(), 7.0))
    (what, cloud_s), *rest = seen
    assert (what, rest) == ("is not ready", ["closes", ("drains", 7.0)])
    assert 0 < cloud_s < 7.0  # so that there is time left to write the local answers


def test_a_drain_that_ends_before_its_requests_is_logged(caplog):
    class Ingress:
        async def close_ingress(self):
            pass

        async def drain(self, deadline_s):
            return False

    runtime = SimpleNamespace(service=SimpleNamespace(drain=lambda _limit_s: None))
    asyncio.run(_drain(runtime, Ingress(), 7.0))
    assert "event=drain_incomplete after_s=7" in caplog.text


def test_a_daemon_that_listens_nowhere_is_refused(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text('[server]\nsocket = "off"\ntcp = "off"\n')
    for command in (("serve", "--config", str(path)), ("config", "check", str(path))):
        done = cli(*command)
        assert done.returncode == 2
        assert '[server] socket, tcp: both are "off". Write socket = "auto".' in done.stderr


def infer_body(text):
    return json.dumps({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]})


def ask(socket_path, text):
    """Status and JSON of one answer."""
    connection = _UnixConnection(socket_path, 60.0)
    try:
        connection.request("POST", "/v2/models/commands/infer", infer_body(text))
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_sigterm_under_load_answers_what_it_took_and_exits_0(config, tmp_path, daemon):
    """Every answer that began arrives whole; what was not taken is refused or finds nobody who listens."""
    answered, cut = [], []
    begun = threading.Barrier(9)

    def caller(number):
        begun.wait()
        for i in range(10_000):
            try:
                status, tree = ask(tmp_path / "e.sock", f"{number} {i}")
                (answered if status == 200 else cut).append(tree)
            except http.client.IncompleteRead as half:  # an answer that broke off
                cut.append(half)
                return
            except (OSError, http.client.HTTPException):
                return  # nobody listens any more

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


@pytest.fixture
def patient(tmp_path, broker):
    """A configuration under which an unsure request waits a minute for the cloud, and the drain for the request."""
    path = tmp_path / "edge.toml"
    path.write_text(
        f'[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "off"\n[requests]\ntimeout_s = 60\ndrain_s = 60\n'
        f'[cloud]\nbroker = "{broker.url}"\ntenant = "home"\ndevice = "me"\ntimeout_s = 60\n'
    )
    return path


def held_by_a_silent_worker(broker, path, scenario):
    """Run `scenario(daemon, asked, listener)` with a request that waits for the cloud.

    `asked` is the future of its answer, `listener` the worker that got the request and has not replied.
    """

    async def limited():
        async with asyncio.timeout(50), Listener(broker, "er/v1/+/+/req/commands") as listener:
            with running(*EDGE, "serve", "--config", str(path)) as daemon:
                while (
                    json.loads(cli("status", "--json", "--config", str(path)).stdout)["cloud"]["connected"]
                    is False
                ):
                    await asyncio.sleep(0)
                asked = asyncio.create_task(asyncio.to_thread(ask, path.parent / "e.sock", HARD))
                request = await listener.heard.get()
                daemon.send_signal(signal.SIGTERM)
                await asyncio.to_thread(until_line, daemon, "event=draining")
                await scenario(daemon, asked, listener, request)

    asyncio.run(limited())


def test_the_drain_waits_for_a_request_that_waits_for_the_cloud(broker, patient):
    async def scenario(daemon, asked, listener, request):
        reply = Message(
            "er/v1/home/me/rsp", oip.encode_error("no", reason="invalid"), correlation=request.correlation
        )
        assert not asked.done()
        assert daemon.poll() is None
        await listener.connection.publish(reply)
        status, tree = await asked
        assert (status, tree["parameters"]["reason"]) == (200, "cloud_failed")
        assert await asyncio.to_thread(daemon.wait, 20) == 0

    held_by_a_silent_worker(broker, patient, scenario)


def test_a_silent_cloud_leaves_the_local_answer_at_the_end_of_the_drain(broker, patient):
    patient.write_text(patient.read_text().replace("drain_s = 60", "drain_s = 1"))

    async def scenario(daemon, asked, listener, request):
        status, tree = await asked
        assert (status, tree["parameters"]["origin"]) == (200, "local")
        assert tree["parameters"]["degraded"] is True
        assert await asyncio.to_thread(daemon.wait, 20) == 0

    held_by_a_silent_worker(broker, patient, scenario)


def test_a_second_sigterm_ends_at_once(broker, patient):
    """A request that waits a minute for the cloud holds the drain; the second signal does not wait for it."""

    async def scenario(daemon, asked, listener, request):
        assert daemon.poll() is None
        daemon.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait, 20) == 1
        with pytest.raises((OSError, http.client.HTTPException)):
            await asked

    held_by_a_silent_worker(broker, patient, scenario)


def test_an_unreachable_broker_shows_in_status_and_answers_go_on(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text(
        f'[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "off"\n[cloud]\nbroker = "mqtt://127.0.0.1:1"\n'
    )
    with running(*EDGE, "serve", "--config", str(path)) as process:
        answer = json.loads(cli("ask", HARD, "--json", "--config", str(path)).stdout)
        assert (answer["origin"], answer["reason"], answer["degraded"]) == ("local", "link_down", True)
        cloud = json.loads(cli("status", "--json", "--config", str(path)).stdout)["cloud"]
        assert cloud["connected"] is False
        assert "refused" in cloud["why_not"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
