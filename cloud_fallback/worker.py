"""The cloud worker: message -> request -> model runner -> reply -> message, with the runners that the edge uses.

A request is acknowledged last, after the broker has confirmed its reply: if the worker dies before that, the broker
redelivers the request. A request that cannot be understood is answered and acknowledged too, or it would be
redelivered for ever.

Interleavings that the code guards against:
- A duplicate arrives while the original runs. It is acknowledged and not run; the original's reply answers both.
- The connection is lost after a reply was computed. The request stays unacknowledged and is redelivered on the next
  connection, where the kept reply answers it without a second run.
- Draining: the broker redelivers and sends the rest of a burst as acknowledgements make room. Draining has ended only
  when an UNSUBSCRIBE round trip has brought nothing new.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cloud_fallback.config import CloudConfig, worker_id
from cloud_fallback.duplicates import Duplicates, RequestKey, key_of
from edge_runtime.core.errors import EdgeRuntimeError, InvalidRequest, RefusalKind, Refused, TooLarge, refusal
from edge_runtime.core.messages import Answer, InferReply, InferRequest
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.mqtt_reasons import ReasonClass, classify, in_words
from edge_runtime.core.protocol.parameters import priority_of, time_limit_ns
from edge_runtime.core.protocol.replies import build_reply
from edge_runtime.core.protocol.topics import (
    RequestTopic,
    parse_request_topic,
    reply_topic_for,
    worker_filter,
    worker_state_topic,
)
from edge_runtime.loading.model import Model
from edge_runtime.mqtt.client import Broker, NewClient
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost, Received
from edge_runtime.mqtt.envelope import Message, pack, reads_zstd, unpack
from edge_runtime.mqtt.paho_adapter import PahoClient
from edge_runtime.processing import Question
from edge_runtime.serving.in_flight import Served
from edge_runtime.serving.model_runner import ModelRunner

_log = logging.getLogger(__name__)
#: A worker that restarts within this time gets what was sent to it and not acknowledged.
_SESSION_EXPIRY_S = 60


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its runner."""

    model: Model
    lane: ModelRunner


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
        self._tasks: set[asyncio.Task[None]] = set()
        self._duplicates = Duplicates()
        self.connection = Connection(
            Broker(
                config.broker,
                worker_id(config),
                config.username,
                password,
                config.ca_file,
                config.cert_file,
                config.key_file,
            ),
            subscriptions=tuple(worker_filter(config.group, name) for name in models),
            state_topic=worker_state_topic(worker_id(config)),
            on_message=self._on_message,
            session_expiry_s=_SESSION_EXPIRY_S,
            max_in_flight=config.max_in_flight,
            new_client=new_client,
        )

    async def drain(self) -> None:
        """Take no new requests; answer and acknowledge those taken; disconnect.

        See the module's text for when that is done.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._config.requests.drain_s
        while True:
            await self.connection.unsubscribe()
            remaining_s = until_s - loop.time()
            if not self._tasks or remaining_s <= 0:
                break
            await asyncio.wait(self._tasks, timeout=remaining_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connection.close()

    def _on_message(self, received: Received) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(received), name="request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, received: Received) -> None:
        message = received.message
        try:
            topic = parse_request_topic(message.topic)
        except InvalidRequest:
            _log.warning("event=foreign_topic")
            self.connection.acknowledge(received)
            return
        key = key_of(message)
        if self._duplicates.is_running(key):
            self.connection.acknowledge(received)
            return
        reply = self._duplicates.reply_to(key)
        if reply is None:
            reply = await self._run(message, topic, key)
        await self._send(reply, received)

    async def _run(self, message: Message, topic: RequestTopic, key: RequestKey | None) -> Message:
        """The reply of a request that is not known yet."""
        self._duplicates.begin(key)
        final = None
        try:
            reply, is_final = await self._reply(message, topic, reply_topic_for(topic))
            final = reply if is_final else None
        finally:
            self._duplicates.end(key, final)
        return reply

    async def _send(self, reply: Message, received: Received) -> None:
        try:
            try:
                code = await self.connection.publish(reply)
            except TooLarge as error:
                small = oip.encode_error(str(error), reason=oip.INVALID)
                reply = pack(reply.topic, small, None, correlation=reply.correlation, expiry_s=None)
                code = await self.connection.publish(reply)
        except LinkLost:
            return  # unacknowledged: the broker redelivers it, and the reply is kept
        if classify(code) is not ReasonClass.OK and code != NO_SUBSCRIBERS:
            _log.warning("event=reply_refused topic=%s why=%r", reply.topic, in_words(code))
        self.connection.acknowledge(received)

    async def _reply(self, message: Message, asked: RequestTopic, topic: str) -> tuple[Message, bool]:
        """The reply, and whether the same question would get it again."""
        body: bytes
        json_length: int | None = None
        is_final = False
        try:
            body, json_length = oip.encode_reply(await self._infer(message, asked))
            is_final = True
        except Refused as refused:
            body = oip.encode_error(
                str(refused),
                reason=refused.kind.value,
                retry_after_ms=int(1000 * (refused.retry_after_s or 0)),
            )
        except InvalidRequest as error:
            body = oip.encode_error(str(error), reason=oip.INVALID)
        except EdgeRuntimeError as error:
            body = oip.encode_error(str(error))
        except Exception:  # noqa: BLE001 - a defect of ours ends this request, not the worker; it is logged
            _log.exception("event=request_failed")
            body = oip.encode_error("Internal error; the worker's log has the details.")
        reply = pack(
            topic,
            body,
            json_length,
            correlation=message.correlation[:16],
            expiry_s=message.expiry_s,
            may_compress=reads_zstd(message),
        )
        return reply, is_final

    async def _infer(self, message: Message, asked: RequestTopic) -> InferReply:
        started_ns = time.monotonic_ns()
        request = oip.decode_request(*unpack(message))
        loaded = self._models[asked.model]
        deadline_ns = started_ns + _time_limit_ns(request, message, self._config.requests.timeout_s)
        rows = loaded.model.processor.split(request.inputs)
        priority = priority_of(request.parameters.get("priority"))
        answers = await _all_rows(loaded.lane, rows, deadline_ns, asked.tenant, priority)
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


async def _all_rows(
    lane: ModelRunner, rows: list[Question], deadline_ns: int, tenant: str, priority: int
) -> list[Answer]:
    results = await lane.run_rows(
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
