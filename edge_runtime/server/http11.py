"""HTTP/1.1 as a machine: bytes of one connection in, events out. No socket, no clock, no task.

Theory of operation
===================

`Http11.receive(data)` returns what the bytes mean, as a list of events. For each request these are one
`RequestHead`, any number of `BodyPart`, and one `RequestEnd`. A test feeds bytes and compares lists, so a malformed
request needs neither a listener nor a model. Whatever has time or order in it (timers, tasks, the order of answers,
writing) is in `shell.py`.

Rule 1: whatever decides where a message begins and ends is in this file. `TRANSITIONS` says which part of a message
may follow which, and `body_framing` says how long a body is. Request smuggling is a disagreement of two parties
about these two, so both can be read beside RFC 9112.

Rule 2: this file knows no path, no model and no local policy. What a daemon on a device refuses beyond the standard
(requests that a web page sends) is a function that the machine is given as `check_head`.

The tokeniser
-------------

httptools (llhttp) cuts the bytes into tokens. It refuses by itself: Content-Length beside Transfer-Encoding, a
Content-Length given twice, folded header lines, bare LF or CR, space before the colon, NUL. It lets pass, and
`_Reader` refuses or drops: a request line, a header or a number of headers of any size, transfer codings other than
`chunked`, Transfer-Encoding in HTTP/1.0, no Host or two, versions 0.9 and 2.0, trailers (which arrive through the same
callback as headers), and any amount of chunk framing around little data.

llhttp calls back without saying where in the bytes a token lies, and it keeps an unfinished header to itself. So bytes
are fed in slices of at most 16 KiB. A slice counts as hidden bytes of a header section or of a chunked body only if the
section was open before the slice and is still open after it. The limits on hidden bytes are therefore exact to one slice,
and no byte of one message is ever counted against another.

Errors
------

An error is an event and a state, not an exception. One `Refusal` ends the events of a connection; the state is then
ERROR for good and further bytes are dropped, because nobody knows where the next request would begin. The shell
answers the requests before it, then the refusal, then closes.

WARNING: reference cycles
-------------------------

The parser refers to the bound methods of `_Reader`. If the reader also kept the parser, each connection would be a
reference cycle, and the body of an upload that was given up would stay in memory until the garbage collector runs; the
daemon tells the collector to run rarely. So the reader knows the parser only while `receive` runs. For the same reason
no callback raises: a traceback refers to the frames that refer to the body.
"""

from collections.abc import Callable
from enum import Enum

import httptools
import msgspec

from edge_runtime.server.limits import HttpLimits


