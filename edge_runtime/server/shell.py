"""One HTTP/1.1 connection on asyncio: tasks, the order of answers, writing, time limits. Knows no path and no model.

`http11.py` says what the bytes mean; this file does something about it.

- Each request runs in a task of its own, so that pipelined requests may share a batch. `AnswerQueue` has one entry for
  each in the order of arrival, and only the first may be written: answers leave in the order of their requests
  (RFC 9112, 9.3.2), however they finish.
- A connection owns its tasks. When the peer is gone, `connection_lost` cancels them. A task that is cancelled there may
  have its callback (`_flush`) scheduled already; it finds no transport and writes nothing.
- The peer may end its side and still read (half-close), so the end of its input cancels nothing. A peer that left for
  good looks the same over TCP until something is written to it: `_is_gone` finds out.
- Everything a request holds is in its `Lease`, and every lease is released in one of three places: when its answer has
  left, when the request is refused, and in `connection_lost`.
- After its last answer a connection lingers: it ends its own side, and swallows what still comes. Closing with unread
  bytes would reset the connection, and the reset may overtake the answer (RFC 9112, 9.6).
- Draining (`drain.py`): a request whose first byte came before the drain is answered, a later one refused with 503.
- Nothing here sets a timer for each connection: the listener calls `check_time` on all of them once a second.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from msgspec.structs import replace

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.server.answer_queue import AnswerQueue
from edge_runtime.server.answers import HttpAnswer, answer_for, error_answer, refusal_answer
from edge_runtime.server.byte_budget import ByteBudget, Lease
from edge_runtime.server.connection_table import TOO_MANY, ConnectionTable
from edge_runtime.server.counters import HttpCounters
from edge_runtime.server.drain import Drain
from edge_runtime.server.events import BodyPart, CheckHead, Event, Refusal, RequestEnd, RequestHead
from edge_runtime.server.flow_control import HIGH_MARK_BYTES
from edge_runtime.server.http11 import Http11, State
from edge_runtime.server.incoming import Incoming
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.peer_socket import has_hung_up, unread_bytes, user_of
from edge_runtime.server.routes import HttpRequest, is_health_check
from edge_runtime.server.tenancy import LOCAL, Tenancy

_log = logging.getLogger(__name__)

DRAINING = Refusal(503, "The runtime is shutting down.", "draining", retry_after_s=1.0)
_BUFFER_FULL = Refusal(
    503, "The daemon holds as many bytes as it may ([server] buffer_bytes); retry later.", "buffer", 1.0
)
_NOT_IN_TIME = Refusal(408, "The request did not arrive in time.", "slow")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """What all connections of one listener share."""

    name: str
    handle: Callable[[HttpRequest], Awaitable[HttpAnswer]]
    limits: HttpLimits
    check_head: CheckHead
    tenancy: Tenancy
    budget: ByteBudget
    table: ConnectionTable
    counters: HttpCounters
    now: Callable[[], float]
    next_number: Callable[[], int]
    settled: Callable[[], None]  # called whenever a connection may have nothing left to do


class Connection(asyncio.Protocol):
    """A peer. Its tasks end with it; its answers leave in the order of its requests."""

    def __init__(self, config: ListenerConfig) -> None:
        self._config = config
        self._machine = Http11(config.limits, config.check_head)
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming | None = None
        self._answers = AnswerQueue()
        self._drain = Drain()
        self._is_spare = False  # one too many, as long as no place is free
        self._is_refused = False
        self._is_finished = False  # the last answer was written; lingers, or closes
        self._is_probed = False
        self._ended_at: float | None = None  # when the peer ended its side
        self._flow_id = ""
        self._user: int | None = None
        self.since = config.now()  # when the present phase (idle, head, body, lingering) began

    # What the listener and the table ask

    @property
    def is_settled(self) -> bool:
        """Whether nothing of a request or an answer is left to do. What was written has left for the kernel."""
        is_reading_one = self._machine.state in (State.HEAD, State.BODY) or self._drain.owed_bytes > 0
        is_writing = self._transport is not None and self._transport.get_write_buffer_size() > 0
        return not is_reading_one and not is_writing and not self._answers.is_busy

    def is_idle(self) -> bool:
        """Whether the connection waits for a request of which no byte has arrived, not even in the kernel."""
        return self._machine.state is State.IDLE and self.is_settled and unread_bytes(self._socket()) == 0

    def refuse(self, refusal: Refusal, head: RequestHead | None = None) -> None:
        """Answer with `refusal` after what is under way, then close. `head` is that of the request it answers."""
        if self._is_refused or self._is_finished:
            return
        self._is_refused = True
        for event in self._machine.refuse(refusal):
            refusal = cast(Refusal, event)
        if head is not None:
            refusal = replace(refusal, is_bodiless=head.method == "HEAD")
        self._config.counters.count(refusal.reason)
        self._drain.forgive()
        self._drop_incoming()
        lease = Lease(self._config.budget)  # of nothing: a refusal is small, and memory must not hinder it
        self._answers.add_last(refusal_answer(refusal), lease, is_bodiless=refusal.is_bodiless)
        self._flush()

    def begin_drain(self) -> None:
        """Answer what came before this moment, and refuse what comes after it."""
        machine = self._machine
        unread = unread_bytes(self._socket()) if machine.is_reading else 0
        self._drain.begin(unread, is_reading_one=machine.state is not State.IDLE)
        self._refuse_if_idle()

    def give_up(self) -> None:
        """Answer everything that is not ready with 503."""
        for _ in range(self._answers.give_up(refusal_answer(DRAINING))):
            self._config.counters.count(DRAINING.reason)
        self._drain.forgive()
        if self._machine.state in (State.HEAD, State.BODY):
            self.refuse(DRAINING)
        self._flush()

    def abort(self) -> None:
        """Close now; what was written still leaves."""
        if self._transport is not None:
            self._transport.close()

    def check_time(self, now: float) -> None:
        """Close a peer that is too slow for the phase it is in, or that is gone."""
        transport, limits, flow = self._transport, self._config.limits, self._answers.flow
        if transport is None:
            return
        if flow.is_stalled(now, transport.get_write_buffer_size(), limits.write_s) or self._is_gone(now):
            transport.abort()  # unlike close, this does not wait for the peer to read
        elif flow.is_paused:
            return
        elif self._is_finished:
            if now - self.since > limits.linger_s:
                transport.close()
        elif self._machine.state is State.IDLE:
            if now - self.since > limits.idle_s and self.is_idle():
                self._machine.stop()
                self._finish()
        elif self._machine.is_reading and self._is_late(now):
            self.refuse(_NOT_IN_TIME)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = stream = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        stream.set_write_buffer_limits(high=HIGH_MARK_BYTES, low=0)
        config = self._config
        self._flow_id = f"{config.name}-{config.next_number()}"
        self._user = user_of(self._socket())
        self._is_spare = not config.table.admit(self, config.now())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._is_finished = True
        self._drain.forgive()
        self._machine.stop()
        self._drop_incoming()
        self._answers.cancel()
        self._config.table.lost(self)
        self._config.settled()

    def eof_received(self) -> bool:
        """The peer has ended its side (RFC 9112, 9.6); True keeps ours open for the answers it waits for."""
        self._ended_at = self._config.now()
        if self._is_finished or has_hung_up(self._socket()):
            return False
        self._handle(self._machine.end_of_input())
        self._settle()
        return True

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._answers.flow.pause(self._config.now(), self._transport.get_write_buffer_size())
            if self._ended_at is None and not self._is_finished:
                self._transport.pause_reading()  # a peer that does not read its answers may ask nothing more

    def resume_writing(self) -> None:
        self._answers.flow.resume()
        self._answers.sent()
        if self._transport is not None and self._ended_at is None and not self._is_finished:
            self._transport.resume_reading()
        self._flush()

    def data_received(self, data: bytes) -> None:
        machine = self._machine
        if not machine.is_reading:
            return
        is_between = machine.state is State.IDLE
        if is_between:
            self.since = self._config.now()
        if self._drain.has_begun:
            self._drain.read(len(data), is_between=is_between)
        try:
            events = machine.receive(data)
        except Exception:  # noqa: BLE001 - a defect of ours must end in an answer; it is logged
            _log.exception("event=http_read_failed")
            events = machine.refuse(Refusal(500, "Internal error.", "defect"))
        self._handle(events)
        if self._drain.has_begun:
            self._refuse_if_idle()

    # The rest is ours: reading

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestHead):
                self._begin_request(event)
            elif isinstance(event, BodyPart):
                if self._incoming is not None and not self._incoming.add(event.data):
                    self.refuse(_BUFFER_FULL, self._incoming.head)
            elif isinstance(event, RequestEnd):
                self._start_answer()
            else:
                self.refuse(event)
            if self._is_refused:  # what follows in the same bytes is not taken
                return

    def _begin_request(self, head: RequestHead) -> None:
        tenant = self._check(head)
        if isinstance(tenant, Refusal):
            self.refuse(tenant, head)
            return
        self.since = now = self._config.now()
        self._incoming = Incoming(head, tenant, Lease(self._config.budget), now, head.expects_continue)
        if head.expects_continue and not self._answers:
            self._continue()

    def _check(self, head: RequestHead) -> str | Refusal:
        """The tenant of a request, or why it is refused before its body is read."""
        config = self._config
        if (self._is_spare or not self._drain.owes_present) and not is_health_check(head.target):
            if not self._drain.owes_present:
                return DRAINING
            self._is_spare = not config.table.serve(self)
            if self._is_spare:
                return TOO_MANY
        if head.length and not config.budget.has_room(0, head.length):
            if head.length > config.budget.limit_bytes:
                return Refusal(413, "The body is longer than [server] buffer_bytes.", "too_large")
            return _BUFFER_FULL
        tenancy = config.tenancy
        return LOCAL if tenancy.is_off else tenancy.tenant_of(head.headers, self._user)

    def _continue(self) -> None:
        """Ask for the body (RFC 9110, 10.1.1), unless it comes unasked. Never between two answers."""
        if self._incoming is not None and self._incoming.is_continue_due and self._transport is not None:
            self._incoming.is_continue_due = False
            self._transport.write(_CONTINUE)

    def _start_answer(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        self.since = self._config.now()
        head, lease = incoming.head, incoming.lease
        request = HttpRequest(
            head.method, head.target, head.headers, incoming.body, incoming.tenant, self._flow_id, lease
        )
        task = asyncio.get_running_loop().create_task(self._answer(request), name="http-request")
        self._answers.add(task, head, lease)
        task.add_done_callback(self._flush)

    async def _answer(self, request: HttpRequest) -> HttpAnswer:
        try:
            answer = await self._config.handle(request)
        except EdgeRuntimeError as error:
            answer = answer_for(error)
        except Exception:  # noqa: BLE001 - a defect of ours must not end the connection; it is logged
            _log.exception("event=request_failed")
            answer = error_answer(500, "Internal error; the daemon's log tells more.")
        if not request.lease.resize(len(answer.body)) and self._transport is not None:
            self._config.counters.count(_BUFFER_FULL.reason)
            request.lease.resize(0)
            answer = refusal_answer(_BUFFER_FULL)
        return answer

    def _is_late(self, now: float) -> bool:
        """Whether the request that is being read takes too long."""
        limits = self._config.limits
        if self._incoming is None:
            return now - self.since > limits.header_s
        return now - self.since > limits.body_s or self._incoming.is_stalled(now, limits.body_stall_s)

    def _is_gone(self, now: float) -> bool:
        """Whether a peer that ended its side does not read either, so that its requests are not worth the work.

        TCP tells only when something is written: after a second an interim answer is, which every client skips
        (RFC 9110, 15.2). Where it meets a closed socket, the next look finds the connection reset.
        """
        if self._ended_at is None or self._transport is None:
            return False
        if has_hung_up(self._socket()):
            return True
        is_due = not self._is_probed and now - self._ended_at > 1.0 and not self._answers.flow.is_paused
        if is_due and self._answers.first_version == "1.1":
            self._is_probed = True
            self._transport.write(_CONTINUE)
        return False

    # The rest is ours: writing, and what comes after it

    def _flush(self, _: object = None) -> None:
        """Write the answers that are due, in order."""
        transport, answers = self._transport, self._answers
        if transport is None:
            return
        machine = self._machine
        while (due := answers.next_due()) is not None:
            machine.answered()
            is_last = not answers and self._takes_no_more()
            if is_last:
                machine.stop()
            answers.write(transport, due, is_last=is_last)
        self._settle()

    def _takes_no_more(self) -> bool:
        """Whether no request may follow those that are complete."""
        machine = self._machine
        if not self._drain.has_begun:
            return not machine.is_reading
        return not machine.is_reading or (machine.state is State.IDLE and not self._drain.owes_more)

    def _settle(self) -> None:
        """Go on to what is next once no answer is under way."""
        if self._answers.is_busy:
            return
        if not self._machine.is_reading:
            self._finish()
        elif self._machine.state is State.IDLE:
            self.since = self._config.now()
        else:
            self._continue()
        if self._drain.has_begun:
            self._refuse_if_idle()
            self._config.settled()

    def _refuse_if_idle(self) -> None:
        """Say that the daemon drains, where no request is left to be answered."""
        if self._machine.is_reading and self.is_settled:
            self.refuse(DRAINING)

    def _finish(self) -> None:
        """End our side; linger for the peer's end, or close where it has come."""
        transport = self._transport
        if transport is None or self._is_finished:
            return
        self._is_finished = True
        self.since = self._config.now()
        self._config.table.ending(self)
        try:
            if self._ended_at is None and transport.can_write_eof():
                transport.write_eof()
                return
        except OSError:  # the peer has reset the connection, and asyncio does not know it yet
            pass
        transport.close()

    def _drop_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.lease.release()
            self._incoming = None

    def _socket(self) -> object:
        return None if self._transport is None else self._transport.get_extra_info("socket")
