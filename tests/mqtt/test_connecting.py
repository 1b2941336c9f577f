"""Connecting to what does not answer: nothing of it keeps a process alive, and dead routes are noticed."""

import asyncio
import socket
import subprocess
import sys
import threading

import pytest

from edge_runtime.mqtt.client import Broker, ConnectOptions
from edge_runtime.mqtt.paho_adapter import _MAX_CONNECTING, PahoClient, _in_daemon_thread
from tests.uplink.test_escalation import Listener, run, until

CLOSING = """
import asyncio, socket, sys, threading, time
from edge_runtime.mqtt.client import Broker
from edge_runtime.mqtt.connection import Connection

def hang(*_, **__):
    time.sleep(600)

async def main(url):
    link = Connection(Broker(url, "c"), subscriptions=(), state_topic="s", on_message=print, connect_s=600.0)
    link.start()
    while not any(thread.name == "mqtt-connect" for thread in threading.enumerate()):
        await asyncio.sleep(0)
    if sys.argv[2] == "tls":
        sys.stdin.readline()
    await link.close()
    print("closed", flush=True)

if sys.argv[2] == "resolver":
    socket.getaddrinfo = hang
asyncio.run(main(sys.argv[1]))
"""


class Silent:
    """A port that takes connections and says nothing; `accepts=False`: whose SYNs are dropped."""

    def __init__(self, *, accepts):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(16 if accepts else 0)
        self.port = self.socket.getsockname()[1]
        self.fillers = []
        if not accepts:  # the backlog is full from now on
            for _ in range(3):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self.port))
                self.fillers.append(filler)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in (self.socket, *self.fillers):
            one.close()


@pytest.mark.parametrize("how", ["tls", "syn", "resolver"])
def test_a_process_ends_at_once_while_a_connect_hangs(how):
    """It would wait ten minutes for the thread, and this test's limit is half of one."""
    with Silent(accepts=how != "syn") as server:
        url = f"mqtts://127.0.0.1:{server.port}" if how == "tls" else f"mqtt://127.0.0.1:{server.port}"
        process = subprocess.Popen(
            [sys.executable, "-c", CLOSING, url, how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if how == "tls":
            accepted, _ = server.socket.accept()
            accepted.recv(1)  # the handshake has begun
            server.fillers.append(accepted)
        out, _ = process.communicate("\n", timeout=30)
        assert (out, process.returncode) == ("closed\n", 0)


def test_a_socket_that_comes_after_its_caller_left_is_closed():
    async def scenario():
        entered, leave, abandoned = threading.Event(), threading.Event(), threading.Event()

        def call():
            entered.set()
            leave.wait()

        connecting = asyncio.create_task(_in_daemon_thread(call, abandoned.set))
        await asyncio.to_thread(entered.wait)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        assert not abandoned.is_set()
        leave.set()
        await until(abandoned.is_set)

    run(scenario)


def test_abandoned_calls_are_bounded():
    async def scenario():
        leave = threading.Event()
        hanging = [
            asyncio.create_task(_in_daemon_thread(leave.wait, lambda: None)) for _ in range(_MAX_CONNECTING)
        ]
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="still hang"):
            await _in_daemon_thread(lambda: None, lambda: None)
        leave.set()
        await asyncio.gather(*hanging)
        await until(lambda: not any(t.name == "mqtt-connect" for t in threading.enumerate()))
        await _in_daemon_thread(lambda: None, lambda: None)

    run(scenario)


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch):
    leave = threading.Event()

    def hang(*_, **__):
        leave.wait()
        raise OSError

    async def scenario():
        monkeypatch.setattr(socket, "getaddrinfo", hang)
        client = PahoClient(Broker("mqtt://somewhere", "c"), ConnectOptions("s", 1, 30, 0.01), None)
        try:
            with pytest.raises(OSError, match="does not answer"):
                await client.open()
        finally:
            leave.set()

    run(scenario)


def test_dead_routes_are_noticed_with_and_without_data_on_the_way(broker):
    """What the socket is told; what comes of it is measured by `python -m tools.link_faults route`."""

    async def scenario():
        async with Listener(broker) as one:
            found = one.connection._link.client._socket
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                found.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 30

    run(scenario)
