"""The HTTP/1.1 machine alone: bytes in, events out. No socket, no clock, no model."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.server.browser_guard import browser_guard
from edge_runtime.server.events import BodyPart, Refusal, RequestEnd, RequestHead
from edge_runtime.server.http11 import TRANSITIONS, Http11, State, Step, body_framing
from edge_runtime.server.limits import HttpLimits

LOCAL = frozenset({"mine"})


def machine(hosts=LOCAL, **limits):
    return Http11(HttpLimits(**limits), browser_guard(hosts))


def read(raw, pieces=1, http=None):
    """All events of `raw`, fed whole or in pieces."""
    http = http or machine()
    step = -(-len(raw) // pieces)
    return [event for at in range(0, len(raw), step) for event in http.receive(raw[at : at + step])]


def bodies(events):
    """The bodies of the complete requests."""
    found, body = [], b""
    for event in events:
        match event:
            case RequestHead():
                body = b""
            case BodyPart(data):
                body += data
            case RequestEnd():
                found.append(body)
    return found


def refusal_of(events):
    """The status of the refusal, which is the last event if there is one."""
    assert not any(isinstance(event, Refusal) for event in events[:-1])
    return events[-1].status if events and isinstance(events[-1], Refusal) else None


def post(path="/v2/models/commands/infer", body=b"{}", headers=""):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


def get(path, headers=""):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode("latin-1")


CHUNKED = b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

#: Requests that are refused before any route is looked at, with their statuses. `test_server` sends them over a socket.
MALFORMED = [
    (post(headers="Origin: http://evil.example\r\n"), 403),
    (post(headers="Origin: null\r\n"), 403),
    (post(headers="Sec-Fetch-Site: cross-site\r\n"), 403),
    (post().replace(b"Host: localhost", b"Host: evil.example:80"), 403),
    (post().replace(b"Host: localhost\r\n", b""), 400),
    (post(headers="Host: localhost\r\n"), 400),
    (get("/v2", "X: " + "a" * 9000 + "\r\n"), 431),
    (get("/v2", "".join(f"X{i}: 1\r\n" for i in range(70))), 431),
    (get("/" + "a" * 5000), 414),
    (get("http://evil.example/v2"), 403),
    (get("http://user@localhost/v2"), 403),
    (get("http:///v2"), 403),
    (get("https://localhost/v2"), 400),
    (get("*"), 400),
    (post(headers="Inference-Header-Content-Length: 2\r\nInference-Header-Content-Length: 1\r\n"), 400),
    (post(headers="Content-Encoding: gzip\r\nContent-Encoding: gzip\r\n"), 400),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9223372036854775808\r\n\r\n", 413),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    (b"POST /v2 HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nExpect: magic\r\nContent-Length: 0\r\n\r\n", 417),
    (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    (b"NONSENSE\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\r\n" * 4000, 400),
    (b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
]
#: More of the kind, from the tables of request smuggling: two parties must not find different ends of a message.
SMUGGLING = [
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3, 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
    b"GET / x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.9\r\nHost: localhost\r\n\r\n",
    b"GET /\r\n\r\n",
    CHUNKED + b"3\nabc\n0\n\n",
    CHUNKED + b"3\r\nabcd0\r\n\r\n",
    CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
]


@pytest.mark.parametrize(("raw", "status"), MALFORMED)
def test_a_malformed_request_is_refused_once_and_ends_the_connection(raw, status):
    for pieces in (1, 3, len(raw)):
        http = machine()
        assert refusal_of(read(raw, pieces, http)) == status
        assert http.state is State.ERROR
        assert http.receive(get("/v2")) == []  # what follows may be a part of the request that was refused
        assert http.refuse(Refusal(408, "again")) == []
        assert http.end_of_input() == []


@pytest.mark.parametrize("raw", SMUGGLING)
def test_what_two_parties_could_read_differently_is_refused(raw):
    for pieces in (1, len(raw)):
        events = read(raw, pieces)
        assert refusal_of(events) in {400, 501, 505}
        assert bodies(events) == []


def test_a_request_is_a_head_a_body_and_an_end():
    events = read(post("/v2/x", b"abc", "X-Many: 1\r\n"))
    headers = {"host": "localhost", "content-length": "3", "x-many": "1"}
    head = RequestHead("POST", "/v2/x", "1.1", headers, 3, keep_alive=True, expects_continue=False)
    assert events == [head, BodyPart(b"abc"), RequestEnd()]


@given(
    st.lists(st.tuples(st.sampled_from(["get", "post", "chunked"]), st.binary(max_size=200)), max_size=5),
    st.integers(1, 60),
)
def test_requests_mean_the_same_however_tcp_cuts_them(requests, pieces):
    raw, sent = b"", []
    for kind, body in requests:
        if kind == "get":
            raw += get("/v2")
        elif kind == "post":
            raw += post(body=body)
        else:
            raw += CHUNKED + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body) + b"0\r\nX: 1\r\n\r\n"
        sent.append(b"" if kind == "get" else body)
    http = machine()
    events = read(raw or b"\r\n", pieces, http)
    assert bodies(events) == sent
    assert refusal_of(events) is None
    assert http.state is State.IDLE


def test_the_last_request_ends_the_reading():
    for raw in (get("/", "Connection: close\r\n"), b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"):
        http = machine()
        events = read(raw + get("/other"), 1, http)
        assert bodies(events) == [b""]
        assert not events[0].keep_alive
        assert http.state is State.DONE
        assert http.receive(get("/other")) == []


def test_body_framing_knows_each_case_of_the_standard():
    assert body_framing("1.1", {}, 10) == 0
    assert body_framing("1.1", {"content-length": "10"}, 10) == 10
    assert body_framing("1.1", {"content-length": "11"}, 10).status == 413
    assert body_framing("1.1", {"transfer-encoding": "Chunked"}, 10) is None
    assert body_framing("1.1", {"transfer-encoding": "gzip"}, 10).status == 501
    assert body_framing("1.0", {"transfer-encoding": "chunked"}, 10).status == 400


def test_every_state_but_the_last_two_can_be_refused_and_none_is_left_twice():
    assert TRANSITIONS.keys() == set(State)
    for state, steps in TRANSITIONS.items():
        assert (Step.REFUSE in steps) == (state not in (State.DONE, State.ERROR))
    assert [state for state, steps in TRANSITIONS.items() if not steps] == [State.DONE, State.ERROR]


def test_endless_headers_are_cut_off_though_the_parser_shows_nothing():
    http = machine()
    raw = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000
    assert refusal_of(read(raw, 50, http)) == 431
    assert refusal_of(read(raw, 1)) == 431


def test_many_short_headers_are_counted_together():
    headers = "".join(f"X{i}: " + "a" * 1000 + "\r\n" for i in range(30))
    assert refusal_of(read(get("/", headers))) == 431
    assert refusal_of(read(get("/", headers), 40)) == 431


@pytest.mark.parametrize("chunk", [b"1\r\na\r\n" * 400_000, b"1;" + b"x" * 400_000, b"0" * 200_000])
def test_chunks_of_mostly_framing_are_refused_by_the_machine(chunk):
    assert refusal_of(read(CHUNKED + chunk, 50)) == 400


def test_no_byte_of_one_message_counts_against_another():
    """Pieces of TCP hold the end of one message and the beginning of the next."""
    chunked = CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n"
    for raw, body in ((post(body=b"x" * 1000), 1000), (chunked, 1000), (get("/v2"), 0)):
        for pieces in (1, 2, 3, 5, 7):
            events = read(raw * 6, pieces, machine(header_bytes=300, chunk_overhead_bytes=20))
            assert [len(found) for found in bodies(events)] == [body] * 6
            assert refusal_of(events) is None


def test_trailers_are_dropped():
    raw = CHUNKED + b"2\r\nhi\r\n0\r\nOrigin: http://evil.example\r\nX-Tenant: other\r\n\r\n"
    for pieces in (1, len(raw)):
        events = read(raw, pieces)
        assert bodies(events) == [b"hi"]
        assert events[0].headers.keys() == {"host", "transfer-encoding"}


def test_a_chunked_body_has_the_limit_of_any_body():
    events = read(CHUNKED + b"6\r\nabcdef\r\n6\r\nabcdef\r\n0\r\n\r\n", http=machine(body_bytes=10))
    assert refusal_of(events) == 413
    assert bodies(events) == []


def test_pipelined_requests_are_counted_until_they_are_answered():
    http = machine(pipelined=3)
    assert len(bodies(read(get("/") * 3, http=http))) == 3
    http.answered()
    assert len(bodies(read(get("/"), http=http))) == 1
    assert refusal_of(read(get("/"), http=http)) == 429


def test_expectations_are_seen_before_the_body():
    head, *rest = read(post(body=b"{}", headers="Expect: 100-Continue\r\n")[:-2])
    assert head.expects_continue
    assert rest == []
    # Nobody waits for a body that is not to come, and a client of HTTP/1.0 does not know the word.
    assert not read(post(body=b"", headers="Expect: 100-continue\r\n"))[0].expects_continue
    old = post(headers="Expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert not read(old)[0].expects_continue


UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        post(body=b"body", headers=UPGRADE),
        CHUNKED[:-2] + UPGRADE.encode() + b"\r\n4\r\nbody\r\n0\r\n\r\n",
        get("/v2", UPGRADE),
        get("/v2", "Connection: Upgrade\r\nUpgrade: websocket\r\n"),
    ],
)
def test_an_offer_to_upgrade_is_ignored_and_what_follows_is_read_as_http(raw):
    """Java's HttpClient offers h2c by default, in requests with a body too (RFC 9110, 7.8)."""
    body = b"body" if raw.startswith(b"POST") else b""
    for pieces in (1, 2, 5, len(raw)):
        http = machine()
        events = read(raw * 2 + post(body=b"next"), pieces, http)
        assert refusal_of(events) is None
        assert bodies(events) == [body, body, b"next"]
        assert http.state is State.IDLE


