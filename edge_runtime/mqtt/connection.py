"""A connection to an MQTT v5 broker that keeps itself alive; the only module that imports paho.

paho is codec and socket machine, driven from one event loop; connecting again is ours, with a fresh
client each time, since a client carries state of the connection it lost. Callbacks only hand over.
"""

import asyncio
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_runtime.core.backoff import Backoff
from edge_runtime.core.errors import EdgeRuntimeError, TooLarge
from edge_runtime.core.protocol.mqtt_reasons import NO_MATCHING_SUBSCRIBERS, ReasonClass, classify, in_words
from edge_runtime.mqtt.envelope import Message

_log = logging.getLogger(__name__)

NO_SUBSCRIBERS = NO_MATCHING_SUBSCRIBERS
#: A packet above this is refused by the broker settings this project ships, and by AWS IoT Core.
MAX_PACKET_BYTES = 128 << 10
_CONNECT_S = 5.0
_KEEPALIVE_S = 30
#: A connection that lived shorter shows nothing: two clients of one id would take it from each other at full speed.
_STABLE_S = 10.0
_SUSPICIOUS_LIVES = 3
#: Where a person must mend something, trying fast only fills logs.
_PATIENT_ATTEMPT = 6


class LinkLost(EdgeRuntimeError):  # noqa: N818 - the fact it states
    """There is no connection to the broker, or it went before the broker confirmed."""


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


@dataclass(frozen=True, slots=True)
class Received:
    """A message to be acknowledged; `epoch` names the connection whose message id `mid` is."""

    message: Message
    epoch: int
    mid: int
    qos: int


