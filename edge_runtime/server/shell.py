"""One HTTP/1.1 connection on asyncio: tasks, the order of answers, writing, time limits. Knows no path and no model.

`http11.py` says what the bytes mean; this file does something about it.

- Each request runs in a task of its own, so that pipelined requests may share a batch. `_pending` holds one entry for
  each request in the order of arrival, and only the first may be written: answers leave in the order of their requests
  (RFC 9112, 9.3.2), however they finish.
- A connection owns its tasks. When the peer is gone, `connection_lost` cancels them. A task that is cancelled there may
  have its callback (`_flush`) scheduled already; it finds `_pending` empty and writes nothing.
- After a refusal the connection lingers: it says the end of its own side, and swallows what still comes. Closing with
  unread bytes would reset the connection, and the reset may overtake the answer (RFC 9112, 9.6).
- Nothing here sets a timer for each connection: the listener calls `check_time` on all of them once a second.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.server.answers import HttpAnswer, answer_for, error_answer
from edge_runtime.server.flow_control import WriteFlow
from edge_runtime.server.http11 import (
    BodyPart,
    CheckHead,
    Event,
    Http11,
    RequestEnd,
    RequestHead,
    State,
)
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.routes import HttpRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """What all connections of one listener share."""

    handle: Callable[[HttpRequest], Awaitable[HttpAnswer]]
    limits: HttpLimits
    check_head: CheckHead
    connections: "set[Connection]"
    max_connections: int
    now: Callable[[], float]


class _Pending(NamedTuple):
    """A request that is not answered yet: its task, or for a refusal a future that has its answer."""

    answer: "asyncio.Future[HttpAnswer]"
    keep_alive: bool


class Connection(asyncio.Protocol):
    """A peer. Its tasks end with it; its answers leave in the order of its requests."""

    def __init__(self, config: ListenerConfig) -> None:
        self._config = config
        self._machine = Http11(config.limits, config.check_head)
        self._transport: asyncio.Transport | None = None
        self._flow = WriteFlow()
        self._head: RequestHead | None = None
        self._body: list[bytes] = []
        self._pending: deque[_Pending] = deque()
        self._is_closing = False  # take no further request; close after the answers under way
        self._is_lingering = False
        self._is_refused = False
        self.since = config.now()  # when the present phase (idle, head, body) began

    # What the listener asks

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return bool(self._pending)

    def close_when_idle(self) -> None:
        """Take no further request; close after the answers under way."""
        self._is_closing = True
        if not self._pending:
            self.abort()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.close()

    def check_time(self, now: float) -> None:
        """Close a peer that is too slow for the phase it is in."""
        if self._is_lingering:
            self.abort()
        elif self._flow.is_paused:
            if self._flow.is_stalled(now, self._config.limits.write_s) and self._transport is not None:
                self._transport.abort()  # unlike close, this does not wait for the peer to read
        elif not self._pending and now - self.since > self._phase_limit_s():
            if self._machine.state is State.IDLE:
                self.abort()
            else:
                self._handle(self._machine.refuse(408, "The request did not arrive in time."))

    def _phase_limit_s(self) -> float:
        limits = self._config.limits
        match self._machine.state:
            case State.HEAD:
                return limits.header_s
            case State.BODY:
                return limits.body_s
        return limits.idle_s

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._transport = stream
        connections = self._config.connections
        if len(connections) >= self._config.max_connections:
            idle = [peer for peer in connections if not peer.is_busy]
            if not idle:
                stream.write(error_answer(503, "Too many connections; retry later.").encode(keep_alive=False))
                stream.close()
                return
            oldest = min(idle, key=lambda peer: peer.since)
            connections.discard(oldest)
            oldest.abort()
        connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._config.connections.discard(self)
        self._is_closing = True
        for pending in self._pending:
            pending.answer.cancel()
        self._pending.clear()

    def pause_writing(self) -> None:
        self._flow.pause(self._config.now())

    def resume_writing(self) -> None:
        self._flow.resume()
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        if self._machine.state is State.IDLE:
            self.since = self._config.now()
        try:
            events = self._machine.receive(data)
        except Exception:  # noqa: BLE001 - a defect of ours must end in an answer; it is logged
            _log.exception("event=http_read_failed")
            events = self._machine.refuse(500, "Internal error.")
        self._handle(events)

    # The rest is ours

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestHead):
                self._begin_body(event)
            elif isinstance(event, BodyPart):
                self._body.append(event.data)
            elif isinstance(event, RequestEnd):
                self._start_answer()
            else:
                self._refuse(error_answer(event.status, event.message))

    def _begin_body(self, head: RequestHead) -> None:
        self._head = head
        self._body = []
        self.since = self._config.now()
        # A 100 must not come between the answers to earlier requests.
        if head.expects_continue and self._transport is not None and not self._pending:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _start_answer(self) -> None:
        head, self._head = self._head, None
        body, self._body = b"".join(self._body), []
        self.since = self._config.now()
        if head is None or self._is_closing:
            return
        if not head.keep_alive:
            self._is_closing = True
        request = HttpRequest(head.method, head.target, head.headers, body)
        task = asyncio.get_running_loop().create_task(self._answer(request), name="http-request")
        self._pending.append(_Pending(task, head.keep_alive))
        task.add_done_callback(self._flush)

    async def _answer(self, request: HttpRequest) -> HttpAnswer:
        try:
            return await self._config.handle(request)
        except EdgeRuntimeError as error:
            return answer_for(error)
        except Exception:  # noqa: BLE001 - a defect of ours must not end the connection; it is logged
            _log.exception("event=request_failed")
            return error_answer(500, "Internal error; the daemon's log tells more.")

    def _refuse(self, answer: HttpAnswer) -> None:
        """Answer after what is under way, then close."""
        self._is_closing = True
        self._is_refused = True
        self._head, self._body = None, []
        refused = asyncio.get_running_loop().create_future()
        refused.set_result(answer)
        self._pending.append(_Pending(refused, keep_alive=False))
        self._flush()

    def _flush(self, _: object = None) -> None:
        """Write the answers that are due, in order."""
        transport = self._transport
        if transport is None:
            return
        pending = self._pending
        while pending and pending[0].answer.done() and not self._flow.is_paused:
            answer, keep_alive = pending.popleft()
            self._machine.answered()
            if not answer.cancelled():
                is_last = self._is_closing and not pending
                transport.write(answer.result().encode(keep_alive=keep_alive and not is_last))
        if pending:
            return
        self.since = self._config.now()
        if self._is_refused and transport.can_write_eof():
            self._is_lingering = True
            transport.write_eof()
        elif self._is_closing and not self._flow.is_paused:
            transport.close()
