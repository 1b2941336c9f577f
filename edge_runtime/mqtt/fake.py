"""A broker in memory with its clients, public because programs that use the link need one in their tests too.

No socket, no thread, no time of its own: events come in the next turn of the event loop, in the order in which they
were caused. It routes messages, shares them out among the members of a shared subscription, and does what a test sets:
refuses, withholds confirmations, falls silent, loses its clients. Retained messages and kept sessions are not stored.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence

from edge_runtime.core.protocol.mqtt_reasons import NO_MATCHING_SUBSCRIBERS
from edge_runtime.mqtt.client import Broker, ConnectOptions, Events
from edge_runtime.mqtt.envelope import Message


class FakeBroker:
    """Give `new_client` to a `Connection`. `clients` holds every client that was made, oldest first."""

    def __init__(self, *, receive_maximum: int | None = None, max_packet_bytes: int | None = None) -> None:
        self.receive_maximum = receive_maximum
        self.max_packet_bytes = max_packet_bytes
        self.clients: list[FakeClient] = []
        #: Connecting fails with this sentence, while it is set.
        self.unreachable = ""
        #: A CONNECT is answered with this reason code; None: not at all.
        self.connect_code: int | None = 0
        #: The reason code of one filter of a SUBSCRIBE; None: the SUBSCRIBE is not answered.
        self.subscribe_code: Callable[[str], int | None] = lambda _filter: 1
        #: The reason code of a PUBLISH that is not delivered; None: it is delivered.
        self.publish_code: Callable[[Message], int | None] = lambda _message: None
        #: Whether PUBACKs are sent; those withheld lie in `FakeClient.withheld`.
        self.confirms = True
        self._turns: dict[str, int] = {}

    def new_client(self, broker: Broker, options: ConnectOptions, events: Events) -> "FakeClient":
        """Make a client; it connects when it is opened."""
        client = FakeClient(self, broker, options, events)
        self.clients.append(client)
        return client

    @property
    def client(self) -> "FakeClient":
        """The newest client."""
        return self.clients[-1]

    def lose(self, reason: str = "connection lost") -> None:
        """End every open connection."""
        for client in self.clients:
            client.lose(reason)

    def route(self, message: Message) -> int:
        """Deliver a message to each subscriber, and to one member of each shared group; return the reason code."""
        refused = self.publish_code(message)
        if refused is not None:
            return refused
        groups: dict[str, list[FakeClient]] = {}
        for client in self.clients:
            for wanted in client.filters if client.is_open else ():
                shared = wanted.startswith("$share/")
                if _matches(wanted.split("/", 2)[2] if shared else wanted, message.topic):
                    groups.setdefault(wanted if shared else f"{wanted} {id(client)}", []).append(client)
        for name, members in groups.items():
            turn = self._turns[name] = self._turns.get(name, -1) + 1
            members[turn % len(members)].deliver(message)
        return 0 if groups else NO_MATCHING_SUBSCRIBERS


class FakeClient:
    """One connection to a `FakeBroker`; see `client.Client`. What it was asked to do is kept for a test to read."""

    def __init__(self, server: FakeBroker, broker: Broker, options: ConnectOptions, events: Events) -> None:
        self.broker = broker
        self.options = options
        self.filters: list[str] = []
        self.published: list[Message] = []
        self.acknowledged: list[int] = []
        #: Packet id -> reason code of the confirmations that the broker keeps back.
        self.withheld: dict[int, int] = {}
        self.is_open = False
        self.is_closed = False
        self.is_alive = True
        self.is_disconnected = False
        self._server = server
        self._events = events
        # Packet ids of the two directions are independent (MQTT v5, 2.2.1).
        self._sent = itertools.count(1)
        self._delivered = itertools.count(1)

    async def open(self) -> None:
        """Connect, unless the broker cannot be reached."""
        if self._server.unreachable:
            raise OSError(self._server.unreachable)
        self.is_open = True
        server, code = self._server, self._server.connect_code
        if code == 0:
            self._soon(lambda: self._events.on_accepted(server.max_packet_bytes, server.receive_maximum))
        elif code is not None:
            self._soon(lambda: self._events.on_refused(code))

    def check_alive(self) -> bool:
        """As the test set `is_alive`."""
        return self.is_alive

    def subscribe(self, filters: Sequence[str]) -> int:
        """Subscribe to what the broker grants."""
        answers = [(wanted, self._server.subscribe_code(wanted)) for wanted in filters]
        codes = [code for _, code in answers if code is not None]
        self.filters += [wanted for wanted, code in answers if code is not None and code < 0x80]
        packet_id = next(self._sent)
        if len(codes) == len(answers):
            self._soon(lambda: self._events.on_subscribed(packet_id, codes))
        return packet_id

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Take no further messages of these filters."""
        self.filters = [wanted for wanted in self.filters if wanted not in filters]
        self._soon(self._events.on_unsubscribed)

    def publish(self, message: Message) -> int | None:
        """Give the message to the broker; its confirmation comes at once, unless the broker withholds them."""
        assert not self.is_closed, "publish after close"
        if not self.is_open:
            return None
        self.published.append(message)
        packet_id = next(self._sent)
        self.withheld[packet_id] = self._server.route(message)
        if self._server.confirms:
            self.confirm(packet_id)
        return packet_id

    def acknowledge(self, packet_id: int, qos: int) -> None:  # noqa: ARG002 - part of the contract
        """Note the packet id."""
        assert not self.is_closed, "acknowledge after close"
        self.acknowledged.append(packet_id)

    def disconnect(self) -> None:
        """Note it."""
        self.is_disconnected = True

    def close(self) -> None:
        """Report nothing more."""
        self.is_open, self.is_closed = False, True

    def deliver(self, message: Message) -> int:
        """Bring a message from the broker; return its packet id."""
        packet_id = next(self._delivered)
        self._soon(lambda: self._events.on_message(message, packet_id, 1))
        return packet_id

    def confirm(self, packet_id: int) -> None:
        """Send a confirmation that was withheld."""
        code = self.withheld.pop(packet_id)
        self._soon(lambda: self._events.on_confirmed(packet_id, code))

    def lose(self, reason: str = "connection lost") -> None:
        """End the connection without a word to the broker."""
        self._soon(lambda: self._events.on_lost(reason))

    def _soon(self, report: Callable[[], None]) -> None:
        def unless_closed() -> None:
            if self.is_open:
                report()

        asyncio.get_running_loop().call_soon(unless_closed)


def _matches(wanted: str, topic: str) -> bool:
    """Whether a topic filter (MQTT v5, 4.7) matches a topic name."""
    filters, levels = wanted.split("/"), topic.split("/")
    if filters[-1] == "#":
        return len(levels) >= len(filters) - 1 and _fits(filters[:-1], levels)
    return len(filters) == len(levels) and _fits(filters, levels)


def _fits(filters: list[str], levels: list[str]) -> bool:
    return all(wanted in ("+", level) for wanted, level in zip(filters, levels, strict=False))
