"""The cloud worker: message -> admission -> request -> model runner -> reply -> message, with the runners that the edge uses.

Admission is one synchronous step per message: is its topic a request, is it known, is there room? The broker is told
PUBACK at once, in the order of arrival (MQTT-4.6.0-2), and the reply follows when there is one. Delivery is not
the broker's: no broker hands a dead worker's messages to another, so the edge asks again within its deadline, and
`duplicates` recognises a request that is here already. No session is kept, because a broker deals requests to the
session of a dead worker for as long as it lasts.

What is held is bounded: so many requests and bytes, and beyond them a request is refused as busy at once. The refusals
wait for the send window, too; while too many wait, PUBACKs are held back, and Receive Maximum stops the broker.

Interleavings that the code guards against:
- A duplicate arrives while the original runs, or while its reply waits for the window. It is acknowledged and not run;
  the original's reply answers both.
- The connection is lost while a request runs or its reply is on the way. The reply waits for the next connection until
  the sender's time is over, and the edge's second copy finds it known.
- A PUBACK that was held back belongs to a lost connection. `Received.epoch` makes it void; what was held is dropped.
- Draining: the broker sends the rest of a burst after the UNSUBSCRIBE. Draining has ended only when a round trip has
  brought nothing new. What is not answered by then is refused as draining, so that its edge falls back at once.
- `drain` is cancelled. What it began is ended in a `finally` whose only await is the connection's own close, which
  takes a second at most and is complete even if it is cancelled.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cloud_fallback.config import CloudConfig, worker_id
from cloud_fallback.delivery_check import DeliveryCheck
from cloud_fallback.duplicates import Duplicates, RequestKey, key_of
from edge_runtime.core.errors import (
    EdgeRuntimeError,
    InvalidRequest,
    RefusalKind,
    Refused,
    TooLarge,
    UnknownModel,
    refusal,
)
from edge_runtime.core.messages import Answer, InferReply, InferRequest, Signature
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words
from edge_runtime.core.protocol.parameters import priority_of, time_limit_ns
from edge_runtime.core.protocol.replies import build_reply
from edge_runtime.core.protocol.topics import (
    RequestTopic,
    is_worker_check,
    parse_request_topic,
    reply_topic_for,
    worker_client_id,
    worker_filter,
    worker_state_topic,
)
from edge_runtime.loading.model import Model
from edge_runtime.mqtt.client import Broker, NewClient
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost, Received
from edge_runtime.mqtt.envelope import Message, is_compressed, pack, reads_zstd, unpack
from edge_runtime.mqtt.paho_adapter import PahoClient
from edge_runtime.processing import Question
from edge_runtime.serving.in_flight import Served
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.serving.steps import run_steps

_log = logging.getLogger(__name__)
#: Messages that the broker may have on their way to this worker without PUBACK. No credit scheme: a worker that runs
#: out of room says so by a refusal, not by silence, since a broker parks messages behind a member that is silent.
RECEIVE_MAXIMUM = 1024
#: Nothing else tells the broker to stop dealing requests to a worker whose route has died.
_KEEPALIVE_S = 10
#: Bytes of requests that run and of replies that wait to be sent.
_MAX_HELD_BYTES = 64 << 20
#: A reply does not wait longer than this for a connection, whatever expiry its request claims.
_LONGEST_WAIT_S = 600.0
#: A body up to this size takes less than 2 ms whatever it holds.
_SMALL_BYTES = 16 << 10
_FAREWELL_S = 1.0
_RECHECK_S = 30.0
_COUNTED = (
    "taken",
    "answered",
    "duplicates",
    "busy",
    "dropped",
    "foreign",
    "expired_replies",
    "refused_replies",
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its runner."""

    model: Model
    runner: ModelRunner


@dataclass(slots=True)
class _Taken:
    """A message that was admitted: where its reply goes, until when it is of use (loop time), what it holds."""

    reply_topic: str
    correlation: bytes
    expiry_s: int | None
    until_s: float
    size_bytes: int


