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
callback as headers), and any amount of chunk framing around little data. It stops at an offer to upgrade the protocol,
which a server may ignore; `_ignore_upgrade` says how reading goes on.

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

from enum import Enum

import httptools
import msgspec

from edge_runtime.server.events import BodyPart, CheckHead, Event, Refusal, RequestEnd, RequestHead
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
    STOP = "no further request: the peer has ended its side, or the daemon wants none"
    REFUSE = "anything that is refused"

    __hash__ = object.__hash__


# Bare names: to read a member through its class takes as long as a dictionary look-up.
IDLE, HEAD, BODY, DONE, ERROR = State
BEGIN, HEAD_END, END, LAST_END, STOP, REFUSE = Step

#: The sections are those of RFC 9112. A step that is missing here cannot happen; to take it is a defect.
TRANSITIONS: dict[State, dict[Step, State]] = {
    # Between messages; empty lines before a request line are skipped (2.2).
    IDLE: {BEGIN: HEAD, STOP: DONE, REFUSE: ERROR},
    # Request line (3) and field lines (5). Input that ends here or in the body ends an incomplete message (8).
    HEAD: {HEAD_END: BODY, REFUSE: ERROR},
    # Message body (6), with the trailer section of a chunked one (7.1.2). A message without a body passes through.
    BODY: {END: IDLE, LAST_END: DONE, REFUSE: ERROR},
    # After the last request: what still arrives is not processed (9.6).
    DONE: {},
    # After a refusal: where a request begins is unknown (2.2, 6.3).
    ERROR: {},
}


_REQUEST_END = RequestEnd()
_SLICE_BYTES = 16 << 10
#: Headers that say where the message goes or ends, and whose second value would contradict the first.
_ONCE = frozenset(
    {
        "host",
        "origin",
        "transfer-encoding",
        "content-encoding",
        "expect",
        "inference-header-content-length",
    }
)