class Connection:
    """Stays connected until `close`; publishes, subscribes, acknowledges by hand."""

    def __init__(
        self,
        broker: Broker,
        *,
        subscriptions: tuple[str, ...],
        state_topic: str,
        on_message: Callable[[Received], None],
        on_lost: Callable[[], None] = lambda: None,
        session_expiry_s: int = 0,
        max_in_flight: int = 64,
        backoff: Backoff | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`state_topic` carries "online", or "offline" by the last will, retained.

        `on_lost` is called once for each connection that ends. A session kept for `session_expiry_s` hands
        what was not acknowledged to the next connection; 0 begins anew each time.
        """
        self._broker = broker
        self._subscriptions = subscriptions
        self._state_topic = state_topic
        self._on_message = on_message
        self._on_lost = on_lost
        self._session_expiry_s = session_expiry_s
        self._is_session_spoilt = False
        self._max_in_flight = max_in_flight
        self._backoff = backoff or Backoff(cap_s=30.0)
        self._draw = draw
        self._client: paho.Client | None = None
        self._socket: socket.socket | None = None
        self._epoch = 0
        # message id -> who waits for the broker's word, and the window whose place the message holds
        self._unconfirmed: dict[int, tuple[asyncio.Future[int], asyncio.Semaphore]] = {}
        self._unsubscribed: asyncio.Future[None] | None = None
        self._packet_limit = MAX_PACKET_BYTES
        self._window = asyncio.Semaphore(max_in_flight)
        self._is_mended_by_waiting = True
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.last_error = "not connected yet"
        self.connects = 0

    @property
    def is_connected(self) -> bool:
        """Whether the broker accepted us and our subscriptions."""
        return self._up.is_set()

    def start(self) -> None:
        """Begin connecting, in a task of this connection."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected(), name="mqtt-connection")

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the connection; False if it did not come in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            return False
        return True

    async def publish(self, message: Message) -> int:
        """Publish at QoS 1; return the broker's reason code (0x10: nobody listens).

        Raises LinkLost, and TooLarge for what the broker would answer by closing the connection.
        """
        client = self._client
        if client is None or not self.is_connected:
            raise LinkLost(f"No connection to the broker ({self.last_error}).")
        properties = _properties(message)
        # Fixed header, topic and message id cost at most 5 + 2 + 2 bytes beside their text.
        size = 9 + len(message.topic) + len(properties.pack()) + len(message.payload)
        if size > self._packet_limit:
            raise TooLarge(f"The message takes {size} bytes; the broker accepts {self._packet_limit}.")
        window = self._window
        await window.acquire()
        if client is not self._client:
            window.release()
            raise LinkLost("The connection to the broker was lost while waiting for its window.")
        info = client.publish(message.topic, message.payload, 1, message.retain, properties)
        if info.rc not in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_QUEUE_SIZE):
            window.release()
            raise LinkLost("The connection to the broker is gone.")
        confirmed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # A caller that is cancelled leaves its place taken: the broker counts the message until it has answered.
        self._unconfirmed[info.mid] = confirmed, window
        return await confirmed

    def acknowledge(self, received: Received) -> None:
        """Tell the broker that a message is dealt with; for an earlier connection's message do nothing.

        A message id of a lost connection may be somebody else's message on the new one.
        """
        if received.epoch == self._epoch and self._client is not None:
            self._client.ack(received.mid, received.qos)

    async def unsubscribe(self, timeout_s: float = 2.0) -> None:
        """Take no further messages."""
        if self._client is None or not self.is_connected:
            return
        self._unsubscribed = asyncio.get_running_loop().create_future()
        self._client.unsubscribe(list(self._subscriptions))
        try:
            async with asyncio.timeout(timeout_s):
                await self._unsubscribed
        except TimeoutError:
            _log.warning("event=unsubscribe_unconfirmed")

    async def close(self) -> None:
        """Say offline, disconnect, stop connecting. Idempotent."""
        if self._task is None:
            return
        if self._client is not None and self.is_connected:
            try:
                async with asyncio.timeout(1.0):
                    await self.publish(Message(self._state_topic, b"offline", retain=True))
            except (TimeoutError, EdgeRuntimeError) as error:
                _log.warning("event=offline_not_said error=%s", error)
            end = Properties(PacketTypes.DISCONNECT)
            end.SessionExpiryInterval = 0
            self._client.disconnect(properties=end)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        self._drop("closed")

    async def _stay_connected(self) -> None:
        attempt = short_lives = 0
        said = ""
        while True:
            connects = self.connects
            self._lost.clear()
            self._is_mended_by_waiting = True
            began = time.monotonic()
            try:
                await self._connect()
            except (OSError, ValueError) as error:
                self.last_error = f"connecting failed: {error}"
            else:
                await self._watch()
                if self.connects > connects:
                    said = ""
                if time.monotonic() - began > _STABLE_S:
                    attempt = short_lives = 0
                elif self.connects > connects:
                    short_lives += 1
            if short_lives >= _SUSPICIOUS_LIVES:
                # mosquitto 2.0.11 closes without a word when a session is taken over.
                self.last_error += "; it was welcome and lost again several times, as when another client has the same client id"
            self._drop(self.last_error)
            if not self._is_mended_by_waiting:
                attempt = max(attempt, _PATIENT_ATTEMPT)
            if self.last_error != said:  # once per cause: a device may be without a network for weeks
                said = self.last_error
                _log.warning("event=broker_unavailable why=%r", said)
            await asyncio.sleep(self._backoff.delay_s(attempt, self._draw))
            attempt += 1

    async def _watch(self) -> None:
        """Tend paho's timers until the connection is lost."""
        began = time.monotonic()
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await self._lost.wait()
            except TimeoutError:
                client = self._client
                if client is not None and client.loop_misc() != paho.MQTT_ERR_SUCCESS:
                    self._lose("the broker is silent")
                if not self._up.is_set() and time.monotonic() - began > _CONNECT_S:
                    self._lose("the broker accepts connections but does not answer")

    async def _connect(self) -> None:
        """Connect in a thread, since name look-up and handshakes block; then drive the socket from the loop."""
        place = urlsplit(self._broker.url)
        is_tls = place.scheme == "mqtts"
        client = self._new_client(is_tls=is_tls)
        connect = Properties(PacketTypes.CONNECT)
        connect.SessionExpiryInterval = self._session_expiry_s
        connect.ReceiveMaximum = self._max_in_flight
        connect.MaximumPacketSize = MAX_PACKET_BYTES

        # What paho could not read comes back with a kept session, and would end each connection in turn.
        begin_anew = self._session_expiry_s == 0 or self._is_session_spoilt

        def blocking() -> None:
            client.connect(
                place.hostname or "127.0.0.1",
                place.port or (8883 if is_tls else 1883),
                keepalive=_KEEPALIVE_S,
                clean_start=begin_anew,
                properties=connect,
            )

        await asyncio.to_thread(blocking)
        found = client.socket()
        if not isinstance(found, socket.socket):
            raise OSError("the socket closed at once")
        # Without it a small packet waits for the last one's delayed acknowledgement: 88 ms instead of 1 ms.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client, self._socket = client, found
        self._epoch += 1
        loop = asyncio.get_running_loop()

        def read() -> MQTTErrorCode:
            code = client.loop_read()
            # TLS decrypts whole records: what is left of one wakes no selector.
            while code == paho.MQTT_ERR_SUCCESS and isinstance(found, ssl.SSLSocket) and found.pending():
                code = client.loop_read()
            return code

        loop.add_reader(found, self._step, client, read)

        def write_when_possible(*_: Any) -> None:
            loop.add_writer(found, self._step, client, client.loop_write)

        def write_no_more(*_: Any) -> None:
            loop.remove_writer(found)

        client.on_socket_register_write = write_when_possible
        client.on_socket_unregister_write = write_no_more

        def forget(*_: Any) -> None:  # paho closes a socket itself; its number must be free of us by then
            loop.remove_reader(found)
            loop.remove_writer(found)

        client.on_socket_close = forget
        if client.want_write():
            loop.add_writer(found, self._step, client, client.loop_write)

    def _new_client(self, *, is_tls: bool) -> paho.Client:
        broker = self._broker
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=broker.client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_S
        client.max_inflight_messages_set(65_535)  # the send window is ours, see publish
        client.max_queued_messages_set(0)
        if broker.username:
            client.username_pw_set(broker.username, broker.password)
        if is_tls:
            context = ssl.create_default_context(cafile=broker.ca_file or None)
            if broker.cert_file:
                context.load_cert_chain(broker.cert_file, broker.key_file or None)
            client.tls_set_context(context)
        client.will_set(self._state_topic, b"offline", 1, retain=True)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_packet
        client.on_disconnect = self._on_disconnect
        return client

    def _step(self, client: paho.Client, step: Callable[[], Any]) -> None:
        """Let paho read or write; a malformed packet may raise out of it, and must not end the loop."""
        try:
            code = step()
        except Exception as error:  # noqa: BLE001 - anything a hostile packet makes paho raise
            self._is_session_spoilt = True
            self._lose(f"the broker sent what could not be read ({type(error).__name__})")
            return
        if code != paho.MQTT_ERR_SUCCESS and client is self._client:
            if code == paho.MQTT_ERR_CONN_LOST:
                self._lose("connection lost")
            else:  # paho met what it does not accept, and has closed its socket
                self._is_session_spoilt = True
                self._lose(f"the broker sent what could not be read ({paho.error_string(code)})")

    def _lose(self, why: str) -> None:
        """The connection is over; what is said first is the cause, the rest follows from it."""
        self._up.clear()
        if not self._lost.is_set():
            self.last_error = why
            self._lost.set()

    def _drop(self, why: str) -> None:
        """Forget the connection; everybody who waits for it learns so."""
        self._up.clear()
        if self._client is not None:
            # paho closes its socket once more when it is collected, and tells whoever still listens.
            self._client.on_socket_close = None
            self._client.on_socket_unregister_write = None
            self._client.on_disconnect = None
        if self._socket is not None and self._socket.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        had_client = self._client is not None
        self._client, self._socket = None, None
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for confirmed, window in unconfirmed.values():
            window.release()
            if not confirmed.done():
                confirmed.set_exception(LinkLost(f"The connection to the broker was lost ({why})."))
        if had_client:
            self._on_lost()

    def _on_connect(
        self, client: paho.Client, _data: Any, _flags: Any, code: Any, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self._is_mended_by_waiting = classify(code.value) is not ReasonClass.CONFIGURATION
            self._lose(f"the broker refused us: {in_words(code.value)}")
            return
        self._is_session_spoilt = False
        limit = getattr(properties, "MaximumPacketSize", None)
        self._packet_limit = min(MAX_PACKET_BYTES, limit or MAX_PACKET_BYTES)
        theirs = getattr(properties, "ReceiveMaximum", None)
        # paho ignores the broker's window; one place is left for our own state message.
        self._window = asyncio.Semaphore(max(1, min(self._max_in_flight, theirs or 65_535) - 1))
        # Retained requests are planted ones: none is asked for, and those that come live are told apart.
        options = SubscribeOptions(
            qos=1, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND
        )
        if self._subscriptions:
            client.subscribe([(topic, options) for topic in self._subscriptions])
        else:
            self._welcome(client)

    def _on_subscribe(self, client: paho.Client, _data: Any, _mid: int, codes: Any, _properties: Any) -> None:
        refused = [code.value for code in codes if code.is_failure]
        if refused:
            self._is_mended_by_waiting = classify(refused[0]) is not ReasonClass.CONFIGURATION
            self._lose(f"the broker refused a subscription: {in_words(refused[0])}")
            return
        self._welcome(client)

    def _welcome(self, client: paho.Client) -> None:
        client.publish(self._state_topic, b"online", 1, retain=True)
        self.connects += 1
        self.last_error = ""
        self._up.set()

    def _on_unsubscribe(self, *_: Any) -> None:
        if self._unsubscribed is not None and not self._unsubscribed.done():
            self._unsubscribed.set_result(None)

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: Any, _properties: Any) -> None:
        confirmed, window = self._unconfirmed.pop(mid, (None, None))
        if window is not None:
            window.release()
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(code.value)

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, code: Any, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            self._lose(f"disconnected: {in_words(code.value)}")

    def _on_packet(self, client: paho.Client, _data: Any, packet: paho.MQTTMessage) -> None:
        if packet.retain:  # a request planted for every worker to come: never executed
            client.ack(packet.mid, packet.qos)
            return
        properties = packet.properties
        message = Message(
            packet.topic,
            bytes(packet.payload),
            getattr(properties, "ContentType", "") or "",
            getattr(properties, "CorrelationData", b"") or b"",
            getattr(properties, "MessageExpiryInterval", None),
            tuple(getattr(properties, "UserProperty", ())),
        )
        self._on_message(Received(message, self._epoch, packet.mid, packet.qos))


def _properties(message: Message) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    if message.content_type:
        properties.ContentType = message.content_type
        properties.PayloadFormatIndicator = int(
            message.content_type == "application/json" and not message.user
        )
    if message.correlation:
        properties.CorrelationData = message.correlation
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    for pair in message.user:
        properties.UserProperty = pair
    return properties
