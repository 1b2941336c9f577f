"""A connection to an MQTT v5 broker that keeps itself alive: reconnecting, the send window, the state topic.

It knows no MQTT library; `client` is the contract with the adapter of one. Each network connection has a fresh client
and a `_Link` that holds what ends with it: its send window and the messages without confirmation. The loop
connect -> serve -> drop -> back off runs in one task, which owns `_link`.

Interleavings that the code guards against:
- A message is acknowledged after its connection was lost. Packet ids belong to a connection: on the next one the
  same id may be another message, which nobody has dealt with yet. `Received.epoch` names the connection.
- A publisher waits for a place in the window while the connection is lost and another comes. It must not send on the
  new one with a place of the old window: `send` checks after each wait that its link is still the current one.
- A publisher is cancelled between its PUBLISH and the PUBACK. Its place stays taken until the PUBACK, because the
  broker counts the message as in flight until then.
- A PUBACK never comes, on a connection that is otherwise well. Its place would be lost for good, and with enough of
  them the window; a connection is given up once a confirmation is overdue, and its window goes with it.
- A client reports something after its connection was dropped. It reports to its own `_Link`, which nobody reads any
  more, never to the next connection.
- `close` is cancelled in its only slow await (for the PUBACK of "offline"). Disconnecting, ending the task and dropping
  the connection are in a `finally` without awaits, so nothing is left running.
- The process did not run for a while (suspend, SIGSTOP, a blocked event loop). Confirmations of that time wait in the
  socket; the time is not counted as the broker's.
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
_CHECK_S = 1.0
#: A PUBACK takes a round trip and the broker's bookkeeping; 5 s is two callers' whole patience of 2 s.
_CONFIRM_S = 5.0
#: What a slow link is given beside: 64 kbit/s, so that 100 kB on their way are not taken for a lost confirmation.
_SLOW_LINK_BYTES_S = 8_000
#: A check that comes this much late means that the process did not run.
_GAP_S = 1.0
#: Forget earlier outages only after this long: two clients with one id would otherwise reconnect in a tight loop.
_STABLE_S = 10.0
_SUSPICIOUS_LIVES = 3


class LinkLost(EdgeRuntimeError):  # noqa: N818 - the fact it states
    """There is no connection to the broker, or it went before the broker confirmed."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message to be acknowledged; `epoch` names the connection whose packet id `packet_id` is."""

    message: Message
    epoch: int
    packet_id: int
    qos: int


@dataclass(slots=True)
class _Sent:
    """A message without confirmation: the publisher's future, and when its confirmation is overdue."""

    confirmed: "asyncio.Future[int]"
    size_bytes: int
    overdue_s: float


