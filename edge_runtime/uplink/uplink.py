"""The edge's side of escalation: ask over MQTT, match replies to requests, know when asking is pointless.

Only an application reply ends a request; the broker's PUBACK proves nothing but that nobody listens (0x10), and not
always that. A request that gets no reply is sent again, with the same id, while its caller's deadline allows it.

What is learned of the workers (`core/escalation/health`) is learned from requests, not from callers: whether a reply
comes within a time that is fair to the worker is observed after its caller has left, too. So a caller with a short
deadline cannot open the breaker for others, and a late reply closes it.

Interleavings that the code guards against:
- The reply arrives before the PUBACK of its request, or the PUBACK never comes. The caller waits for both at once.
- A caller is cancelled or times out and its reply comes later. Nobody gets it, but it is known by its id: it teaches
  the round trip. A second reply to one request is unknown and ignored.
- A caller times out while its request waits for a place in this side's send window. The request was never sent, so
  the workers' health learns nothing from it.
- The connection is lost while a reply is awaited. Every caller falls back at once instead of at its deadline.
- The process did not run for a while. Replies of that time wait in the socket: the time is not counted as silence.
- `close` is cancelled. Everything after its first await is in a `finally` without awaits.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from edge_runtime.core.errors import InvalidRequest, RefusalKind
from edge_runtime.core.escalation.breaker import BreakerLimits, BreakerState
from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState, Peer
from edge_runtime.core.escalation.health import Health
from edge_runtime.core.escalation.resend import ResendBudget, resend_after_ns
from edge_runtime.core.messages import InferReply, InferRequest, Reason
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.any_reply import ErrorReply, decode_any_reply
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words
from edge_runtime.core.protocol.topics import (
    device_client_id,
    device_state_topic,
    reply_topic,
    request_topic,
)
from edge_runtime.mqtt.client import Broker, NewClient
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost, Received
from edge_runtime.mqtt.envelope import Message, pack, unpack
from edge_runtime.mqtt.paho_adapter import PahoClient
from edge_runtime.typed_toml import read_secret

_log = logging.getLogger(__name__)


class CloudSettings(Protocol):
    """The keys of the configuration's [cloud] section that are read here."""

    @property
    def broker(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def username(self) -> str: ...
    @property
    def password_file(self) -> str: ...
    @property
    def ca_file(self) -> str: ...
    @property
    def cert_file(self) -> str: ...
    @property
    def key_file(self) -> str: ...


_COUNTED = (
    "asked",
    "answered",
    "refused",
    "failed",
    "late",
    "absent",
    "link_lost",
    "resent",
    "late_reply",
    "unknown_reply",
    "bad_reply",
    "probes",
)
_REFUSED = frozenset(kind.value for kind in RefusalKind)
_PROBE_S = 1.0  # a probe waits this long for a place in the send window
_GAP_NS = 1_000_000_000  # a tick that comes this much late means that the process did not run


class Uplink:
    """Asks the cloud tier for one device of one tenant."""

    def __init__(
        self,
        settings: CloudSettings,
        *,
        device: str,
        limits: BreakerLimits | None = None,
        new_client: NewClient = PahoClient,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`clock_ns` is the clock of deadlines. Raises ConfigError where the password file cannot be read."""
        self._clock_ns = clock_ns
        self._draw = draw
        self._tenant = settings.tenant
        self._device = device
        self._limits = limits
        # Half of what callers give the cloud: silence is a fault before the second caller in a row has waited in vain.
        self._patience_ns = int(settings.timeout_s * 1e9) // 2
        self._models: dict[str, Health] = {}
        self._resends = ResendBudget()
        #: Callers that wait, by request id.
        self._waiting: dict[bytes, asyncio.Future[InferReply]] = {}
        #: The newest probe of each model, by request id.
        self._probes: dict[bytes, str] = {}
        self._broker_refusal = ""
        self._wake = asyncio.Event()
        self._next_tick_ns: int | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.counters = dict.fromkeys(_COUNTED, 0)
        self._broker = Broker(
            settings.broker,
            device_client_id(settings.tenant, device),
            settings.username,
            read_secret(settings.password_file),
            settings.ca_file,
            settings.cert_file,
            settings.key_file,
        )
        self._connection = Connection(
            self._broker,
            subscriptions=(reply_topic(settings.tenant, device),),
            state_topic=device_state_topic(settings.tenant, device),
            on_message=self._on_message,
            on_up=self._on_up,
            on_lost=self._on_lost,
            new_client=new_client,
            draw=draw,
        )

    async def start(self) -> None:
        """Begin connecting; does not wait for it."""
        self._connection.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="uplink-watch")

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the broker; False if it did not come in time."""
        return await self._connection.wait_connected(timeout_s)

    async def close(self) -> None:
        """Disconnect. Callers that still wait fall back with the reason link_down. Complete even if it is cancelled."""
        try:
            await self._connection.close()
        finally:
            self._on_lost()  # also where there never was a connection
            if self._watcher is not None:
                self._watcher.cancel()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})

    @property
    def is_authenticated(self) -> bool:
        """Whether this device proves to the broker who it is.

        A broker that asks nobody lets anybody publish on this device's reply topic, with a request id that it has seen.
        Such an answer is used, but must not be kept: what a cache holds outlives the stranger.
        """
        return self._broker.is_authenticated

    def link_state(self, model: str | None = None) -> LinkState:
        """What the decision about one row of `model` needs to know, now. Without a model: of the link as a whole.

        Where the breaker is open, the caller is taken for turned away. Now and then the estimate is left out by a
        draw, so that a caller tries what it forbids and corrects it.
        """
        now_ns = self._clock_ns()
        is_connected = self._connection.is_connected
        if model is None:
            estimates = [health.roundtrip.p95_ns(now_ns) for health in self._models.values()]
            is_open = any(health.is_open for health in self._models.values())
            return LinkState(is_connected, is_open, max(estimates, default=0))
        health = self._health(model)
        if health.is_open:
            self._turn_away(health)
        is_tried = health.roundtrip.is_worth_a_try(self._draw())
        return LinkState(is_connected, health.is_open, 0 if is_tried else health.roundtrip.p95_ns(now_ns))

    def status(self) -> dict[str, object]:
        """For `edge-runtime status`. `why_not` names what is wrong, also with a connection."""
        state = self.link_state()
        states = {health.breaker.state for health in self._models.values()}
        worst = next(
            (s for s in (BreakerState.OPEN, BreakerState.HALF_OPEN) if s in states), BreakerState.CLOSED
        )
        return {
            "broker": self._broker.url,
            "connected": state.is_connected,
            "authenticated": self.is_authenticated,
            "why_not": (self._connection.last_error or self._silence() or self._broker_refusal) or None,
            "breaker": worst.value,
            "reply_p95_ms": round(state.reply_p95_ns / 1e6, 1),
            **self.counters,
        }

    def _silence(self) -> str:
        """Which models no worker answers, since when; empty where none is known to be silent."""
        now_ns, now = self._clock_ns(), datetime.now(UTC)

        def since(at_ns: int) -> str:
            return (now - timedelta(microseconds=(now_ns - at_ns) // 1000)).isoformat(timespec="seconds")

        words = []
        for model, health in sorted(self._models.items()):
            if health.absent_since_ns is not None:
                words.append(f"no worker serves {model} since {since(health.absent_since_ns)}")
            elif health.silent_since_ns is not None:
                words.append(
                    f"no worker answers for {model} since {since(health.silent_since_ns)}, or the broker keeps its "
                    f"replies on {reply_topic(self._tenant, self._device)} from this device"
                )
        return "; ".join(words)

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """Ask for an answer until `deadline_ns`, by default of `time.monotonic_ns`. Raises CloudUnavailable.

        Cancelling the caller ends this request alone.
        """
        if not self._connection.is_connected:
            raise CloudUnavailable(Reason.LINK_DOWN, "There is no connection to the broker.")
        health = self._health(model)
        if health.is_open:
            self._turn_away(health)
            raise CloudUnavailable(Reason.CLOUD_OPEN, "The cloud does not answer; it is being probed.")
        try:
            reply = await self._exchange(health, model, request, deadline_ns)
        except TimeoutError:
            self.counters["late"] += 1
            raise CloudUnavailable(
                Reason.CLOUD_LATE, "The cloud did not answer in time.", Peer.FAULTY
            ) from None
        except LinkLost as error:
            self.counters["link_lost"] += 1
            raise CloudUnavailable(Reason.LINK_DOWN, str(error)) from None
        except InvalidRequest as error:  # it cannot be sent at all: too large for the broker
            raise CloudUnavailable(Reason.CLOUD_REFUSED, str(error)) from None
        self.counters["answered"] += 1
        return reply

    async def _exchange(
        self, health: Health, model: str, request: InferRequest, deadline_ns: int
    ) -> InferReply:
        """Send until a reply comes. Raises TimeoutError, LinkLost, InvalidRequest, CloudUnavailable."""
        remaining_ns = deadline_ns - self._clock_ns()
        request_id = secrets.token_bytes(16)
        message = self._pack(model, request, request_id, remaining_ns)
        waiting: asyncio.Future[InferReply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = waiting
        self.counters["asked"] += 1
        self._resends.earn()
        sends = 0
        try:
            async with asyncio.timeout(max(0.0, remaining_ns / 1e9)):
                while True:
                    confirmed = await self._connection.send(message)
                    now_ns = self._clock_ns()
                    sends += 1
                    health.sent(request_id, now_ns)
                    self._plan(now_ns + health.fair_ns(now_ns))
                    resend_ns = resend_after_ns(
                        sends,
                        health.roundtrip.p95_ns(now_ns),
                        self._patience_ns,
                        deadline_ns - now_ns,
                        self._draw(),
                    )
                    if await self._replied(health, request_id, sends, waiting, confirmed, resend_ns):
                        return waiting.result()
                    if not self._resends.take(self._clock_ns()):
                        return await waiting
                    self.counters["resent"] += 1
                    # The same bytes, so that a worker recognises them; only the time in the broker's hands shrinks.
                    message = replace(message, expiry_s=_whole_s(deadline_ns - self._clock_ns()))
        finally:
            del self._waiting[request_id]
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # mark as seen

    def _pack(self, model: str, request: InferRequest, request_id: bytes, remaining_ns: int) -> Message:
        timed = InferRequest(
            request.inputs,
            request.id,
            request.parameters | {"deadline_ms": max(1, remaining_ns // 1_000_000)},
            request.outputs,
            request.binary_default,
        )
        return pack(
            request_topic(self._tenant, self._device, model),
            *oip.encode_request(timed),
            correlation=request_id,
            expiry_s=_whole_s(remaining_ns),
            accept_zstd=True,
        )

    async def _replied(
        self,
        health: Health,
        request_id: bytes,
        sends: int,
        waiting: "asyncio.Future[InferReply]",
        confirmed: "asyncio.Future[int]",
        resend_ns: int | None,
    ) -> bool:
        """Wait for the reply, for `resend_ns` at most; False where it is time to ask again.

        Raises CloudUnavailable where the broker says that nobody will answer.
        """
        until_ns = None if resend_ns is None else self._clock_ns() + resend_ns
        pending: set[asyncio.Future[InferReply] | asyncio.Future[int]] = {waiting, confirmed}
        while not waiting.done():
            patience_s = None if until_ns is None else max(0.0, (until_ns - self._clock_ns()) / 1e9)
            done, _ = await asyncio.wait(pending, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return False
            if confirmed in done:
                pending.discard(confirmed)
                if not waiting.done():
                    self._check_confirmation(health, request_id, sends, confirmed.result())
        return True

    def _check_confirmation(self, health: Health, request_id: bytes, sends: int, code: int) -> None:
        if code == NO_SUBSCRIBERS:
            # Of a further copy: the worker that has the first one may be draining, and answers it yet.
            if sends > 1 or not health.is_absence_true:
                return
            health.absent(request_id, self._clock_ns())
            self.counters["absent"] += 1
            raise CloudUnavailable(Reason.CLOUD_ABSENT, "No cloud worker serves this model.")
        if classify(code) is not ReasonClass.OK:
            health.withdrawn(request_id)
            self.counters["refused"] += 1
            topic = reply_topic(self._tenant, self._device).removesuffix("/rsp") + "/req/+"
            self._broker_refusal = f"the broker refuses requests on {topic}: {in_words(code)}"
            raise CloudUnavailable(Reason.CLOUD_REFUSED, f"The broker refused the request: {in_words(code)}.")
        health.delivered()
        self._broker_refusal = ""

    def _health(self, model: str) -> Health:
        health = self._models.get(model)
        if health is None:
            health = self._models[model] = Health(self._patience_ns, self._limits)
        return health

    def _turn_away(self, health: Health) -> None:
        health.breaker.turned_away()
        self._plan(health.breaker.next_probe_ns())

    def _plan(self, due_ns: int | None) -> None:
        """Wake the watcher where something is due before the time for which it sleeps."""
        if due_ns is not None and (self._next_tick_ns is None or due_ns < self._next_tick_ns):
            self._wake.set()

    def _on_up(self) -> None:
        for health in self._models.values():
            health.breaker.link_renewed(self._clock_ns())
        self._wake.set()

    def _on_lost(self) -> None:
        """No reply can come for what was asked on this connection: its callers fall back now."""
        for health in self._models.values():
            health.link_lost()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LinkLost("The connection to the broker was lost."))

    def _on_message(self, received: Received) -> None:
        self._connection.acknowledge(received)
        message = received.message
        probed = self._probes.pop(message.correlation, None)
        if probed is not None:
            self._health(probed).probe_answered(self._clock_ns())
            return
        waiting = self._waiting.get(message.correlation)
        known = [
            (model, health) for model, health in self._models.items() if health.knows(message.correlation)
        ]
        if not known:
            self.counters["unknown_reply"] += 1  # a duplicate, or forged
            return
        model, health = known[0]
        failure = reply = None
        try:
            reply = self._read(message, model)
        except CloudUnavailable as error:
            failure = error
        is_fault = failure is not None and failure.peer is Peer.FAULTY
        health.answered(message.correlation, self._clock_ns(), is_fault=is_fault)
        if waiting is None or waiting.done():
            self.counters["late_reply"] += 1
        elif failure is not None:
            waiting.set_exception(failure)
        elif reply is not None:
            waiting.set_result(reply)

    def _read(self, message: Message, model: str) -> InferReply:
        """Decode a reply for `model`. Raises CloudUnavailable."""
        try:
            reply = decode_any_reply(*unpack(message))
        except InvalidRequest as error:
            self.counters["bad_reply"] += 1
            raise CloudUnavailable(
                Reason.CLOUD_FAILED, f"The reply cannot be read: {error}", Peer.FAULTY
            ) from None
        if isinstance(reply, ErrorReply):
            raise self._failure(reply)
        if reply.model_name != model:
            self.counters["bad_reply"] += 1
            raise CloudUnavailable(Reason.CLOUD_FAILED, "The reply is for another model.", Peer.FAULTY)
        return reply

    def _failure(self, reply: ErrorReply) -> CloudUnavailable:
        reason = reply.fields.get("reason")
        if reason == RefusalKind.LATE.value:
            self.counters["late"] += 1
            return CloudUnavailable(Reason.CLOUD_LATE, reply.message, Peer.ALIVE)
        if reason in _REFUSED:
            self.counters["refused"] += 1
            return CloudUnavailable(Reason.CLOUD_REFUSED, reply.message, Peer.ALIVE)
        self.counters["failed"] += 1
        # A request that the worker calls invalid is no fault of the worker: both ends disagree about the model.
        is_ours = reason == oip.INVALID
        return CloudUnavailable(Reason.CLOUD_FAILED, reply.message, Peer.ALIVE if is_ours else Peer.FAULTY)

    async def _watch(self) -> None:
        """Find requests without a reply, whose callers may have left long ago, and send the probes of open breakers."""
        while True:
            now_ns = self._clock_ns()
            times = [health.next_tick_ns(now_ns) for health in self._models.values()]
            next_ns = self._next_tick_ns = min([at for at in times if at is not None], default=None)
            self._wake.clear()
            try:
                async with asyncio.timeout(None if next_ns is None else max(0.0, (next_ns - now_ns) / 1e9)):
                    await self._wake.wait()
                continue
            except TimeoutError:
                late_ns = self._clock_ns() - (next_ns or 0)
            for model, health in list(self._models.items()):
                if late_ns > _GAP_NS:
                    health.forgive(late_ns)
                was_open = health.is_open
                is_probe_due = health.tick(self._clock_ns())
                if health.is_open and not was_open:
                    _log.warning("event=cloud_silent model=%s", model)
                if is_probe_due:
                    await self._probe(model, health)

    async def _probe(self, model: str, health: Health) -> None:
        """Ask for nothing: a request without inputs, which any worker answers at once as invalid and never runs."""
        health.breaker.probe_sent(self._clock_ns())
        if not self._connection.is_connected:
            return
        for request_id in [known for known, probed in self._probes.items() if probed == model]:
            del self._probes[request_id]
        request_id = secrets.token_bytes(16)
        self._probes[request_id] = model
        self.counters["probes"] += 1
        try:
            message = self._pack(model, InferRequest(()), request_id, self._patience_ns)
            async with asyncio.timeout(_PROBE_S):
                await self._connection.send(message)
        except (TimeoutError, LinkLost, InvalidRequest):
            pass  # there will be another


def _whole_s(remaining_ns: int) -> int:
    """A message's expiry: whole seconds, rounded up, at least one."""
    return max(1, -(-remaining_ns // 1_000_000_000))