class State(Enum):
    """Which part of a message the next byte belongs to."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    DONE = "done"
    ERROR = "error"

    __hash__ = (
        object.__hash__
    )  # by identity; the one of Enum is written in Python, and each request pays it six times


class Step(Enum):
    """What moves the machine from one state to the next."""

    BEGIN = "first byte of a request line"
    HEAD_END = "empty line after the headers"
    END = "last byte of a message"
    LAST_END = "last byte of a message whose connection does not persist"
    REFUSE = "anything that is refused"

    __hash__ = object.__hash__


# Bare names: to read a member through its class takes as long as a dictionary look-up.
IDLE, HEAD, BODY, DONE, ERROR = State
BEGIN, HEAD_END, END, LAST_END, REFUSE = Step

#: The sections are those of RFC 9112. A step that is missing here cannot happen; to take it is a defect.
TRANSITIONS: dict[State, dict[Step, State]] = {
    # Between messages; empty lines before a request line are skipped (2.2).
    IDLE: {BEGIN: HEAD, REFUSE: ERROR},
    # Request line (3) and field lines (5).
    HEAD: {HEAD_END: BODY, REFUSE: ERROR},
    # Message body (6), with the trailer section of a chunked one (7.1.2). A message without a body passes through.
    BODY: {END: IDLE, LAST_END: DONE, REFUSE: ERROR},
    # After the last request: what still arrives is not processed (9.6).
    DONE: {},
    # After a refusal: where a request begins is unknown (2.2, 6.3).
    ERROR: {},
}


class RequestHead(msgspec.Struct, frozen=True):
    """Request line and headers. Header names are lower case, values stripped; `length` None means chunked."""

    method: str
    target: str
    version: str
    headers: dict[str, str]
    length: int | None
    keep_alive: bool
    expects_continue: bool


class BodyPart(msgspec.Struct, frozen=True):
    """Some bytes of the body, without their chunk framing."""

    data: bytes


class RequestEnd(msgspec.Struct, frozen=True):
    """The request is complete."""


class Refusal(msgspec.Struct, frozen=True):
    """The connection cannot go on: answer with `status` and one sentence, then close."""

    status: int
    message: str


Event = RequestHead | BodyPart | RequestEnd | Refusal
#: Local policy: None lets a head pass.
CheckHead = Callable[[RequestHead], Refusal | None]

_REQUEST_END = RequestEnd()
_SLICE_BYTES = 16 << 10
#: Headers that are read here or in the routes, and whose second value would contradict the first.
_ONCE = frozenset({"host", "origin", "transfer-encoding", "content-encoding", "expect"})


def body_framing(version: str, headers: dict[str, str], body_limit: int) -> int | Refusal | None:
    """How the end of a request's body is found: its length in bytes, None for chunked, or a refusal.

    Sections of RFC 9112. llhttp has already refused Transfer-Encoding beside Content-Length (6.1, 6.3 item 3) and a
    Content-Length that is repeated or not a number (6.3 item 5).
    """
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if version == "1.0":  # 6.1: the framing is faulty, whatever the header says
            return Refusal(400, "HTTP/1.0 has no Transfer-Encoding.")
        if coding.lower() != "chunked":  # 6.1: a coding that is not understood is answered with 501
            return Refusal(501, "Only Transfer-Encoding: chunked is offered.")
        return None  # 6.3 item 4
    length = headers.get("content-length", "0")  # 6.3 items 6 and 7: without either header there is no body
    if not length.isdecimal() or len(length) > 19 or int(length) > body_limit:
        return Refusal(413, f"The body is longer than {body_limit} bytes.")
    return int(length)


class Http11:
    """The machine of one connection."""

    def __init__(self, limits: HttpLimits, check_head: CheckHead) -> None:
        self._reader = _Reader(limits, check_head)
        self._parser = httptools.HttpRequestParser(self._reader)

    @property
    def state(self) -> State:
        """Where in a message the connection is."""
        return self._reader.state

    def receive(self, data: bytes) -> list[Event]:
        """Read what the peer sent. Returns no event and keeps nothing once the state is DONE or ERROR."""
        reader = self._reader
        reader.parser = self._parser
        try:
            if len(data) <= _SLICE_BYTES:
                self._feed(data)
            else:
                view, at = memoryview(data), 0
                while at < len(data) and reader.is_reading:
                    end = at + reader.slice_bytes(len(data) - at)
                    self._feed(view[at:end])
                    at = end
        finally:
            reader.parser = None
        return reader.take_events()

    def refuse(self, status: int, message: str) -> list[Event]:
        """End the connection for a reason that only the shell knows, such as time."""
        self._reader.refuse(status, message)
        return self._reader.take_events()

    def answered(self) -> None:
        """Note that one complete request was answered, which makes room for another pipelined one."""
        self._reader.unanswered -= 1

    def _feed(self, piece: bytes | memoryview) -> None:
        reader = self._reader
        if not reader.is_reading:
            return
        before = reader.steps
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # a defect of ours, not of the peer's bytes
        except httptools.HttpParserUpgrade:
            reader.refuse(400, "Upgrades are not offered.")
        except httptools.HttpParserError:
            reader.refuse(400, "This is not well-formed HTTP/1.1.")
        if reader.steps == before:
            reader.count_hidden(len(piece))


class _Reader:
    """What httptools calls; turns tokens into events and counts them against the limits."""

    def __init__(self, limits: HttpLimits, check_head: CheckHead) -> None:
        self._limits = limits
        self._check_head = check_head
        self.parser: httptools.HttpRequestParser | None = None  # set while `Http11.receive` runs
        self.state = IDLE
        self.is_reading = True  # further bytes mean something
        self.steps = 0  # taken so far: equal before and after some bytes, these lie within one section
        self.unanswered = 0
        self._events: list[Event] = []
        self._length: int | None = 0
        self._reset()

    def take_events(self) -> list[Event]:
        """Return what was read since the last call."""
        events, self._events = self._events, []
        return events

    def slice_bytes(self, available: int) -> int:
        """How much to feed at once: a body of known length to its end, anything else in slices."""
        if self.state is BODY and self._length is not None:
            return min(available, max(1, self._length - self._body_bytes))
        return min(available, _SLICE_BYTES)

    def refuse(self, status: int, message: str) -> None:
        """End the events, unless they have ended."""
        if self.is_reading:
            self._take(REFUSE)
            self._events.append(Refusal(status, message))

    def count_hidden(self, size: int) -> None:
        """Count bytes between which no section began or ended: llhttp buffers or skips them without a word."""
        self._hidden_bytes += size
        if self.state is HEAD and self._hidden_bytes > self._limits.header_bytes:
            self._refuse_headers()
            return
        # Chunk extensions, leading zeros, chunks of one byte, trailers: one law bounds them all.
        most = self._limits.chunk_overhead_bytes + 2 * self._body_bytes
        if self.state is BODY and self._length is None and self._hidden_bytes > most:
            self.refuse(400, "The chunks carry more framing than data.")

    # What httptools calls

    def on_message_begin(self) -> None:
        if not self.is_reading:
            return
        self._reset()
        self._take(BEGIN)
        if self.unanswered >= self._limits.pipelined:
            self.refuse(429, f"More than {self._limits.pipelined} requests are pipelined.")

    def on_url(self, url: bytes) -> None:
        self._target += url  # called once for each slice that holds a part of it
        self._head_bytes += len(url)
        if len(self._target) > self._limits.line_bytes:
            self.refuse(414, f"The request line is longer than {self._limits.line_bytes} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is not HEAD:
            return  # a trailer, which was no part of what was checked, or after a refusal
        limits, headers = self._limits, self._headers
        size = len(name) + len(value)
        self._header_count += 1
        self._head_bytes += size + 4  # colon, space, CR, LF
        if self._header_count > limits.headers:
            self.refuse(431, f"More than {limits.headers} headers.")
        if size > limits.one_header_bytes:
            self.refuse(431, f"A header is longer than {limits.one_header_bytes} bytes.")
        if self._head_bytes > limits.header_bytes:
            self._refuse_headers()
        key = name.decode("latin-1").lower()
        if key in headers and key in _ONCE:
            self.refuse(400, f"Header {key} is given twice.")
        if not value.isascii():
            self.refuse(400, "A header holds bytes outside ASCII.")
        headers[key] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        if self.state is not HEAD or self.parser is None:
            return
        head = self._read_head(self.parser)
        if isinstance(head, Refusal):
            self.refuse(head.status, head.message)
            return
        self._length = head.length
        self._keep_alive = head.keep_alive
        self._hidden_bytes = 0
        self._take(HEAD_END)
        self._events.append(head)

    def on_body(self, body: bytes) -> None:
        if self.state is not BODY:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self.refuse(413, f"The body is longer than {self._limits.body_bytes} bytes.")
        else:
            self._events.append(BodyPart(body))

    def on_message_complete(self) -> None:
        if self.state is not BODY:
            return
        self._take(END if self._keep_alive else LAST_END)
        self.unanswered += 1
        self._events.append(_REQUEST_END)

    # The rest is ours

    def _reset(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._head_bytes = 0
        self._hidden_bytes = 0
        self._length = 0
        self._body_bytes = 0
        self._keep_alive = True

    def _take(self, step: Step) -> None:
        self.state = state = TRANSITIONS[self.state][step]
        self.is_reading = state is not DONE and state is not ERROR
        self.steps += 1

    def _refuse_headers(self) -> None:
        self.refuse(431, f"The headers are longer than {self._limits.header_bytes} bytes.")

    def _read_head(self, parser: httptools.HttpRequestParser) -> RequestHead | Refusal:
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return Refusal(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
        if version == "1.1" and "host" not in self._headers:  # RFC 9112, 3.2
            return Refusal(400, "The Host header is missing.")
        length = body_framing(version, self._headers, self._limits.body_bytes)
        expect = self._headers.get("expect")
        head = RequestHead(
            parser.get_method().decode("ascii"),
            self._target.decode("ascii", "replace"),
            version,
            self._headers,
            None if isinstance(length, Refusal) else length,
            parser.should_keep_alive(),
            expect is not None,
        )
        refusal = self._check_head(head)
        if refusal is not None:
            return refusal
        if isinstance(length, Refusal):
            return length
        if expect is not None and expect.lower() != "100-continue":  # RFC 9110, 10.1.1
            return Refusal(417, "Only Expect: 100-continue is known.")
        return head