class _Link:
    """What belongs to one network connection and ends with it. Its client reports to it."""

    def __init__(
        self,
        epoch: int,
        subscriptions: tuple[str, ...],
        window: int,
        on_up: Callable[["_Link"], None],
        on_received: Callable[["_Link", Received], None],
        on_over: Callable[[str], None],
    ) -> None:
        self.epoch = epoch
        self.client: Client | None = None
        self.is_up = False
        self.is_retryable = True  # whether waiting can help; False: a person must change something
        self.lost = asyncio.Event()
        self.unsubscribed: asyncio.Future[None] | None = None
        self.max_packet_bytes = MAX_PACKET_BYTES
        self.window = asyncio.Semaphore(1)
        self.unconfirmed: dict[int, _Sent] = {}
        self.subscribing: dict[int, asyncio.Future[int]] = {}
        self._in_flight_bytes = 0
        self._subscriptions = subscriptions
        self._max_window = window
        self._on_up = on_up
        self._on_received = on_received
        self._on_over = on_over

    def on_accepted(self, max_packet_bytes: int | None, receive_maximum: int | None) -> None:
        self.max_packet_bytes = min(MAX_PACKET_BYTES, max_packet_bytes or MAX_PACKET_BYTES)
        # One place is left for our own state message.
        places = min(self._max_window, receive_maximum or 65_535) - 1
        self.window = asyncio.Semaphore(max(1, places))
        assert self.client is not None
        if self._subscriptions:
            self.client.subscribe(self._subscriptions)
        else:
            self._come_up()

    def on_refused(self, code: int) -> None:
        self.is_retryable = classify(code) is not ReasonClass.CONFIGURATION
        self.on_lost(f"the broker refused us: {in_words(code)}")

    def on_subscribed(self, packet_id: int, codes: Sequence[int]) -> None:
        extra = self.subscribing.pop(packet_id, None)
        if extra is not None:  # of `Connection.subscribe`
            if not extra.done():
                extra.set_result(codes[0])
            return
        refused = [(t, c) for t, c in zip(self._subscriptions, codes, strict=False) if c >= 0x80]
        if refused:
            topic, code = refused[0]
            self.is_retryable = classify(code) is not ReasonClass.CONFIGURATION
            self.on_lost(f"the broker refused the subscription to {topic}: {in_words(code)}")
        else:
            self._come_up()

    def on_unsubscribed(self) -> None:
        if self.unsubscribed is not None and not self.unsubscribed.done():
            self.unsubscribed.set_result(None)

    def on_confirmed(self, packet_id: int, code: int) -> None:
        sent = self.unconfirmed.pop(packet_id, None)
        if sent is None:
            return  # our state message, which takes no place
        self._in_flight_bytes -= sent.size_bytes
        self.window.release()
        if not sent.confirmed.done():
            sent.confirmed.set_result(code)

    def on_message(self, message: Message, packet_id: int, qos: int) -> None:
        self._on_received(self, Received(message, self.epoch, packet_id, qos))

    def on_disconnected(self, code: int) -> None:
        self.on_lost(f"disconnected: {in_words(code)}")

    def on_lost(self, reason: str) -> None:
        """Note that the connection is over. What is reported first is the cause, the rest follows from it and is ignored."""
        self.is_up = False
        if not self.lost.is_set():
            self.lost.set()
            self._on_over(reason)

    def _come_up(self) -> None:
        self.is_up = True
        self._on_up(self)

    def expect(self, packet_id: int, size_bytes: int, now_s: float) -> "asyncio.Future[int]":
        """Return the future of a message's confirmation."""
        self._in_flight_bytes += size_bytes
        overdue_s = now_s + _CONFIRM_S + self._in_flight_bytes / _SLOW_LINK_BYTES_S
        sent = _Sent(asyncio.get_running_loop().create_future(), size_bytes, overdue_s)
        self.unconfirmed[packet_id] = sent
        return sent.confirmed

    def is_overdue(self, now_s: float, gap_s: float) -> bool:
        """Whether a confirmation is missing for too long; `gap_s` of the time this process did not run."""
        for sent in self.unconfirmed.values():
            sent.overdue_s += gap_s
        return any(now_s >= sent.overdue_s for sent in self.unconfirmed.values())

    def fail_waiting(self, reason: str) -> None:
        """Tell every publisher that its confirmation will not come, and wake those that wait for a place."""
        lost = f"The connection to the broker was lost ({reason})."
        unconfirmed, self.unconfirmed = self.unconfirmed, {}
        subscribing, self.subscribing = self.subscribing, {}
        for sent in unconfirmed.values():
            self.window.release()
            _fail(sent.confirmed, LinkLost(lost))
        for future in subscribing.values():
            _fail(future, LinkLost(lost))