class Worker:
    """Serves requests of all devices until `drain`."""

    def __init__(
        self,
        config: CloudConfig,
        password: str,
        models: Mapping[str, Loaded],
        *,
        new_client: NewClient = PahoClient,
    ) -> None:
        self._config = config
        self._models = models
        self._tasks: dict[asyncio.Task[Any], _Taken] = {}
        self._held_bytes = 0
        self._large = asyncio.Lock()  # whose turn it is to decode
        self._duplicates = Duplicates()
        self._unacknowledged: deque[Received] = deque()
        self._checking: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._delivery_problem = ""
        self._reply_problem = ""
        self.counters = dict.fromkeys(_COUNTED, 0)
        worker = worker_id(config)
        self.connection = Connection(
            Broker(
                config.broker,
                worker_client_id(worker),
                config.username,
                password,
                config.ca_file,
                config.cert_file,
                config.key_file,
            ),
            subscriptions=tuple(worker_filter(config.group, name) for name in models),
            state_topic=worker_state_topic(worker),
            on_message=self._on_message,
            on_up=self._on_up,
            on_lost=self._on_lost,
            window=RECEIVE_MAXIMUM,
            keepalive_s=_KEEPALIVE_S,
            new_client=new_client,
        )
        self._check = DeliveryCheck(self.connection, worker, models)

    @property
    def problem(self) -> str:
        """Why no request is served, in words; empty where the worker is ready."""
        return self.connection.last_error or self._delivery_problem or self._reply_problem

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until requests can be served; False if that did not come in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    async def drain(self) -> None:
        """Take no new requests; answer those taken; disconnect. Complete even if it is cancelled."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._config.requests.drain_s
        try:
            while True:
                await self.connection.unsubscribe()
                remaining_s = until_s - loop.time()
                if not self._tasks or remaining_s <= 0:
                    break
                await asyncio.wait(self._tasks, timeout=remaining_s)
            await self._refuse_the_rest()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._checking is not None:
                self._checking.cancel()
            await self.connection.close()

    async def _refuse_the_rest(self) -> None:
        """Tell the senders of what is not answered in time, so that they need not wait for their deadlines."""
        rest = list(self._tasks.items())
        for task, _ in rest:
            task.cancel()
        if not rest:
            return
        _log.warning("event=drain_unfinished requests=%d", len(rest))
        farewells = [self._send(_error(taken, refusal(RefusalKind.DRAINING)), taken) for _, taken in rest]
        tasks = [asyncio.get_running_loop().create_task(one, name="farewell") for one in farewells]
        try:
            await asyncio.wait(tasks, timeout=_FAREWELL_S)
        finally:
            for task in tasks:
                task.cancel()

    def _on_message(self, received: Received) -> None:
        """Admit one message and confirm it; without an await, so that PUBACKs leave in the order of arrival."""
        self._unacknowledged.append(replace(received, message=_NO_MESSAGE))
        self._admit(received.message)
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Confirm what was admitted, in order, while not too many replies wait to be sent."""
        while self._unacknowledged and len(self._tasks) <= self._config.max_in_flight + RECEIVE_MAXIMUM:
            self.connection.acknowledge(self._unacknowledged.popleft())

    def _admit(self, message: Message) -> None:
        if is_worker_check(message.topic):
            self._check.arrived(message.topic)
            return
        try:
            topic = parse_request_topic(message.topic)
        except InvalidRequest:
            self.counters["foreign"] += 1
            return
        if len(self._tasks) > self._config.max_in_flight + 2 * RECEIVE_MAXIMUM:
            self.counters["dropped"] += 1  # the broker ignores Receive Maximum; the edge asks again
            return
        key = key_of(message)
        if self._duplicates.is_running(key):
            self.counters["duplicates"] += 1
            return
        taken = _Taken(
            reply_topic_for(topic),
            message.correlation[:16],
            message.expiry_s,
            asyncio.get_running_loop().time()
            + min(message.expiry_s or self._config.requests.timeout_s, _LONGEST_WAIT_S),
            len(message.payload),
        )
        known = self._duplicates.reply_to(key, time.monotonic_ns())
        if known is not None:
            self.counters["duplicates"] += 1
            self._start(self._send(known, taken), taken)
        elif topic.model not in self._models:
            error = UnknownModel(f"This worker does not serve {topic.model}.")
            self._start(self._send(_error(taken, error), taken), taken)
        elif not self._has_room(taken):
            self.counters["busy"] += 1
            taken.size_bytes = 0
            self._start(self._send(_error(taken, refusal(RefusalKind.FULL)), taken), taken)
        else:
            self.counters["taken"] += 1
            self._duplicates.begin(key)
            self._start(self._serve(message, topic, key, taken), taken)

    def _has_room(self, taken: _Taken) -> bool:
        return (
            len(self._tasks) < self._config.max_in_flight
            and self._held_bytes + taken.size_bytes <= _MAX_HELD_BYTES
        )

    def _start(self, work: Coroutine[Any, Any, Any], taken: _Taken) -> None:
        task = asyncio.get_running_loop().create_task(work, name="request")
        self._tasks[task] = taken
        self._held_bytes += taken.size_bytes
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[Any]") -> None:
        self._held_bytes -= self._tasks.pop(task).size_bytes
        self._acknowledge()

    async def _serve(
        self, message: Message, topic: RequestTopic, key: RequestKey | None, taken: _Taken
    ) -> None:
        final = None
        try:
            reply, is_final = await self._reply(message, topic, taken)
            self._hold(taken, reply.packet_bytes)
            sent = await self._send(reply, taken)
            final = sent if is_final else None
            self.counters["answered"] += 1
        finally:
            self._duplicates.end(key, final, time.monotonic_ns())

    def _hold(self, taken: _Taken, size_bytes: int) -> None:
        """Count the reply in place of the request, which is not needed any more."""
        self._held_bytes += size_bytes - taken.size_bytes
        taken.size_bytes = size_bytes

    async def _send(self, reply: Message, taken: _Taken) -> Message:
        """Publish a reply, on a later connection if need be; return what was published, or would have been."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                code = await self.connection.publish(reply)
                break
            except TooLarge as error:
                reply = _error(taken, error)
            except LinkLost:
                # A reply that is late while there is a connection is sent all the same: it teaches the edge.
                if not await self.connection.wait_connected(taken.until_s - loop.time()):
                    self.counters["expired_replies"] += 1
                    return reply
        is_refused = code != NO_SUBSCRIBERS and classify(code) is not ReasonClass.OK
        self.counters["refused_replies"] += is_refused
        problem = ""
        if is_refused:
            problem = f"the broker refuses replies on {reply.topic}: {in_words(code)}"
        if bool(problem) != bool(self._reply_problem):
            _log.warning("event=%s why=%r", "replies_refused" if problem else "replies_accepted", problem)
        self._reply_problem = problem
        return reply

    async def _reply(self, message: Message, asked: RequestTopic, taken: _Taken) -> tuple[Message, bool]:
        """The reply, and whether the same question would get it again."""
        try:
            body, json_length = await run_steps(oip.encoding_reply(await self._infer(message, asked)))
        except EdgeRuntimeError as error:
            return _error(taken, error), False
        except Exception:  # noqa: BLE001 - a defect of ours ends this request, not the worker; it is logged
            _log.exception("event=request_failed")
            return _error(taken, EdgeRuntimeError("Internal error; the worker's log has the details.")), False
        reply = pack(
            taken.reply_topic,
            body,
            json_length,
            correlation=taken.correlation,
            expiry_s=taken.expiry_s,
            may_compress=reads_zstd(message),
        )
        return reply, True

    async def _infer(self, message: Message, asked: RequestTopic) -> InferReply:
        started_ns = time.monotonic_ns()
        loaded = self._models[asked.model]
        request = await self._decode(message, loaded.model.info.signature)
        deadline_ns = started_ns + _time_limit_ns(request, message, self._config.requests.timeout_s)
        rows = loaded.model.processor.split(request.inputs)
        priority = priority_of(request.parameters.get("priority"))
        answers = await _all_rows(loaded.runner, rows, deadline_ns, asked.tenant, priority)
        total_us = (time.monotonic_ns() - started_ns) // 1000
        model = loaded.model
        return build_reply(
            model.name,
            model.version,
            model.info.signature,
            answers,
            request,
            {"origin": "cloud", "total_us": total_us},
        )

    async def _decode(self, message: Message, signature: Signature) -> InferRequest:
        """Decode a request; large ones one at a time and in steps, so that nobody waits for more than one step.

        A packet of 128 kB may hold 8 MB once it is decompressed. What is decoded goes to the model's queue, which is
        bounded in bytes, before the next is.
        """
        if len(message.payload) <= _SMALL_BYTES and not is_compressed(message):
            return oip.decode_request(*unpack(message), signature)
        async with self._large:
            return await run_steps(oip.decoding_request(*unpack(message), signature))

    def _on_up(self) -> None:
        self._checking = asyncio.get_running_loop().create_task(self._keep_checking(), name="delivery-check")

    def _on_lost(self) -> None:
        self._unacknowledged.clear()  # their packet ids ended with the connection
        self._ready.clear()
        self._delivery_problem = self._reply_problem = ""
        if self._checking is not None:
            self._checking.cancel()

    async def _keep_checking(self) -> None:
        """Check the delivery of requests once, and while it fails again and again: a person may change the rules."""
        while True:
            try:
                problem = await self._check.run()
            except LinkLost:
                return
            if problem != self._delivery_problem:
                _log.warning("event=%s why=%r", "not_ready" if problem else "ready_again", problem)
            self._delivery_problem = problem
            if not problem:
                self._ready.set()
                return
            await asyncio.sleep(_RECHECK_S)


_NO_MESSAGE = Message("", b"")


def _error(taken: _Taken, error: EdgeRuntimeError) -> Message:
    """An error as a message. Refusals carry when to come back, and what the sender did wrong is called invalid."""
    if isinstance(error, Refused):
        retry_after_ms = int(1000 * (error.retry_after_s or 0))
        body = oip.encode_error(str(error), reason=error.kind.value, retry_after_ms=retry_after_ms)
    elif isinstance(error, InvalidRequest):
        body = oip.encode_error(str(error), reason=oip.INVALID)
    else:
        body = oip.encode_error(str(error))
    return pack(taken.reply_topic, body, None, correlation=taken.correlation, expiry_s=taken.expiry_s)


async def _all_rows(
    runner: ModelRunner, rows: list[Question], deadline_ns: int, tenant: str, priority: int
) -> list[Answer]:
    results = await runner.run_rows(
        rows, deadline_ns=deadline_ns, tenant=tenant, priority=priority, is_all_or_nothing=True
    )
    return [result.answer for result in results if isinstance(result, Served)]


def _time_limit_ns(request: InferRequest, message: Message, default_s: float) -> int:
    """How long the sender still waits. Raises Refused where that time has passed."""
    limit_ns = time_limit_ns(request.parameters, expiry_s=message.expiry_s)
    if limit_ns is None:
        return int(default_s * 1e9)
    if limit_ns <= 0:
        raise refusal(RefusalKind.LATE)
    return limit_ns
