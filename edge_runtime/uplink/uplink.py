"""The edge's side of escalation: ask over MQTT, match replies to requests, know when asking is pointless.

Only an application reply ends a request; the broker's PUBACK proves nothing but that nobody listens (0x10).

Interleavings that the code guards against:
- The reply arrives before the PUBACK of its request. Its future is registered before the PUBLISH and awaited after
  the PUBACK, so the reply waits in it.
- A caller is cancelled or times out and its reply comes later. The id is no longer registered: the reply is counted
  as unknown and nobody gets it. The same holds for a duplicate of a reply.
- The connection is lost while a reply is awaited. Every registered future fails, so that callers fall back at once
  instead of at their deadline. A caller whose publish failed itself never looks at its future, which is marked as seen.
- A caller that holds the breaker's only probe is cancelled. The permit is abandoned, so that the next caller probes.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from edge_runtime.core.errors import InvalidRequest, RefusalKind
from edge_runtime.core.escalation.breaker import Breaker, BreakerState
from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState, Peer
from edge_runtime.core.escalation.roundtrip import RoundTrip
from edge_runtime.core.messages import InferReply, InferRequest, Reason
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words
from edge_runtime.core.protocol.topics import device_state_topic, reply_topic, request_topic
from edge_runtime.mqtt.client import Broker, NewClient
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost, Received
from edge_runtime.mqtt.envelope import Message, pack, unpack
from edge_runtime.mqtt.paho_adapter import PahoClient
from edge_runtime.typed_toml import read_secret


class CloudSettings(Protocol):
    """The keys of the configuration's [cloud] section that are read here."""

    @property
    def broker(self) -> str: ...
    @property
    def tenant(self) -> str: ...
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
    "unknown_reply",
    "bad_reply",
)
_REFUSED = frozenset(kind.value for kind in RefusalKind)