def body_framing(version: str, headers: dict[str, str], body_limit: int) -> int | Refusal | None:
    """How the end of a request's body is found: its length in bytes, None for chunked, or a refusal.

    Sections of RFC 9112. llhttp has already refused Transfer-Encoding beside Content-Length (6.1, 6.3 item 3) and a
    Content-Length that is repeated or not a number (6.3 item 5). How the end of an answer is found is decided in
    `answers.py`: each has a Content-Length, and an answer to HEAD has no body whatever that says (6.3 item 1).
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
        return Refusal(
            413, f"The body is longer than {body_limit} bytes ([server] max_body_bytes).", "too_large"
        )
    return int(length)


def read_head(
    parser: httptools.HttpRequestParser, target: bytes, headers: dict[str, str], limits: HttpLimits
) -> RequestHead | Refusal:
    """Request line and headers as one value, once all of them were read."""
    version = parser.get_http_version()
    if version not in ("1.0", "1.1"):
        return Refusal(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    if version == "1.1" and "host" not in headers:  # RFC 9112, 3.2
        return Refusal(400, "The Host header is missing.")
    path = target.decode("ascii", "replace")
    if (
        path[:7].lower() == "http://"
    ):  # absolute form: its authority counts, not the Host header (RFC 9112, 3.2.2)
        authority, slash, path = path[7:].partition("/")
        path = slash + path or "/"
        headers["host"] = authority.partition("?")[0]
    if not path.startswith("/") and (path, parser.get_method()) != ("*", b"OPTIONS"):  # RFC 9112, 3.2
        return Refusal(400, "The request target must be a path.")
    length = body_framing(version, headers, limits.body_bytes)
    if isinstance(length, Refusal):
        return length
    expect = (
        headers.get("expect") if version == "1.1" else None
    )  # RFC 9110, 10.1.1: not of a client of HTTP/1.0
    if expect is not None and expect.lower() != "100-continue":
        return Refusal(417, "Only Expect: 100-continue is known.")
    method = parser.get_method().decode("ascii")
    keep_alive = parser.should_keep_alive()  # RFC 9112, 9.3
    return RequestHead(method, path, version, headers, length, keep_alive, expect is not None and length != 0)


class Http11:
    """The machine of one connection."""

    def __init__(self, limits: HttpLimits, check_head: CheckHead) -> None:
        self._reader = _Reader(limits, check_head)
        self._parser = httptools.HttpRequestParser(self._reader)

    @property
    def state(self) -> State:
        """Where in a message the connection is."""
        return self._reader.state

    @property
    def is_reading(self) -> bool:
        """Whether further bytes mean anything."""
        return self._reader.is_reading

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

    def end_of_input(self) -> list[Event]:
        """Note that the peer sends nothing more; it may still read. An unfinished request is refused (RFC 9112, 8)."""
        if self._reader.state in (HEAD, BODY):
            return self.refuse(Refusal(400, "The request ended before it was complete."))
        self.stop()
        return []

    def stop(self) -> None:
        """Take no request after the one that is being read, if there is one."""
        self._reader.stop()

    def refuse(self, refusal: Refusal) -> list[Event]:
        """End the connection for a reason that only the shell knows, such as time or memory."""
        self._reader.refuse(refusal)
        return self._reader.take_events()

    def answered(self) -> None:
        """Note that one complete request was answered, which makes room for another pipelined one."""
        self._reader.unanswered -= 1

    def _feed(self, piece: bytes | memoryview) -> None:
        reader = self._reader
        if not reader.is_reading:
            return
        before, rest_at = reader.steps, 0
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # a defect of ours, not of the peer's bytes
        except httptools.HttpParserUpgrade as upgrade:
            rest_at = upgrade.args[0]
        except httptools.HttpParserError:
            reader.refuse(Refusal(400, "This is not well-formed HTTP/1.1."))
        if rest_at and reader.is_reading:
            self._ignore_upgrade()
            if rest_at < len(piece):
                self._feed(piece[rest_at:])
        elif reader.steps == before:
            reader.count_hidden(len(piece))

    def _ignore_upgrade(self) -> None:
        """Go on in HTTP/1.1 after a head that offers another protocol, which a server may ignore (RFC 9110, 7.8).

        llhttp takes what follows such a head for the other protocol. A new parser, fed with a head that announces the
        same body and no upgrade, reads it as HTTP.
        """
        length = self._reader.length
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self._parser = self._reader.parser = httptools.HttpRequestParser(self._reader)
        self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")


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
        self.length: int | None = 0  # of the body; None: chunked
        self._is_last = False  # no request is taken after the present one
        self._events: list[Event] = []
        self._reset()

    def take_events(self) -> list[Event]:
        """Return what was read since the last call."""
        events, self._events = self._events, []
        return events

    def slice_bytes(self, available: int) -> int:
        """How much to feed at once: a body of known length to its end, anything else in slices."""
        if self.state is BODY and self.length is not None:
            return min(available, max(1, self.length - self._body_bytes))
        return min(available, _SLICE_BYTES)

    def stop(self) -> None:
        """Be done after the present request."""
        self._is_last = True
        if self.state is IDLE:
            self._take(STOP)

    def refuse(self, refusal: Refusal) -> None:
        """End the events, unless they have ended."""
        if self.is_reading:
            self._take(REFUSE)
            self._events.append(msgspec.structs.replace(refusal, is_bodiless=self._is_head_request))

    def count_hidden(self, size: int) -> None:
        """Count bytes between which no section began or ended: llhttp buffers or skips them without a word."""
        self._hidden_bytes += size
        hidden, limits = self._hidden_bytes, self._limits
        if self.state is IDLE and hidden > limits.line_bytes:
            self.refuse(Refusal(400, "There is no request after many empty lines."))
        elif self.state is HEAD and hidden > limits.header_bytes:
            self._refuse_headers()
        elif (
            # Chunk extensions, leading zeros, chunks of one byte, trailers: one law bounds them all.
            self.state is BODY
            and self.length is None
            and hidden > limits.chunk_overhead_bytes + 2 * self._body_bytes
        ):
            self.refuse(Refusal(400, "The chunks carry more framing than data."))

    # What httptools calls

    def on_message_begin(self) -> None:
        if self.state is not IDLE:
            return  # after a refusal, or the head that stands for an ignored upgrade
        self._reset()
        self._take(BEGIN)
        if self.unanswered >= self._limits.pipelined:
            self.refuse(
                Refusal(
                    429,
                    f"More than {self._limits.pipelined} requests are pipelined ([server] max_pipelined).",
                    "pipelined",
                    1.0,
                )
            )

    def on_url(self, url: bytes) -> None:
        if self.state is not HEAD:
            return
        self._target += url  # called once for each slice that holds a part of it
        self._head_bytes += len(url)
        self._is_head_request = self.parser is not None and self.parser.get_method() == b"HEAD"
        if len(self._target) > self._limits.line_bytes:
            self.refuse(Refusal(414, f"The request line is longer than {self._limits.line_bytes} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is not HEAD:
            return  # a trailer, which was no part of what was checked, or after a refusal
        limits, headers = self._limits, self._headers
        size = len(name) + len(value)
        self._header_count += 1
        self._head_bytes += size + 4  # colon, space, CR, LF
        if self._header_count > limits.headers:
            self.refuse(Refusal(431, f"More than {limits.headers} headers."))
        if size > limits.one_header_bytes:
            self.refuse(Refusal(431, f"A header is longer than {limits.one_header_bytes} bytes."))
        if self._head_bytes > limits.header_bytes:
            self._refuse_headers()
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip(
            " \t"
        )  # bytes above ASCII have no meaning, but are allowed (RFC 9110, 5.5)
        if key in headers:
            if key in _ONCE:
                self.refuse(Refusal(400, f"Header {key} is given twice."))
            text = f"{headers[key]}, {text}"
        headers[key] = text

    def on_headers_complete(self) -> None:
        if self.state is not HEAD or self.parser is None:
            return
        head = read_head(self.parser, self._target, self._headers, self._limits)
        refusal = head if isinstance(head, Refusal) else self._check_head(head)
        if isinstance(head, Refusal) or refusal is not None:
            if refusal is not None:
                self.refuse(refusal)
            return
        self.length = head.length
        self._is_last = self._is_last or not head.keep_alive
        self._skips_end = self.parser.should_upgrade()
        self._hidden_bytes = 0
        self._take(HEAD_END)
        self._events.append(head)

    def on_body(self, body: bytes) -> None:
        if self.state is not BODY:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self.refuse(
                Refusal(
                    413,
                    f"The body is longer than {self._limits.body_bytes} bytes ([server] max_body_bytes).",
                    "too_large",
                )
            )
        else:
            self._events.append(BodyPart(body))

    def on_message_complete(self) -> None:
        if self.state is not BODY:
            return
        if self._skips_end:  # llhttp ends a message at the head that offers an upgrade; its body follows
            self._skips_end = False
            return
        self._take(LAST_END if self._is_last else END)
        self._hidden_bytes = 0
        self.unanswered += 1
        self._events.append(_REQUEST_END)

    # The rest is ours

    def _reset(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._head_bytes = 0
        self._hidden_bytes = 0
        self._body_bytes = 0
        self._is_head_request = False
        self._skips_end = False

    def _take(self, step: Step) -> None:
        self.state = state = TRANSITIONS[self.state][step]
        self.is_reading = state is not DONE and state is not ERROR
        self.steps += 1

    def _refuse_headers(self) -> None:
        self.refuse(Refusal(431, f"The headers are longer than {self._limits.header_bytes} bytes."))
