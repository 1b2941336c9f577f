"""Cache keys are injective by construction: no request can be written so that it has the key of another."""

import hashlib

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given

from edge_runtime.core.caching.keys import ROUTING_PARAMETERS, KeyPrefix, parameter_fields, prefix_bytes

SECRET = b"s" * 32
#: Texts that look like what the hash is fed with: lengths, counts, types, names, and nothing.
WORDS = [
    "",
    "intent",
    "confidence",
    "int",
    "str",
    "1",
    "\0",
    "\n\0\0\0\0\0\0\0",
    "\1\0\0\0\0\0\0\0",
    "a=1",
    "'",
    "\ud800",
]
TEXT = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=5), st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
)
SCALAR = st.one_of(TEXT, st.booleans(), st.integers(-2, 300), st.sampled_from([0.0, -0.0, 1.0, 1e300]))
REQUEST = st.fixed_dictionaries(
    {
        "model_digest": TEXT,
        "processing_version": TEXT,
        "engine": TEXT,
        "parameters": st.dictionaries(TEXT, SCALAR, max_size=3),
        "outputs": st.lists(TEXT, max_size=4).map(tuple),
    }
)
ROW = st.one_of(st.binary(max_size=40), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))


def key(row, request):
    return KeyPrefix(SECRET, **request).key(row)


def meaning(row, request):
    """What must decide the key, as a value of Python: types of parameters count, their order does not."""
    parameters = {
        (name, type(value), repr(value))
        for name, value in request["parameters"].items()
        if name not in ROUTING_PARAMETERS
    }
    parts = ("model_digest", "processing_version", "engine", "outputs")
    return (*(request[name] for name in parts), frozenset(parameters), row)


#: Ways in which a codec could write a field; an attacker tries all of them inside a row.
FRAMES = [
    lambda raw: len(raw).to_bytes(8, "little") + raw,
    lambda raw: len(raw).to_bytes(4, "little") + raw,
    lambda raw: len(raw).to_bytes(8, "big") + raw,
    lambda raw: raw,
    lambda raw: raw + b"\0",
    lambda raw: b"\1\0\0\0\0\0\0\0" + len(raw).to_bytes(8, "little") + raw,
]


@given(REQUEST, ROW, st.integers(0, 4), st.sampled_from(FRAMES), st.booleans())
@example(
    # The two requests of which one took the answer of the other: an output of one stands in the row of the other.
    {"model_digest": "d", "processing_version": "1", "engine": "e", "parameters": {}, "outputs": ("intent", "confidence")},
    b"stop", 1, FRAMES[0], False,
)  # fmt: skip
def test_a_row_that_swallows_outputs_of_another_request_has_another_key(
    request, row, kept, frame, has_length
):
    swallowed = request["outputs"][kept:]
    assume(swallowed)
    begin = b"".join(frame(output.encode("utf-8", "surrogatepass")) for output in swallowed)
    other = begin + (frame(row) if has_length else row)
    assert key(other, request | {"outputs": request["outputs"][:kept]}) != key(row, request)


@given(REQUEST, ROW, st.integers(0, 12))
def test_parameters_that_are_written_as_outputs_have_another_key(request, row, at):
    """Names, types and values of parameters as outputs, and outputs as names, types and values of parameters."""
    texts = [*parameter_fields(request["parameters"]), *request["outputs"]]
    as_outputs = request | {"parameters": {}, "outputs": tuple(texts)}
    if request["parameters"].keys() - ROUTING_PARAMETERS:
        assert key(row, as_outputs) != key(row, request)
    taken = texts[at : at + 2]
    assume(len(taken) == 2)
    assume(taken[0] not in ROUTING_PARAMETERS)
    as_parameter = request | {"parameters": {taken[0]: taken[1]}, "outputs": tuple(texts[at + 2 :])}
    assert (key(row, as_parameter) == key(row, request)) == (
        meaning(row, as_parameter) == meaning(row, request)
    )


@given(REQUEST, ROW, REQUEST, ROW)
def test_two_requests_share_a_key_exactly_if_they_are_equal(one, row, other, other_row):
    same = meaning(row, one) == meaning(other_row, other)
    assert (key(row, one) == key(other_row, other)) == same


@given(REQUEST, ROW, st.integers(0, 20), st.integers(0, 3))
def test_bytes_that_move_between_neighbours_change_the_key(request, row, at, count):
    """A byte more at the end of one field and one less at the beginning of the next."""
    names = ("model_digest", "processing_version", "engine")
    texts = [request[name] for name in names]
    at %= 2
    assume(texts[at + 1][:count])
    texts[at] += texts[at + 1][:count]
    texts[at + 1] = texts[at + 1][count:]
    assert key(row, request | dict(zip(names, texts, strict=True))) != key(row, request)


def decoded(raw):
    """What was hashed before the row, read back: the proof that it can be read in one way only."""
    at = 0

    def number():
        nonlocal at
        at += 8
        return int.from_bytes(raw[at - 8 : at], "little")

    def field():
        nonlocal at
        size = number()
        at += size
        assert at <= len(raw)
        return raw[at - size : at].decode("utf-8", "surrogatepass")

    parts = [field() for _ in range(3)]
    parameters = [field() for _ in range(number())]
    outputs = [field() for _ in range(number())]
    assert at == len(raw)
    return (*parts, tuple(parameters), tuple(outputs))


@given(REQUEST)
def test_what_is_hashed_can_be_read_back(request):
    parts = (request["model_digest"], request["processing_version"], request["engine"])
    assert decoded(prefix_bytes(**request)) == (
        *parts,
        parameter_fields(request["parameters"]),
        request["outputs"],
    )


@given(REQUEST, ROW)
def test_a_key_is_the_digest_of_those_bytes_and_the_row_after_its_length(request, row):
    hashed = prefix_bytes(**request) + len(row).to_bytes(8, "little") + row
    digest = hashlib.blake2b(hashed, digest_size=16, key=SECRET, person=b"er-cache-v4").digest()
    assert key(row, request) == digest


@given(st.dictionaries(TEXT, SCALAR, max_size=3), st.dictionaries(TEXT, SCALAR, max_size=3))
@example({"a=1": 2}, {"a": "1=2"})
@example({"a": 0.0}, {"a": -0.0})
@example({"a": 1}, {"a": True})
def test_the_fields_of_parameters_are_equal_exactly_if_the_parameters_are(one, other):
    """The memo of key prefixes is keyed by these fields: it must tell apart whatever the keys tell apart."""
    request = {"model_digest": "", "processing_version": "", "engine": "", "outputs": ()}
    same = meaning(b"", request | {"parameters": one}) == meaning(b"", request | {"parameters": other})
    assert (parameter_fields(one) == parameter_fields(other)) == same


@pytest.mark.parametrize("name", sorted(ROUTING_PARAMETERS))
def test_a_parameter_that_only_routes_is_in_no_key(name):
    request = {
        "model_digest": "d",
        "processing_version": "1",
        "engine": "e",
        "outputs": (),
        "parameters": {"a": 1},
    }
    routed = request | {"parameters": {"a": 1, name: 5}}
    assert key(b"row", routed) == key(b"row", request)