def test_the_last_request_is_the_last_though_it_offers_an_upgrade():
    http = machine()
    raw = post(body=b"body", headers="Connection: Upgrade, close\r\nUpgrade: h2c\r\n")
    assert bodies(read(raw + get("/other"), 1, http)) == [b"body"]
    assert http.state is State.DONE


def test_a_target_in_absolute_form_is_its_path_and_its_authority_counts():
    for target, path in (
        ("http://localhost:8080/v2/health/live?x=1", "/v2/health/live?x=1"),
        ("HTTP://127.0.0.1", "/"),
        ("http://[::1]:80/", "/"),
    ):
        head = read(get(target).replace(b"Host: localhost", b"Host: ignored.example"))[0]
        assert head.target == path
    assert read(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")[0].target == "*"


def test_headers_that_nobody_reads_may_hold_any_bytes_and_come_often():
    head = read(get("/", "X-Name: J\xfcrgen\r\nX-Many: a\r\nX-Many: b\r\nCookie: \xff\r\n"))[0]
    assert head.headers["x-name"] == "J\xfcrgen"
    assert head.headers["x-many"] == "a, b"


def test_the_end_of_input_between_requests_is_no_fault_and_within_one_is():
    http = machine()
    read(get("/"), http=http)
    assert http.end_of_input() == []
    assert http.state is State.DONE
    for raw in (b"GET / HT", post()[:-1], CHUNKED + b"5\r\nab"):
        http = machine()
        read(raw, http=http)
        assert refusal_of(http.end_of_input()) == 400
        assert http.state is State.ERROR


def test_a_machine_that_is_to_stop_finishes_the_request_it_reads():
    http = machine()
    raw = post(body=b"body")
    read(raw[:-1], http=http)
    http.stop()
    assert bodies([RequestHead("", "", "", {}, 4, True, False), *read(raw[-1:] + get("/"), http=http)]) == [
        b"y"
    ]
    assert http.state is State.DONE


def test_the_refusal_of_a_head_request_has_no_body():
    for raw in (
        b"HEAD /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"HEAD /v2 HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"HEAD /v2 HTTP/1.1\r\n\r\n",
    ):
        for pieces in (1, len(raw)):
            assert read(raw, pieces)[-1].is_bodiless
    assert not read(get("/", "Origin: null\r\n"))[-1].is_bodiless


def test_a_unix_socket_takes_any_host_and_still_no_web_page():
    assert refusal_of(read(get("/").replace(b"localhost", b"anything"), http=machine(hosts=None))) is None
    assert refusal_of(read(get("/", "Origin: null\r\n"), http=machine(hosts=None))) == 403
    for host in (b"LOCALHOST:8080", b"127.0.0.1", b"[::1]:1", b"127.0.0.2:80", b"localhost.", b"mine:8080"):
        assert refusal_of(read(get("/").replace(b"localhost", host))) is None
    for host in (b"10.0.0.1", b"localhost.evil.example", b"127.0.0.1.evil.example", b"", b"\xff", b"[::2]"):
        assert refusal_of(read(get("/").replace(b"localhost", host))) == 403
    assert refusal_of(read(get("/", "Sec-Fetch-Site: same-origin\r\n"))) is None


def test_a_connection_that_ends_is_freed_without_the_garbage_collector():
    """An upload that was given up holds megabytes; the daemon tells the collector to run rarely."""
    gc.collect()
    gc.disable()
    try:
        for raw in (post(body=b"x" * 1000)[:-1], CHUNKED + b"5\r\nab", b"NONSENSE\r\n\r\n", get("/")):
            http = machine(body_bytes=900) if raw.startswith(b"POST /v2/") else machine()
            reader = weakref.ref(http._reader)
            read(raw, 3, http)
            del http
            assert reader() is None, raw
    finally:
        gc.enable()
