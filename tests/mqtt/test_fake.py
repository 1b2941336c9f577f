"""The scripted broker routes as a broker does, or tests that rest on it would prove nothing."""

import asyncio

import pytest

from edge_runtime.mqtt.client import Broker, ConnectOptions
from edge_runtime.mqtt.envelope import Message
from edge_runtime.mqtt.fake import FakeBroker, _matches
from tests.virtual_time import run_virtual, settle

OPTIONS = ConnectOptions("s", 10, 30, 5.0)


@pytest.mark.parametrize(
    ("wanted", "topic", "fits"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("a/b/#", "a", False),
    ],
)
def test_filters(wanted, topic, fits):
    assert _matches(wanted, topic) is fits


class Heard:
    def __init__(self):
        self.payloads, self.codes = [], []

    def on_message(self, message, packet_id, qos):
        self.payloads.append(message.payload)

    def on_confirmed(self, packet_id, code):
        self.codes.append(code)

    def __getattr__(self, name):
        return lambda *_: None


def test_a_group_shares_and_every_plain_subscriber_gets_its_own():
    async def scenario():
        server = FakeBroker()
        heard = [Heard() for _ in range(4)]
        clients = [server.new_client(Broker("", f"{i}"), OPTIONS, one) for i, one in enumerate(heard)]
        for client, wanted in zip(clients, ("$share/g/a/+", "$share/g/a/+", "a/b", "x"), strict=True):
            await client.open()
            client.subscribe([wanted])
        for i in range(4):
            clients[3].publish(Message("a/b", b"%d" % i))
        clients[3].publish(Message("nobody", b"x"))
        await settle()
        assert sorted(heard[0].payloads + heard[1].payloads) == [b"0", b"1", b"2", b"3"]
        assert len(heard[0].payloads) == 2
        assert heard[2].payloads == [b"0", b"1", b"2", b"3"]
        assert heard[3].codes == [0, 0, 0, 0, 0x10]

    run_virtual(scenario)


def test_a_scenario_that_would_hang_fails_at_once():
    async def scenario():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(TimeoutError):
        run_virtual(scenario)