class Connection:
    """Stays connected until `close`; publishes, subscribes, acknowledges by hand."""

    def __init__(
        self,
        broker: Broker,
        *,
        subscriptions: tuple[str, ...],
        state_topic: str,
        on_message: Callable[[Received], None],
        on_up: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        window: int = 64,
        keepalive_s: int = 30,
        backoff: Backoff | None = None,
        draw: Callable[[], float] = random.random,
        new_client: NewClient = PahoClient,
        connect_s: float = _CONNECT_S,
    ) -> None:
        """`state_topic` carries "online", or "offline" by the last will, retained.

        `on_up` is called for each connection that the broker and its access rules accepted, `on_lost` once for each
        that ends. At most `window` messages without acknowledgement are on their way in each direction, fewer where
        the broker says so. `connect_s` bounds connecting and the broker's answer to it, each.
        """
        self._broker = broker
        self._subscriptions = subscriptions
        self._state_topic = state_topic
        self._on_message = on_message
        self._report_up = on_up
        self._report_lost = on_lost
        self._window = window
        self._keepalive_s = keepalive_s
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
        return await (await self.send(message))

    async def send(self, message: Message) -> "asyncio.Future[int]":
        """Wait for a place in the window and send at QoS 1; return the future of the broker's reason code.

        Once this has returned, the message has left this side. The future ends with LinkLost where the connection does;
        whoever is not interested in it may drop it. Raises as `publish`.
        """
        link, _ = self._current()
        size_bytes = message.packet_bytes
        if size_bytes > link.max_packet_bytes:
            raise TooLarge(
                f"The message takes {size_bytes} bytes; the broker accepts {link.max_packet_bytes}."
            )
        window = link.window
        await window.acquire()
        if link is not self._link or link.client is None:
            window.release()  # wakes the next publisher of the same lost connection
            raise LinkLost("The connection to the broker was lost while waiting for its window.")
        packet_id = link.client.publish(message)
        if packet_id is None:
            window.release()
            link.on_lost("connection lost")  # noticed before the socket reports it
            raise LinkLost("The connection to the broker is gone.")
        # A publisher that is cancelled from here on leaves its place taken, see the module's text.
        return link.expect(packet_id, size_bytes, asyncio.get_running_loop().time())

    def acknowledge(self, received: Received) -> None:
        """Confirm a message to the broker; for a message of an earlier connection do nothing."""
        link = self._link
        if link is not None and link.client is not None and received.epoch == link.epoch:
            link.client.acknowledge(received.packet_id, received.qos)

    async def subscribe(self, topic: str) -> int:
        """Subscribe beside the subscriptions of every connection, on this one only; return the broker's reason code.

        Raises LinkLost.
        """
        link, client = self._current()
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        link.subscribing[client.subscribe((topic,))] = granted
        return await granted

    async def unsubscribe(self, timeout_s: float = 2.0) -> None:
        """Take no further messages."""
        if not self.is_connected:
            return
        link, client = self._current()
        link.unsubscribed = asyncio.get_running_loop().create_future()
        client.unsubscribe(self._subscriptions)
        try:
            async with asyncio.timeout(timeout_s):
                await link.unsubscribed
        except TimeoutError:
            _log.warning("event=unsubscribe_unconfirmed")

    async def close(self) -> None:
        """Publish "offline", disconnect, stop connecting. Idempotent, and complete even if it is cancelled."""
        if self._task is None:
            return
        try:
            if self.is_connected:
                async with asyncio.timeout(1.0):
                    await self.publish(Message(self._state_topic, b"offline", retain=True))
        except (TimeoutError, EdgeRuntimeError) as error:
            _log.warning("event=offline_not_published error=%s", error)
        finally:  # without an await: see the module's text
            link = self._link
            if link is not None and link.client is not None and link.is_up:
                link.client.disconnect()
            self._task.cancel()
            self._drop("closed")
        await asyncio.wait({self._task})

    def _current(self) -> tuple[_Link, Client]:
        link = self._link
        if link is None or link.client is None or not self.is_connected:
            raise LinkLost(f"No connection to the broker ({self.last_error}).")
        return link, link.client

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        short_lives = 0
        reported = ""
        out_since_s = loop.time()
        while True:
            connects = self.connects
            began_s = loop.time()
            self._epoch += 1
            link = _Link(
                self._epoch, self._subscriptions, self._window, self._on_up, self._on_received, self._on_over
            )
            try:
                client = self._new_client(self._broker, self._options(), link)
                await client.open()
                self._link, link.client = link, client
            except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no thread can be started
                self.last_error = f"connecting failed: {error}"
            else:
                await self._serve(link, client)
                if self.connects > connects:
                    reported = ""
                if loop.time() - began_s > _STABLE_S:
                    out_since_s = loop.time()
                    short_lives = 0
                elif self.connects > connects:
                    short_lives += 1
            if short_lives >= _SUSPICIOUS_LIVES:
                # mosquitto 2.0.11 closes without a word when a session is taken over.
                self.last_error += "; it was welcome and lost again several times, as when another client has the same client id"
            self._drop(self.last_error)
            if self.last_error != reported:  # once per cause: a device may be without a network for weeks
                reported = self.last_error
                _log.warning("event=broker_unavailable why=%r", reported)
            if link.is_retryable:
                await asyncio.sleep(self._backoff.delay_s(loop.time() - out_since_s, self._draw))
            else:  # where a person must change something, trying soon only fills logs
                await asyncio.sleep(self._backoff.longest_s(self._draw))

    def _options(self) -> ConnectOptions:
        return ConnectOptions(self._state_topic, self._window, self._keepalive_s, self._connect_s)

    async def _serve(self, link: _Link, client: Client) -> None:
        """Let the client tend its timers until the connection is lost."""
        loop = asyncio.get_running_loop()
        check_s = min(_CHECK_S, self._connect_s)
        began_s = checked_s = loop.time()
        while not link.lost.is_set():
            try:
                async with asyncio.timeout(check_s):
                    await link.lost.wait()
            except TimeoutError:
                now_s = loop.time()
                late_s = now_s - checked_s - check_s
                gap_s = late_s if late_s > _GAP_S else 0.0
                checked_s = now_s
                began_s += gap_s
                if not client.check_alive():
                    link.on_lost("the broker is silent")
                elif not link.is_up and now_s - began_s >= self._connect_s:
                    link.on_lost("the broker accepts connections but does not answer")
                elif link.is_overdue(now_s, gap_s):
                    link.on_lost("the broker did not confirm a message in time")

    def _on_up(self, link: _Link) -> None:
        """The broker accepted us and our subscriptions."""
        assert link.client is not None
        link.client.publish(Message(self._state_topic, b"online", retain=True))
        self.connects += 1
        self.last_error = ""
        self._up.set()
        self._report_up()

    def _on_received(self, link: _Link, received: Received) -> None:
        if received.message.retain:  # a request planted for every worker to come: never executed
            self.acknowledge(received)
        elif link is self._link:
            self._on_message(received)

    def _on_over(self, reason: str) -> None:
        self._up.clear()
        self.last_error = reason

    def _drop(self, reason: str) -> None:
        """Forget the connection; everybody that waits for it learns so. Without effect where there is none."""
        self._up.clear()
        link, self._link = self._link, None
        if link is None:
            return
        if link.client is not None:
            link.client.close()
        link.fail_waiting(reason)
        self._report_lost()


def _fail(future: "asyncio.Future[int]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # mark as seen: whoever waited may be gone
