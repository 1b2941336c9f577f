"""A connection to an MQTT v5 broker that keeps itself alive: reconnecting, the send window, the state topic.

It knows no MQTT library; `client` is the contract with the adapter of one. Each network connection has a fresh client
and a `_Link` that holds what ends with it: its send window and the messages without confirmation. The loop
connect -> serve -> drop -> back off runs in one task, which owns `_link`.

Interleavings that the code guards against:
- A message is acknowledged after its connection was lost. Packet ids belong to a connection: on the next one the
  same id may be another message, which nobody has dealt with yet. `Received.epoch` names the connection.
- A publisher waits for a place in the window while the connection is lost and another comes. It must not send on the
  new one with a place of the old window: `publish` checks after each wait that its link is still the current one.
- A publisher is cancelled between its PUBLISH and the PUBACK. Its place stays taken until the PUBACK, because the
  broker counts the message as in flight until then.
- A client reports something after its connection was dropped. It reports to its own `_Link`, which nobody reads any
  more, never to the next connection.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.core.backoff import Backoff
from edge_runtime.core.errors import EdgeRuntimeError, TooLarge
from edge_runtime.core.protocol.mqtt_reasons import NO_MATCHING_SUBSCRIBERS, ReasonClass, classify, in_words
from edge_runtime.mqtt.client import MAX_PACKET_BYTES, Broker, Client, ConnectOptions, NewClient
from edge_runtime.mqtt.envelope import Message
from edge_runtime.mqtt.paho_adapter import PahoClient

_log = logging.getLogger(__name__)

NO_SUBSCRIBERS = NO_MATCHING_SUBSCRIBERS
_CONNECT_S = 5.0
_KEEPALIVE_S = 30
_CHECK_S = 1.0
#: Reset the back-off only after this long: two clients with one id would otherwise reconnect in a tight loop.
_STABLE_S = 10.0
_SUSPICIOUS_LIVES = 3
#: Where a person must change a configuration, trying fast only fills logs.
_PATIENT_ATTEMPT = 6


class LinkLost(EdgeRuntimeError):  # noqa: N818 - the fact it states
    """There is no connection to the broker, or it went before the broker confirmed."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message to be acknowledged; `epoch` names the connection whose packet id `packet_id` is."""

    message: Message
    epoch: int
    packet_id: int
    qos: int


