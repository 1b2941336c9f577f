"""The answers of one connection: they leave in the order of the requests, and no faster than the peer reads them."""

import asyncio
from collections import deque

import msgspec
from msgspec.structs import replace

from edge_runtime.server.answers import HttpAnswer
from edge_runtime.server.byte_budget import Lease
from edge_runtime.server.events import RequestHead
from edge_runtime.server.flow_control import WriteFlow


class PendingAnswer(msgspec.Struct, frozen=True):
    """A request that is not answered yet: its task, or for a refusal a future that has its answer."""

    answer: "asyncio.Future[HttpAnswer]"
    keep_alive: bool
    version: str
    is_bodiless: bool
    lease: Lease


class AnswerQueue:
    """One entry for each request in the order of arrival, and what of the last answer has not left yet.

    It owns the leases of its entries. It knows no connection, which would be a reference cycle.
    """

    def __init__(self) -> None:
        self.flow = WriteFlow()
        self._pending: deque[PendingAnswer] = deque()
        self._unsent: list[Lease] = []

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is awaited, or the peer does not read the one before it."""
        return bool(self._pending) or self.flow.is_paused

    @property
    def first_version(self) -> str | None:
        """The HTTP version of the request whose answer is next; None where none is awaited."""
        return self._pending[0].version if self._pending else None

    def add(self, answer: "asyncio.Future[HttpAnswer]", head: RequestHead, lease: Lease) -> None:
        """Take the task that answers a request."""
        is_bodiless = head.method == "HEAD"
        self._pending.append(PendingAnswer(answer, head.keep_alive, head.version, is_bodiless, lease))

    def add_last(self, answer: HttpAnswer, lease: Lease, *, is_bodiless: bool) -> None:
        """Take the answer after which the connection closes."""
        self._pending.append(PendingAnswer(_ready(answer), False, "1.1", is_bodiless, lease))

    def next_due(self) -> PendingAnswer | None:
        """Take out the first entry, if its answer is ready and the one before it has left."""
        if not self._pending or self.flow.is_paused or not self._pending[0].answer.done():
            return None
        return self._pending.popleft()

    def write(self, transport: asyncio.Transport, due: PendingAnswer, *, is_last: bool) -> None:
        """Write what `next_due` returned, and release what the request held, later where the peer does not read it."""
        if not due.answer.cancelled():
            answer = due.answer.result()
            keep_alive = due.keep_alive and not is_last
            transport.write(
                answer.encode(keep_alive=keep_alive, version=due.version, is_bodiless=due.is_bodiless)
            )
        if self.flow.is_paused:  # the transport calls pause_writing within write
            self._unsent.append(due.lease)
        else:
            due.lease.release()

    def sent(self) -> None:
        """Note that everything written has left."""
        for lease in self._unsent:
            lease.release()
        self._unsent.clear()

    def give_up(self, answer: HttpAnswer) -> int:
        """Cancel what is not ready and answer it with `answer`; returns how many these are."""
        waiting = [at for at, pending in enumerate(self._pending) if not pending.answer.done()]
        for at in waiting:
            self._pending[at].answer.cancel()
            self._pending[at] = replace(self._pending[at], answer=_ready(answer))
        return len(waiting)

    def cancel(self) -> None:
        """Cancel and release everything: nobody is there to read it."""
        for pending in self._pending:
            pending.answer.cancel()
            pending.lease.release()
        self._pending.clear()
        self.sent()


def _ready(answer: HttpAnswer) -> "asyncio.Future[HttpAnswer]":
    ready = asyncio.get_running_loop().create_future()
    ready.set_result(answer)
    return ready
