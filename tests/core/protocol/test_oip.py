"""The codec both ways, and against bodies that nobody would send in good faith."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.errors import InvalidRequest, TooLarge, Unsupported
from edge_runtime.core.messages import DTYPES, InferReply, InferRequest, OutputRequest, Tensor
from edge_runtime.core.protocol import oip

GOOD = json.dumps(
    {
        "id": "a",
        "parameters": {"private": True, "n": 3},
        "inputs": [
            {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["hello", "you \u00e4\u4eac"]},
            {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 4]},
            {"name": "b", "shape": [2], "datatype": "BOOL", "data": [True, False]},
        ],
        "outputs": [{"name": "intent", "parameters": {"binary_data": True}}],
    }
).encode()


def same(one, other):
    assert (one.name, one.datatype, tuple(one.shape)) == (other.name, other.datatype, tuple(other.shape))
    if isinstance(one.data, tuple):
        assert one.data == other.data
    else:
        assert one.data.dtype == other.data.dtype
        np.testing.assert_array_equal(one.data, other.data)


def numbers(datatype):
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        values = st.floats(width=dtype.itemsize * 8, allow_nan=False, allow_infinity=False)
    elif dtype.kind == "b":
        values = st.booleans()
    else:
        values = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return st.lists(values, min_size=1, max_size=6).map(
        lambda items: Tensor("x", datatype, (len(items),), np.array(items, dtype))
    )


texts = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=12), min_size=1, max_size=4).map(
    lambda items: Tensor("t", "BYTES", (len(items),), tuple(item.encode() for item in items))
)
tensors = st.one_of(texts, st.sampled_from(sorted(DTYPES)).flatmap(numbers))


@given(
    tensors,
    st.booleans(),
    st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(-9, 9), max_size=32),
)
def test_a_request_comes_back_as_it_was_sent(tensor, binary, parameters):
    binary = binary or tensor.datatype == "FP16"
    request = InferRequest((tensor,), "id", parameters, (OutputRequest("y", binary),))
    back = oip.decode_request(*oip.encode_request(request, binary=binary))
    same(back.inputs[0], tensor)
    assert (back.id, back.parameters, back.outputs) == ("id", parameters, (OutputRequest("y", binary),))


@given(tensors, st.booleans())
def test_a_reply_comes_back_as_it_was_sent(tensor, binary):
    binary = binary or tensor.datatype == "FP16"
    chosen = frozenset({tensor.name} if binary else ())
    reply = InferReply("m", "1", (tensor,), "id", {"origin": "local"}, binary_outputs=chosen)
    back = oip.decode_reply(*oip.encode_reply(reply))
    same(back.outputs[0], tensor)
    assert (back.model_name, back.model_version, back.parameters) == ("m", "1", {"origin": "local"})


@given(st.data())
def test_a_mutated_body_is_understood_or_refused_and_nothing_else(data):
    body = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        kind = data.draw(st.sampled_from(("flip", "drop", "double", "cut")))
        if kind == "flip":
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "drop":
            del body[at : at + data.draw(st.integers(1, 9))]
        elif kind == "double":
            body[at:at] = body[at : at + data.draw(st.integers(1, 30))]
        else:
            del body[at + 1 :]
        if not body:
            return
    length = data.draw(st.one_of(st.none(), st.integers(-5, len(body) + 5)))
    try:
        oip.decode_request(bytes(body), length)
    except InvalidRequest as error:
        sentence = str(error)
    else:
        return
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-2, 210)))
def test_noise_is_refused_by_all_three_decoders(noise, length):
    for decode in (
        lambda: oip.decode_request(noise, length),
        lambda: oip.decode_reply(noise, length),
        lambda: oip.decode_error(noise),
    ):
        with pytest.raises(InvalidRequest):
            decode()


def one(**changes):
    return {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]} | changes


@pytest.mark.parametrize(
    "entry",
    [
        one(shape=[-1]),
        one(shape=[2**62, 2**62]),
        one(shape=[0.5]),
        one(shape="1"),
        one(shape=[2]),
        one(shape=[1] * 9),
        one(datatype="FP33"),
        one(datatype="BF16"),
        one(datatype="INT8", data=[128]),
        one(datatype="UINT8", data=[-1]),
        one(datatype="INT64", data=[2**63]),
        one(datatype="INT32", data=[1.5]),
        one(datatype="BOOL", data=[2]),
        one(data=["1"]),
        one(data=[[1, 2]]),
        one(data=None),
        one(datatype="BYTES", data=[1]),
        one(datatype="BYTES", data=["a", "b"]),
        one(parameters={"binary_data_size": 4}),
        one(parameters={"binary_data_size": -1}),
        one(parameters={"binary_data_size": "4"}),
    ],
)
def test_a_tensor_that_does_not_add_up_is_refused(entry):
    with pytest.raises(InvalidRequest):
        oip.decode_request(json.dumps({"inputs": [entry]}).encode(), None)


@pytest.mark.parametrize(
    "tail",
    [b"", b"\x05\x00\x00\x00hell", b"\xff\xff\xff\xffhello", b"\x00\x00\x00\x00\x00", b"\x01\x00\x00\x00ab"],
)
def test_binary_texts_with_wrong_lengths_are_refused(tail):
    entry = {"name": "t", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    head = json.dumps({"inputs": [entry]}).encode()
    with pytest.raises(InvalidRequest):
        oip.decode_request(head + tail, len(head))


def test_nesting_costs_nothing_and_ends_in_a_refusal():
    for body in (b"[" * 100_000, b'{"inputs":' + b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(InvalidRequest):
            oip.decode_request(body, None)


def test_what_passes_a_cap_is_too_large_before_it_is_decoded():
    many = {"inputs": [one()] * (oip.LIMITS.tensors + 1)}
    rows = one(shape=[oip.LIMITS.rows + 1], datatype="BYTES", data=["a"] * (oip.LIMITS.rows + 1))
    long = one(datatype="BYTES", data=["a" * (oip.LIMITS.element_bytes + 1)])
    for tree in (many, {"inputs": [rows]}, {"inputs": [long]}, {"inputs": [one()], "id": "i" * 65}):
        with pytest.raises(TooLarge):
            oip.decode_request(json.dumps(tree).encode(), None)


def test_half_floats_are_not_written_where_nobody_may_read_them():
    half = Tensor("x", "FP16", (1,), np.zeros(1, np.float16))
    with pytest.raises(Unsupported):
        oip.encode_reply(InferReply("m", "1", (half,)))


def test_unknown_fields_are_ignored():
    tree = json.loads(GOOD) | {"future": {"a": [1]}}
    assert oip.decode_request(json.dumps(tree).encode(), None).id == "a"


@pytest.mark.parametrize("value", [[True], {"a": 1}, None])
def test_a_parameter_of_ours_that_is_not_understood_is_never_read_as_if_it_were_not_there(value):
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    body = {"inputs": [text], "parameters": {"private": value, "theirs": value}}
    with pytest.raises(InvalidRequest, match="private"):
        oip.decode_request(json.dumps(body).encode(), None)
    del body["parameters"]["private"]
    assert oip.decode_request(json.dumps(body).encode(), None).parameters == {}