class Uplink:
    """Asks the cloud tier for one device of one tenant."""

    def __init__(
        self,
        settings: CloudSettings,
        *,
        device: str,
        breaker: Breaker | None = None,
        new_client: NewClient = PahoClient,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`clock_ns` is the clock of deadlines. Raises ConfigError where the password file cannot be read."""
        self._clock_ns = clock_ns
        self._tenant = settings.tenant
        self._device = device
        self.breaker = breaker or Breaker()
        self._roundtrip = RoundTrip()
        self._open: dict[bytes, asyncio.Future[Message]] = {}
        self._broker = settings.broker
        self.counters = dict.fromkeys(_COUNTED, 0)
        self._connection = Connection(
            Broker(
                settings.broker,
                f"{settings.tenant}.{device}",
                settings.username,
                read_secret(settings.password_file),
                settings.ca_file,
                settings.cert_file,
                settings.key_file,
            ),
            subscriptions=(reply_topic(settings.tenant, device),),
            state_topic=device_state_topic(settings.tenant, device),
            on_message=self._on_message,
            on_lost=self._on_lost,
            new_client=new_client,
        )

    async def start(self) -> None:
        """Begin connecting; does not wait for it."""
        self._connection.start()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the broker; False if it did not come in time."""
        return await self._connection.wait_connected(timeout_s)

    async def close(self) -> None:
        """Disconnect. Callers that still wait fall back with the reason link_down."""
        await self._connection.close()
        self._on_lost()  # also where there never was a connection

    def link_state(self) -> LinkState:
        """What the decision needs to know, now."""
        now_ns = self._clock_ns()
        is_open = self.breaker.state(now_ns) is BreakerState.OPEN
        return LinkState(self._connection.is_connected, is_open, self._roundtrip.p95_ns(now_ns))

    def status(self) -> dict[str, object]:
        """For `edge-runtime status`."""
        now_ns = self._clock_ns()
        return {
            "broker": self._broker,
            "connected": self._connection.is_connected,
            "why_not": self._connection.last_error or None,
            "breaker": self.breaker.state(now_ns).value,
            "reply_p95_ms": round(self._roundtrip.p95_ns(now_ns) / 1e6, 1),
            **self.counters,
        }

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """Ask for an answer until `deadline_ns`, by default of `time.monotonic_ns`. Raises CloudUnavailable.

        Cancelling the caller ends this request alone.
        """
        asked_ns = self._clock_ns()
        if not self._connection.is_connected:
            raise CloudUnavailable(Reason.LINK_DOWN, "There is no connection to the broker.")
        permit = self.breaker.permit(asked_ns)
        if permit is None:
            raise CloudUnavailable(Reason.CLOUD_OPEN, "The cloud failed repeatedly and is given a rest.")
        try:
            reply = await self._exchange(model, request, asked_ns, deadline_ns)
        except CloudUnavailable as failure:
            match failure.peer:
                case Peer.FAULTY:
                    self.breaker.failed(permit, self._clock_ns())
                case Peer.ALIVE:
                    self.breaker.succeeded(permit, self._clock_ns())
                case Peer.UNKNOWN:
                    self.breaker.abandoned(permit)
            raise
        except BaseException:
            self.breaker.abandoned(permit)
            raise
        self.breaker.succeeded(permit, self._clock_ns())
        self.counters["answered"] += 1
        return reply

    async def _exchange(
        self, model: str, request: InferRequest, asked_ns: int, deadline_ns: int
    ) -> InferReply:
        remaining_s = (deadline_ns - asked_ns) / 1e9
        request_id = secrets.token_bytes(16)
        timed = InferRequest(
            request.inputs,
            request.id,
            request.parameters | {"deadline_ms": max(1, int(remaining_s * 1000))},
            request.outputs,
            request.binary_default,
        )
        message = pack(
            request_topic(self._tenant, self._device, model),
            *oip.encode_request(timed),
            correlation=request_id,
            expiry_s=max(1, int(-(-remaining_s // 1))),
            accept_zstd=True,
        )
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._open[request_id] = waiting
        self.counters["asked"] += 1
        try:
            async with asyncio.timeout(max(0.0, remaining_s)):
                code = await self._connection.publish(message)
                if code == NO_SUBSCRIBERS:
                    self.counters["absent"] += 1
                    raise CloudUnavailable(Reason.CLOUD_ABSENT, "No cloud worker serves this model.")
                if classify(code) is not ReasonClass.OK:
                    self.counters["refused"] += 1
                    raise CloudUnavailable(
                        Reason.CLOUD_REFUSED, f"The broker refused the request: {in_words(code)}."
                    )
                answer = await waiting
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
        finally:
            self._open.pop(request_id, None)
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # mark as seen
        self._roundtrip.observe(self._clock_ns(), self._clock_ns() - asked_ns)
        return self._read(answer, model)

    def _read(self, message: Message, model: str) -> InferReply:
        try:
            body, json_length = unpack(message)
            if json_length is None and body.lstrip()[:8] == b'{"error"':
                self._raise_error(body)
            reply = oip.decode_reply(body, json_length)
        except InvalidRequest as error:
            self.counters["bad_reply"] += 1
            raise CloudUnavailable(
                Reason.CLOUD_FAILED, f"The reply cannot be read: {error}", Peer.FAULTY
            ) from None
        if reply.model_name != model:
            self.counters["bad_reply"] += 1
            raise CloudUnavailable(Reason.CLOUD_FAILED, "The reply is for another model.", Peer.FAULTY)
        return reply

    def _raise_error(self, body: bytes) -> None:
        text, fields = oip.decode_error(body)
        reason = fields.get("reason")
        if reason == RefusalKind.LATE.value:
            self.counters["late"] += 1
            raise CloudUnavailable(Reason.CLOUD_LATE, text, Peer.ALIVE)
        if reason in _REFUSED:
            self.counters["refused"] += 1
            raise CloudUnavailable(Reason.CLOUD_REFUSED, text, Peer.ALIVE)
        self.counters["failed"] += 1
        # A request that the worker calls invalid is no fault of the worker: both ends disagree about the model.
        raise CloudUnavailable(
            Reason.CLOUD_FAILED, text, Peer.ALIVE if reason == oip.INVALID else Peer.FAULTY
        )

    def _on_lost(self) -> None:
        """No reply can come for what was asked on this connection: its callers fall back now."""
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(LinkLost("The connection to the broker was lost."))

    def _on_message(self, received: Received) -> None:
        self._connection.acknowledge(received)
        waiting = self._open.get(received.message.correlation)
        if waiting is None or waiting.done():
            self.counters["unknown_reply"] += 1  # late, a duplicate, or forged
            return
        waiting.set_result(received.message)
