"""The contract between `connection`, which stays connected, and an adapter of an MQTT library, which speaks to one broker once.

A client lives as long as one network connection: it is opened, reports events, and is closed. It owns the socket and
the codec; it knows nothing of reconnecting, of windows or of what messages mean. To use another MQTT library, write
one more adapter beside `paho_adapter` and give it to `Connection` as `new_client`.

No session outlives its connection: every CONNECT asks for a clean start and a session that expires at once. Brokers
deal requests to a kept session of a dead worker and lose them (docs/transport.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.mqtt.envelope import Message

#: A packet above this is refused by the broker settings this project ships, and by AWS IoT Core.
MAX_PACKET_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Broker:
    """Where and as whom to connect."""

    url: str
    client_id: str
    username: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def is_authenticated(self) -> bool:
        """Whether this client proves who it is. A broker that asks nobody lets anybody publish."""
        return bool(self.username or self.cert_file)


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """What one CONNECT asks for. The will, retained, is `offline` on `state_topic`."""

    state_topic: str
    receive_maximum: int
    keepalive_s: int
    timeout_s: float  # of connecting, and of the TLS handshake


class Events(Protocol):
    """What a client reports, always on the event loop and never after its `close`."""

    def on_accepted(self, max_packet_bytes: int | None, receive_maximum: int | None) -> None:
        """The broker accepted the CONNECT; the limits are those it announced, None where it announced none."""

    def on_refused(self, code: int) -> None:
        """The broker refused the CONNECT with this reason code."""

    def on_subscribed(self, packet_id: int, codes: Sequence[int]) -> None:
        """The broker answered a SUBSCRIBE, with one reason code for each filter."""

    def on_unsubscribed(self) -> None:
        """The broker answered an UNSUBSCRIBE."""

    def on_confirmed(self, packet_id: int, code: int) -> None:
        """The broker answered a PUBLISH with a PUBACK."""

    def on_message(self, message: Message, packet_id: int, qos: int) -> None:
        """A message came; it is to be acknowledged under `packet_id`."""

    def on_disconnected(self, code: int) -> None:
        """The broker sent a DISCONNECT; the connection is over."""

    def on_lost(self, reason: str) -> None:
        """The connection is over, by the network or by this side; `reason` is one clause."""


class Client(Protocol):
    """One network connection to a broker. Its methods are called on the event loop."""

    async def open(self) -> None:
        """Connect and send the CONNECT packet; events come only after this has returned.

        Raises OSError, ValueError. If it is cancelled, the client is closed and nothing of it keeps the process alive.
        """

    def check_alive(self) -> bool:
        """Send pings as they fall due, about once a second; False once the broker has been silent for too long."""

    def subscribe(self, filters: Sequence[str]) -> int:
        """Subscribe at QoS 1 and return the packet id that the answer will carry.

        Retained messages are not wanted, and those that come live stay marked as retained.
        """

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Take no further messages of these filters."""

    def publish(self, message: Message) -> int | None:
        """Send at QoS 1; return the packet id that its confirmation will carry, None where the socket is gone."""

    def acknowledge(self, packet_id: int, qos: int) -> None:
        """Confirm a message to the broker."""

    def disconnect(self) -> None:
        """Send DISCONNECT, with which the will is dropped."""

    def close(self) -> None:
        """Close the socket and report nothing more. Idempotent."""


#: Makes a client that is not opened yet.
NewClient = Callable[[Broker, ConnectOptions, Events], Client]