class _Link:
    """What belongs to one network connection and ends with it. Its client reports to it."""

    def __init__(
        self,
        epoch: int,
        subscriptions: tuple[str, ...],
        max_in_flight: int,
        on_up: Callable[["_Link"], None],
        on_received: Callable[["_Link", Received], None],
        on_over: Callable[[str], None],
    ) -> None:
        self.epoch = epoch
        self.client: Client | None = None
        self.is_up = False
        self.is_retryable = True  # whether waiting can help; False: a person must change something
        self.is_session_poisoned = False
        self.lost = asyncio.Event()
        self.unsubscribed: asyncio.Future[None] | None = None
        self.max_packet_bytes = MAX_PACKET_BYTES
        self.window = asyncio.Semaphore(1)
        # packet id -> the publisher that waits for the broker's reason code
        self.unconfirmed: dict[int, asyncio.Future[int]] = {}
        self._subscriptions = subscriptions
        self._max_in_flight = max_in_flight
        self._on_up = on_up
        self._on_received = on_received
        self._on_over = on_over

    def on_accepted(self, max_packet_bytes: int | None, receive_maximum: int | None) -> None:
        self.max_packet_bytes = min(MAX_PACKET_BYTES, max_packet_bytes or MAX_PACKET_BYTES)
        # One place is left for our own state message.
        places = min(self._max_in_flight, receive_maximum or 65_535) - 1
        self.window = asyncio.Semaphore(max(1, places))
        assert self.client is not None
        if self._subscriptions:
            self.client.subscribe(self._subscriptions)
        else:
            self._come_up()

    def on_refused(self, code: int) -> None:
        self.is_retryable = classify(code) is not ReasonClass.CONFIGURATION
        self.on_lost(f"the broker refused us: {in_words(code)}")

    def on_subscribed(self, codes: Sequence[int]) -> None:
        refused = [code for code in codes if code >= 0x80]
        if refused:
            self.is_retryable = classify(refused[0]) is not ReasonClass.CONFIGURATION
            self.on_lost(f"the broker refused a subscription: {in_words(refused[0])}")
        else:
            self._come_up()

    def on_unsubscribed(self) -> None:
        if self.unsubscribed is not None and not self.unsubscribed.done():
            self.unsubscribed.set_result(None)

    def on_confirmed(self, packet_id: int, code: int) -> None:
        confirmed = self.unconfirmed.pop(packet_id, None)
        if confirmed is None:
            return  # our state message, which takes no place
        self.window.release()
        if not confirmed.done():
            confirmed.set_result(code)

    def on_message(self, message: Message, packet_id: int, qos: int) -> None:
        self._on_received(self, Received(message, self.epoch, packet_id, qos))

    def on_disconnected(self, code: int) -> None:
        self.on_lost(f"disconnected: {in_words(code)}")

    def on_unreadable(self, reason: str) -> None:
        # What the library could not read comes back with a kept session and would end each connection in turn.
        self.is_session_poisoned = True
        self.on_lost(reason)

    def on_lost(self, reason: str) -> None:
        """Note that the connection is over. What is reported first is the cause, the rest follows from it and is ignored."""
        self.is_up = False
        if not self.lost.is_set():
            self.lost.set()
            self._on_over(reason)

    def _come_up(self) -> None:
        self.is_up = True
        self._on_up(self)

    def fail_unconfirmed(self, reason: str) -> None:
        """Tell every publisher that its confirmation will not come, and wake those that wait for a place."""
        unconfirmed, self.unconfirmed = self.unconfirmed, {}
        for confirmed in unconfirmed.values():
            self.window.release()
            if not confirmed.done():
                confirmed.set_exception(LinkLost(f"The connection to the broker was lost ({reason})."))


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
        new_client: NewClient = PahoClient,
        connect_s: float = _CONNECT_S,
    ) -> None:
        """`state_topic` carries "online", or "offline" by the last will, retained.

        `on_lost` is called once for each connection that ends. A session kept for `session_expiry_s` redelivers what
        was not acknowledged on the next connection; 0 is a clean start each time. `connect_s` bounds connecting and
        the broker's answer to it, each.
        """
        self._subscriptions = subscriptions
        self._max_in_flight = max_in_flight
        self._broker = broker
        self._state_topic = state_topic
        self._on_message = on_message
        self._on_lost = on_lost
        self._session_expiry_s = session_expiry_s
        self._is_session_poisoned = False
        self._backoff = backoff or Backoff(cap_s=30.0)
        self._draw = draw
        self._new_client = new_client
        self._connect_s = connect_s
        self._link: _Link | None = None
        self._epoch = 0
        self._up = asyncio.Event()
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
        link = self._link
        if link is None or link.client is None or not self.is_connected:
            raise LinkLost(f"No connection to the broker ({self.last_error}).")
        size = message.packet_bytes
        if size > link.max_packet_bytes:
            raise TooLarge(f"The message takes {size} bytes; the broker accepts {link.max_packet_bytes}.")
        window = link.window
        await window.acquire()
        if link is not self._link:
            window.release()  # wakes the next publisher of the same lost connection
            raise LinkLost("The connection to the broker was lost while waiting for its window.")
        packet_id = link.client.publish(message)
        if packet_id is None:
            window.release()
            raise LinkLost("The connection to the broker is gone.")
        confirmed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # A publisher that is cancelled from here on leaves its place taken, see the module's text.
        link.unconfirmed[packet_id] = confirmed
        return await confirmed

    def acknowledge(self, received: Received) -> None:
        """Confirm a message to the broker; for a message of an earlier connection do nothing."""
        link = self._link
        if link is not None and link.client is not None and received.epoch == link.epoch:
            link.client.acknowledge(received.packet_id, received.qos)

    async def unsubscribe(self, timeout_s: float = 2.0) -> None:
        """Take no further messages."""
        link = self._link
        if link is None or link.client is None or not self.is_connected:
            return
        link.unsubscribed = asyncio.get_running_loop().create_future()
        link.client.unsubscribe(self._subscriptions)
        try:
            async with asyncio.timeout(timeout_s):
                await link.unsubscribed
        except TimeoutError:
            _log.warning("event=unsubscribe_unconfirmed")

    async def close(self) -> None:
        """Publish "offline", disconnect, stop connecting. Idempotent."""
        if self._task is None:
            return
        link = self._link
        if link is not None and link.client is not None and self.is_connected:
            try:
                async with asyncio.timeout(1.0):
                    await self.publish(Message(self._state_topic, b"offline", retain=True))
            except (TimeoutError, EdgeRuntimeError) as error:
                _log.warning("event=offline_not_published error=%s", error)
            link.client.disconnect()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        self._drop("closed")

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = short_lives = 0
        reported = ""
        while True:
            connects = self.connects
            began_s = loop.time()
            self._epoch += 1
            link = _Link(
                self._epoch,
                self._subscriptions,
                self._max_in_flight,
                self._on_up,
                self._on_received,
                self._on_over,
            )
            try:
                client = self._new_client(self._broker, self._options(), link)
                await client.open()
                self._link, link.client = link, client
            except (OSError, ValueError) as error:
                self.last_error = f"connecting failed: {error}"
            else:
                await self._serve(link, client)
                if self.connects > connects:
                    reported = ""
                if loop.time() - began_s > _STABLE_S:
                    attempt = short_lives = 0
                elif self.connects > connects:
                    short_lives += 1
            if short_lives >= _SUSPICIOUS_LIVES:
                # mosquitto 2.0.11 closes without a word when a session is taken over.
                self.last_error += "; it was welcome and lost again several times, as when another client has the same client id"
            self._drop(self.last_error)
            if link.is_session_poisoned:
                self._is_session_poisoned = True
            if not link.is_retryable:
                attempt = max(attempt, _PATIENT_ATTEMPT)
            if self.last_error != reported:  # once per cause: a device may be without a network for weeks
                reported = self.last_error
                _log.warning("event=broker_unavailable why=%r", reported)
            await asyncio.sleep(self._backoff.delay_s(attempt, self._draw))
            attempt += 1

    def _options(self) -> ConnectOptions:
        return ConnectOptions(
            state_topic=self._state_topic,
            session_expiry_s=self._session_expiry_s,
            is_clean_start=self._session_expiry_s == 0 or self._is_session_poisoned,
            receive_maximum=self._max_in_flight,
            keepalive_s=_KEEPALIVE_S,
            timeout_s=self._connect_s,
        )

    async def _serve(self, link: _Link, client: Client) -> None:
        """Let the client tend its timers until the connection is lost."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while not link.lost.is_set():
            try:
                async with asyncio.timeout(min(_CHECK_S, self._connect_s)):
                    await link.lost.wait()
            except TimeoutError:
                if not client.check_alive():
                    link.on_lost("the broker is silent")
                if not link.is_up and loop.time() - began_s >= self._connect_s:
                    link.on_lost("the broker accepts connections but does not answer")

    def _on_up(self, link: _Link) -> None:
        """The broker accepted us and our subscriptions."""
        assert link.client is not None
        self._is_session_poisoned = False
        link.client.publish(Message(self._state_topic, b"online", retain=True))
        self.connects += 1
        self.last_error = ""
        self._up.set()

    def _on_received(self, link: _Link, received: Received) -> None:
        if received.message.retain:  # a request planted for every worker to come: never executed
            self.acknowledge(received)
        elif link is self._link:
            self._on_message(received)

    def _on_over(self, reason: str) -> None:
        self._up.clear()
        self.last_error = reason

    def _drop(self, reason: str) -> None:
        """Forget the connection; everybody that waits for it learns so."""
        self._up.clear()
        link, self._link = self._link, None
        if link is None:
            return
        if link.client is not None:
            link.client.close()
        link.fail_unconfirmed(reason)
        self._on_lost()
