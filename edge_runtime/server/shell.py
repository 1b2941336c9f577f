"""One HTTP/1.1 connection: bytes -> requests -> answers in order. Knows no path and no model.

httptools parses; everything it lets pass and should not (it has no limits, allows other transfer codings,
two Hosts, trailers through `on_header`) is refused here. Any parse error ends in one answer and a close.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

import httptools

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.server.answers import HttpAnswer, answer_for, error_answer
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.routes import HttpRequest

_log = logging.getLogger(__name__)


class Rejected(Exception):  # noqa: N818 - carries an answer, not a fault of ours
    """The request is refused before it is complete; the connection closes after the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Door:
    """What all connections of one listener share. `hosts` None: any Host (a Unix socket has no address)."""

    handle: Callable[[HttpRequest], Awaitable[HttpAnswer]]
    limits: HttpLimits
    hosts: frozenset[str] | None
    connections: "set[Connection]"
    max_connections: int
    now: Callable[[], float]


class Connection(asyncio.Protocol):
    """A peer. Its tasks end with it; its answers leave in the order of its requests."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._limits = door.limits
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._pending: deque[asyncio.Task[HttpAnswer]] = deque()
        self._keep: deque[bool] = deque()
        self._is_closing = False
        self._is_write_paused = False
        self._is_lingering = False
        self._is_rejected = False
        self._since = door.now()  # when the present phase (idle, header, body, write) began
        self._reset()

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
            return
        limits = self._limits
        if self._is_write_paused:
            limit = limits.write_s
        elif self._pending:
            return
        elif self._in_body:
            limit = limits.body_s
        else:
            limit = limits.header_s if self._head_bytes else limits.idle_s
        if now - self._since <= limit:
            return
        if self._is_write_paused and self._transport is not None:
            self._transport.abort()
        elif self._head_bytes or self._in_body:
            self._reject(408, "The request did not arrive in time.")
        else:
            self.abort()

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._transport = stream
        if len(self._door.connections) >= self._door.max_connections:
            idle = [peer for peer in self._door.connections if not peer.is_busy]
            if not idle:
                stream.write(error_answer(503, "Too many connections; retry later.").encode(keep_alive=False))
                stream.close()
                return
            oldest = min(idle, key=lambda peer: peer._since)  # noqa: SLF001 - our own class
            self._door.connections.discard(oldest)
            oldest.abort()
        self._door.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._door.connections.discard(self)
        self._is_closing = True
        for task in self._pending:
            task.cancel()
        self._pending.clear()

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._since = self._door.now()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        if not self._head_bytes and not self._in_body:
            self._since = self._door.now()
        was_in_body = self._in_body
        if not was_in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            self._check_framing(len(data) if was_in_body else 0)
        except Rejected as rejected:
            self._reject(rejected.status, str(rejected))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, Rejected):
                self._reject(cause.status, str(cause))
            else:
                _log.error("event=http_callback_failed", exc_info=cause)
                self._reject(500, "Internal error.")
        except httptools.HttpParserUpgrade:
            self._reject(400, "Upgrades are not offered.")
        except httptools.HttpParserError:
            self._reject(400, "This is not well-formed HTTP/1.1.")

    # What the parser tells

    def on_message_begin(self) -> None:
        self._reset()
        self._head_bytes = (
            1  # begun; where in the piece at hand is not known, so that piece counts as nothing
        )
        if len(self._pending) >= self._limits.pipelined:
            raise Rejected(429, f"More than {self._limits.pipelined} requests are pipelined.")

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._limits.line_bytes:
            raise Rejected(414, f"The request line is longer than {self._limits.line_bytes} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            return  # a trailer: never part of what was checked
        self._headers_seen += 1
        if self._headers_seen > self._limits.headers:
            raise Rejected(431, f"More than {self._limits.headers} headers.")
        if len(name) + len(value) > self._limits.one_header_bytes:
            raise Rejected(431, f"A header is longer than {self._limits.one_header_bytes} bytes.")
        key = name.decode("latin-1").lower()
        if key in self._headers and key in (
            "host",
            "origin",
            "transfer-encoding",
            "content-encoding",
            "expect",
        ):
            raise Rejected(400, f"Header {key} is given twice.")
        try:
            self._headers[key] = value.decode("ascii").strip()
        except UnicodeDecodeError:
            raise Rejected(400, "A header holds bytes outside ASCII.") from None

    def on_headers_complete(self) -> None:
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise Rejected(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
        self._check_door(version)
        self._check_body(version)
        self._in_body = True
        self._since = self._door.now()
        if self._headers.get("expect") is not None:
            if self._headers["expect"].lower() != "100-continue":
                raise Rejected(417, "Only Expect: 100-continue is known.")
            if self._transport is not None and not self._pending:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            raise Rejected(413, f"The body is longer than {self._limits.body_bytes} bytes.")
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = HttpRequest(
            self._parser.get_method().decode("ascii"),
            self._url.decode("ascii", "replace"),
            self._headers,
            b"".join(self._body),
        )
        keep_alive = self._parser.should_keep_alive()
        self._reset()
        self._since = self._door.now()
        if self._is_closing:
            return
        if not keep_alive:
            self._is_closing = True
        task = asyncio.get_running_loop().create_task(self._answer(request), name="http-request")
        self._pending.append(task)
        self._keep.append(keep_alive)
        task.add_done_callback(self._flush)

    # The rest is ours

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._headers_seen = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._wire_bytes = 0
        self._in_body = False

    def _check_framing(self, body_wire_bytes: int) -> None:
        """Bound what the parser buffers or skips without telling: endless headers, chunk extensions, tiny chunks."""
        if self._in_body:
            self._wire_bytes += body_wire_bytes
            if self._wire_bytes > self._limits.chunk_overhead_bytes + 2 * self._body_bytes:
                raise Rejected(400, "The chunks carry more framing than data.")
        elif self._head_bytes > self._limits.header_bytes:
            raise Rejected(431, f"The headers are longer than {self._limits.header_bytes} bytes.")

    def _check_door(self, version: str) -> None:
        """A web page must not reach the daemon: Host defeats rebinding, Origin and Sec-Fetch-Site the rest."""
        host = self._headers.get("host")
        if host is None:
            if version == "1.1":
                raise Rejected(400, "The Host header is missing.")
        elif self._door.hosts is not None and _host_name(host) not in self._door.hosts:
            raise Rejected(
                403, "This Host is not served; use localhost, or add the name to [server] allowed_hosts."
            )
        if "origin" in self._headers:
            raise Rejected(403, "Requests from web pages are not served.")
        if "upgrade" in self._headers:
            raise Rejected(400, "Upgrades are not offered.")
        if self._headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Rejected(403, "Requests from web pages are not served.")
        if not self._url.startswith(b"/"):
            raise Rejected(400, "The request target must be a path.")

    def _check_body(self, version: str) -> None:
        coding = self._headers.get("transfer-encoding")
        if coding is not None:
            if version == "1.0":
                raise Rejected(400, "HTTP/1.0 has no Transfer-Encoding.")
            if coding.lower() != "chunked":
                raise Rejected(501, "Only Transfer-Encoding: chunked is offered.")
        length = self._headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 19 or int(length) > self._limits.body_bytes:
            raise Rejected(413, f"The body is longer than {self._limits.body_bytes} bytes.")

    async def _answer(self, request: HttpRequest) -> HttpAnswer:
        try:
            return await self._door.handle(request)
        except EdgeRuntimeError as error:
            return answer_for(error)
        except Exception:  # noqa: BLE001 - a defect of ours must not end the connection; it is logged
            _log.exception("event=request_failed")
            return error_answer(500, "Internal error; the daemon's log tells more.")

    def _flush(self, _: object = None) -> None:
        """Write the answers that are due, in order."""
        transport = self._transport
        if transport is None:
            return
        while self._pending and self._pending[0].done() and not self._is_write_paused:
            task, keep = self._pending.popleft(), self._keep.popleft()
            if task.cancelled():
                continue
            keep = keep and not (self._is_closing and not self._pending)
            transport.write(task.result().encode(keep_alive=keep))
        if not self._pending:
            self._since = self._door.now()
            if self._is_rejected and transport.can_write_eof():
                # Closing with unread bytes resets the connection and may take the answer with it:
                # say the end, swallow what still comes, let the sweep close.
                self._is_lingering = True
                transport.write_eof()
            elif self._is_closing and not self._is_write_paused:
                transport.close()

    def _reject(self, status: int, message: str) -> None:
        """Answer after what is under way, then close: where a request ends is no longer known."""
        self._is_closing = True
        self._is_rejected = True
        self._in_body = False
        self._head_bytes = 0

        async def rejected() -> HttpAnswer:
            return error_answer(status, message)

        self._pending.append(asyncio.get_running_loop().create_task(rejected(), name="http-reject"))
        self._keep.append(False)
        self._pending[-1].add_done_callback(self._flush)


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    if colon and not host.endswith("]") and port.isdecimal():
        host = name
    return host.lower()
