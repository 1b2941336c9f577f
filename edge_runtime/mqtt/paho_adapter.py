"""The adapter of paho, and the only module that imports it: paho as codec and socket machine on the event loop.

paho connects with blocking calls, so that part runs in a thread. Everything after it runs on the event loop: the
loop watches the socket and calls `loop_read` and `loop_write`; callbacks pass events on and do nothing else. paho's
own reconnecting, queueing and in-flight window are switched off, because a client that reconnects carries state of
the connection it lost (packet ids, a window it does not honour).

Interleaving that the code guards against: `open` is cancelled or runs out of time while its thread waits for a name
server, a SYN or a handshake. The thread cannot be interrupted. It is a daemon thread of its own, not one of the event
loop's executor, which the end of `asyncio.run` would wait for; when its call returns, it closes the socket that nobody
wants any more.
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_runtime.mqtt.client import MAX_PACKET_BYTES, Broker, ConnectOptions, Events
from edge_runtime.mqtt.envelope import Message

#: What a socket is told, beside what the system has as defaults.
SOCKET_OPTIONS = (
    # Without it a small packet waits for the last one's delayed acknowledgement: 88 ms instead of 1 ms.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # A route that dies silently is noticed in 10 s with data on the way and in 25 s without; each alone misses the other
    # case (no notice within 75 s).
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
#: Name look-up, TCP and TLS share this many times the limit of each.
_OPEN_TIMEOUTS = 3
#: Threads that hang in a name look-up or a handshake which nobody waits for any more; each costs 8 MB of address space.
_MAX_CONNECTING = 8


class PahoClient:
    """One network connection by paho; see `client.Client`."""

    def __init__(self, broker: Broker, options: ConnectOptions, events: Events) -> None:
        """Raises OSError, ValueError where the TLS files cannot be read."""
        self._place = urlsplit(broker.url)
        self._options = options
        self._events = events
        self._socket: socket.socket | None = None
        self._paho = self._new_paho(broker)

    async def open(self) -> None:
        """Connect in a thread, since name look-up and handshakes block; then drive the socket from the loop."""
        try:
            async with asyncio.timeout(_OPEN_TIMEOUTS * self._options.timeout_s):
                await _in_daemon_thread(self._connect, self._close_abandoned)
        except TimeoutError:
            raise OSError("the name server or the broker does not answer") from None
        found = self._paho.socket()
        if not isinstance(found, socket.socket):
            raise OSError("the socket closed at once")
        for level, option, value in SOCKET_OPTIONS:
            found.setsockopt(level, option, value)
        self._socket = found
        self._watch_socket(found)

    def check_alive(self) -> bool:
        """Let paho send its ping and judge the broker's silence."""
        return self._paho.loop_misc() == paho.MQTT_ERR_SUCCESS

    def subscribe(self, filters: Sequence[str]) -> int:
        """Subscribe at QoS 1; return the packet id.

        Retained requests are planted ones: none is asked for, and retain-as-published keeps those that come live
        apart from the rest.
        """
        options = SubscribeOptions(
            qos=1, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND
        )
        _, packet_id = self._paho.subscribe([(topic, options) for topic in filters])
        return packet_id or 0

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Take no further messages of these filters."""
        self._paho.unsubscribe(list(filters))

    def publish(self, message: Message) -> int | None:
        """Send at QoS 1; return the packet id, None where the socket is gone."""
        info = self._paho.publish(message.topic, message.payload, 1, message.retain, _properties(message))
        return info.mid if info.rc in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_QUEUE_SIZE) else None

    def acknowledge(self, packet_id: int, qos: int) -> None:
        """Confirm a message to the broker."""
        self._paho.ack(packet_id, qos)

    def disconnect(self) -> None:
        """Send DISCONNECT."""
        self._paho.disconnect()

    def close(self) -> None:
        """Take the socket off the loop and close it. Idempotent."""
        client, found = self._paho, self._socket
        # Interleaving: paho closes its socket once more when it is collected, much later, and would report that to
        # callbacks of a connection that is long over.
        client.on_socket_close = None
        client.on_socket_unregister_write = None
        client.on_disconnect = None
        self._socket = None
        if found is not None and found.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(found)
            loop.remove_writer(found)
            found.close()

    def _connect(self) -> None:
        """Look up the name, connect, shake hands; paho then holds the CONNECT packet for the first write."""
        options, is_tls = self._options, self._place.scheme == "mqtts"
        connect = Properties(PacketTypes.CONNECT)
        connect.SessionExpiryInterval = 0
        connect.ReceiveMaximum = options.receive_maximum
        connect.MaximumPacketSize = MAX_PACKET_BYTES
        self._paho.connect(
            self._place.hostname or "127.0.0.1",
            self._place.port or (8883 if is_tls else 1883),
            keepalive=options.keepalive_s,
            clean_start=True,
            properties=connect,
        )

    def _close_abandoned(self) -> None:
        """Close the socket of a connection that came after `open` had ended."""
        found = self._paho.socket()
        if isinstance(found, socket.socket):
            found.close()

    def _new_paho(self, broker: Broker) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=broker.client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._options.timeout_s
        client.max_inflight_messages_set(65_535)  # the send window is the connection's
        client.max_queued_messages_set(0)
        if broker.username:
            client.username_pw_set(broker.username, broker.password)
        if self._place.scheme == "mqtts":
            context = ssl.create_default_context(cafile=broker.ca_file or None)
            if broker.cert_file:
                context.load_cert_chain(broker.cert_file, broker.key_file or None)
            client.tls_set_context(context)
        client.will_set(self._options.state_topic, b"offline", 1, retain=True)
        events = self._events

        def on_connect(_client: Any, _data: Any, _flags: Any, code: Any, granted: Properties | None) -> None:
            if code.is_failure:
                events.on_refused(code.value)
            else:
                events.on_accepted(
                    getattr(granted, "MaximumPacketSize", None), getattr(granted, "ReceiveMaximum", None)
                )

        def on_disconnect(_client: Any, _data: Any, flags: Any, code: Any, _granted: Any) -> None:
            if flags.is_disconnect_packet_from_server:
                events.on_disconnected(code.value)

        client.on_connect = on_connect
        client.on_disconnect = on_disconnect
        client.on_subscribe = lambda _client, _data, packet_id, codes, _granted: events.on_subscribed(
            packet_id, [code.value for code in codes]
        )
        client.on_unsubscribe = lambda *_: events.on_unsubscribed()
        client.on_publish = lambda _client, _data, packet_id, code, _granted: events.on_confirmed(
            packet_id, code.value
        )
        client.on_message = lambda _client, _data, packet: events.on_message(
            _message(packet), packet.mid, packet.qos
        )
        return client

    def _watch_socket(self, found: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        client = self._paho

        def read() -> MQTTErrorCode:
            code = client.loop_read()
            # TLS decrypts whole records: what is left of one wakes no selector.
            while code == paho.MQTT_ERR_SUCCESS and isinstance(found, ssl.SSLSocket) and found.pending():
                code = client.loop_read()
            return code

        def write_when_possible(*_: Any) -> None:
            loop.add_writer(found, self._step, client.loop_write)

        def write_no_more(*_: Any) -> None:
            loop.remove_writer(found)

        def forget(*_: Any) -> None:  # paho closes a socket itself; its number must be free of us by then
            loop.remove_reader(found)
            loop.remove_writer(found)

        loop.add_reader(found, self._step, read)
        client.on_socket_register_write = write_when_possible
        client.on_socket_unregister_write = write_no_more
        client.on_socket_close = forget
        if client.want_write():
            write_when_possible()

    def _step(self, step: Callable[[], Any]) -> None:
        """Let paho read or write; a malformed packet may raise out of it, and must not end the event loop."""
        try:
            code = step()
        except Exception as error:  # noqa: BLE001 - anything a hostile packet makes paho raise
            self._events.on_lost(f"the broker sent what could not be read ({type(error).__name__})")
            return
        if (
            code == paho.MQTT_ERR_SUCCESS or self._socket is None
        ):  # None: closed by a callback of this very step
            return
        if code == paho.MQTT_ERR_CONN_LOST:
            self._events.on_lost("connection lost")
        else:  # paho met what it does not accept, and has closed its socket
            self._events.on_lost(f"the broker sent what could not be read ({paho.error_string(code)})")


async def _in_daemon_thread(call: Callable[[], None], abandon: Callable[[], None]) -> None:
    """Await `call` in a thread of its own. If the caller leaves earlier, `abandon` is called once `call` has ended.

    Raises what `call` raises, and OSError where too many abandoned calls still hang.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()
    name = "mqtt-connect"
    if sum(thread.name == name for thread in threading.enumerate()) >= _MAX_CONNECTING:
        raise OSError("earlier attempts still hang in a name look-up or a handshake")

    def finish(error: BaseException | None) -> None:
        if done.cancelled():
            abandon()
        else:
            done.set_result(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            call()
        except BaseException as raised:  # noqa: BLE001 - passed on to the caller
            error = raised
        try:
            loop.call_soon_threadsafe(finish, error)
        except RuntimeError:  # the event loop is closed: the process is ending
            abandon()
        finally:
            del error

    threading.Thread(target=work, name=name, daemon=True).start()
    raised = await done
    if raised is not None:
        try:
            raise raised
        finally:
            # The traceback refers to this frame and to paho's, which holds the socket of a failed handshake: in a cycle
            # with them, it would stay open until the garbage collector comes by.
            del raised, done


def _message(packet: paho.MQTTMessage) -> Message:
    properties = packet.properties
    return Message(
        packet.topic,
        bytes(packet.payload),
        getattr(properties, "ContentType", "") or "",
        getattr(properties, "CorrelationData", b"") or b"",
        getattr(properties, "MessageExpiryInterval", None),
        tuple(getattr(properties, "UserProperty", ())),
        packet.retain,
    )


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
