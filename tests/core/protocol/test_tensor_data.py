"""Tensor data: what does not fit is refused with its place, and work in steps gives what work at once gives."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.errors import EngineFailed, InvalidRequest, TooLarge
from edge_runtime.core.messages import DTYPES, InferReply, Signature, Tensor, TensorSpec
from edge_runtime.core.protocol import oip, tensor_data
from edge_runtime.core.protocol.tensor_data import complete, reading_binary, reading_json


def body_of(shape, data, datatype="FP32", **more):
    """A request whose second input is the one in question."""
    first = {"name": "a", "shape": [1], "datatype": "INT8", "data": [1]}
    second = {"name": "x", "shape": shape, "datatype": datatype, "data": data} | more
    return json.dumps({"inputs": [first, second]}).encode()


def read(shape, data, datatype="FP32", **more):
    return oip.decode_request(body_of(shape, data, datatype, **more), None).inputs[1].data


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP32", [2], [1.0, 1e39], "index 1 does not fit FP32"),
        ("FP32", [1], [-1e300], "index 0 does not fit FP32"),
        ("FP32", [1], [3.4028235677973366e38], "index 0 does not fit"),
        ("INT8", [3], [1, 2, 128], "index 2 does not fit INT8"),
        ("INT8", [1], [-129], "does not fit"),
        ("UINT8", [1], [-1], "does not fit"),
        ("UINT64", [1], [2**64], "does not fit"),
        ("INT64", [1], [-(2**63) - 1], "does not fit"),
        ("INT32", [1], [10**400], "does not fit"),
        ("INT32", [1], [1.5], "another kind"),
        ("INT32", [1], [True], "another kind"),
        ("FP32", [1], ["1"], "another kind"),
        ("FP32", [2], [1, None], "another kind"),
        ("BOOL", [1], [1], "another kind"),
        ("FP32", [2, 2], [[1, 2, 3], [4]], "nested unlike its shape"),
        ("FP32", [2, 2], [[1, 2], [3, 4, 5]], "nested unlike its shape"),
        ("FP32", [4], [[1, 2], [3, 4]], "nested unlike its shape"),
        ("FP32", [2, 2], [[[1, 2]], [[3, 4]]], "nested unlike its shape"),
        ("FP32", [2, 2], [1, [2, 3], 4], "nested unlike its shape"),
        ("FP32", [2, 2], [[1, 2], [3, "]"]], "another kind|nested"),
        ("FP32", [4], [1, 2, 3], "3 elements where the shape says 4"),
        ("FP32", [1], {"a": 1}, "not an array"),
        ("FP32", [2], {"a": [1, 2]}, "not an array"),
        ("FP32", [1, 20_000], {"a": [1] * 20_000}, "not an array"),
        ("FP32", [1], 1, "not an array"),
        ("BYTES", [2, 2], [["a", "b", "c"], ["d"]], "nested unlike its shape"),
        ("BYTES", [2], [["a", "b"]], "nested unlike its shape"),
        ("BYTES", [2], ["a", 5], "neither text nor a list"),
        ("BYTES", [1], [[256]], "neither text nor a list"),
        ("BYTES", [1], [[-1]], "neither text nor a list"),
        ("BYTES", [1], [None], "neither text nor a list|nested"),
        ("FP16", [1], [1.0], "binary only"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_its_place(datatype, shape, data, words):
    with pytest.raises(InvalidRequest, match=words) as refused:
        read(shape, data, datatype)
    assert str(refused.value).startswith("inputs[1]: ")
    with pytest.raises(InvalidRequest, match=words):  # in steps, too
        complete(oip.decoding_request(body_of(shape, data, datatype), None))


def test_the_largest_values_fit_exactly():
    assert read([1], [3.4028234663852886e38])[0] == np.finfo(np.float32).max
    assert read([1], [3.4028235677973e38])[0] == np.finfo(np.float32).max  # rounds to it
    assert read([2], [2**63 - 1, -(2**63)], "INT64").tolist() == [2**63 - 1, -(2**63)]
    assert read([1], [2**64 - 1], "UINT64")[0] == 2**64 - 1
    assert read([1], [1e308], "FP64")[0] == 1e308


@given(st.data())
def test_nested_data_is_read_like_flat_data(data):
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    datatype = data.draw(st.sampled_from(["FP32", "INT16", "BOOL", "FP64", "BYTES"]))
    count = int(np.prod(shape))
    flat = {
        "BYTES": [data.draw(st.sampled_from(["", "a", "[,]", 'q"[', "ä"])) for _ in range(count)],
        "BOOL": [bool(at % 3) for at in range(count)],
    }.get(datatype, list(range(count)))
    nested = np.array(flat, object).reshape(shape).tolist()
    if count == 0 and len(shape) > 1:
        return  # JSON cannot say how long an axis is behind one of length 0
    for form in (flat, nested):
        found = read(shape, form, datatype)
        if datatype == "BYTES":
            assert found == tuple(text.encode() for text in flat)
        else:
            assert found.shape == tuple(shape)
            assert found.reshape(-1).tolist() == flat


def test_a_leading_axis_of_length_one_may_be_left_out():
    assert read([1, 2, 2], [[1, 2], [3, 4]]).tolist() == [[[1, 2], [3, 4]]]
    assert read([1, 2], [["a", "b"]], "BYTES") == (b"a", b"b")
    assert read([1, 1, 2], ["a", "b"], "BYTES") == (b"a", b"b")


def test_texts_that_are_no_utf8_are_lists_of_bytes():
    assert read([3], ["a", [255, 0], []], "BYTES") == (b"a", b"\xff\x00", b"")
    assert read([1, 2], [["a", [7]]], "BYTES") == (b"a", b"\x07")


def test_an_axis_of_length_zero_cannot_ask_for_a_structure_of_terabytes():
    for shape in ([1, 2**40, 0], [0, 2**40], [1024, 2**24, 0]):
        with pytest.raises(InvalidRequest):
            read(shape, [[1], [2]])


def test_data_of_very_many_lists_is_too_large_before_it_is_decoded():
    lists = [["a"]] * 20_000
    with pytest.raises(TooLarge, match="lists"):
        read([1, 20_000, 1], [lists], "BYTES")


@pytest.mark.parametrize("datatype", ["FP32", "INT8", "UINT64", "BOOL", "BYTES"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_work_in_steps_gives_what_work_at_once_gives(datatype, is_nested):
    count = 30_000
    flat = {
        "BYTES": [f"t{at}" for at in range(count)],
        "BOOL": [at % 7 == 0 for at in range(count)],
        "INT8": [at % 100 for at in range(count)],
    }.get(datatype, list(range(count)))
    shape = (2, count // 2) if is_nested else (count,)
    raw = json.dumps(np.array(flat, object).reshape(shape).tolist() if is_nested else flat).encode()
    at_once = tensor_data.read_json("x", datatype, shape, raw, 100)
    steps = reading_json("x", datatype, shape, raw, 100)
    turns = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            in_steps = end.value
            break
        turns += 1
    assert turns >= 3
    if datatype == "BYTES":
        assert at_once == in_steps == tuple(text.encode() for text in flat)
    else:
        np.testing.assert_array_equal(at_once, in_steps)
        assert in_steps.reshape(-1).tolist() == flat
        assert in_steps.dtype == DTYPES[datatype]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" + b"1," * 19_999 + b"1e39]", "index 19999 does not fit"),
        (b"[" + b"1," * 19_999 + b'"a"]', "another kind"),
        (b"[" + b"1," * 19_998 + b"1]", "19999 elements"),
        (b'["' + b"a," * 19_999 + b'"]', "another kind"),
    ],
)
def test_faults_far_behind_are_found_in_steps(data, words):
    with pytest.raises(InvalidRequest, match=words):
        complete(reading_json("x", "FP32", (20_000,), data, 100))


def test_a_text_too_long_is_named_in_every_form():
    for raw in (json.dumps(["a"] * 9000 + ["b" * 11]).encode(), json.dumps([["b" * 11]]).encode()):
        count = 9001 if raw.startswith(b'["a') else 1
        with pytest.raises(TooLarge, match=f"element {count - 1} is longer than 10 bytes"):
            complete(reading_json("x", "BYTES", (count,) if count > 1 else (1, 1), raw, 10))
    with pytest.raises(TooLarge, match="element 1 is longer"):
        complete(reading_binary("x", "BYTES", (2,), memoryview(b"\0\0\0\0\x0b\0\0\0" + b"b" * 11), 10))


def test_a_bool_in_binary_is_zero_or_one():
    assert complete(reading_binary("x", "BOOL", (2,), memoryview(b"\0\1"), 9)).tolist() == [False, True]
    with pytest.raises(InvalidRequest, match="x: a BOOL"):
        complete(reading_binary("x", "BOOL", (2,), memoryview(b"\0\2"), 9))


TEXT = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}


def test_an_explicit_null_is_the_same_as_an_absent_field():
    absent = oip.decode_request(json.dumps({"inputs": [TEXT]}).encode(), None)
    nulls = {"id": None, "parameters": None, "outputs": None, "inputs": [TEXT | {"parameters": None}]}
    assert oip.decode_request(json.dumps(nulls).encode(), None) == absent
    parameters = {
        "timeout": None,
        "priority": None,
        "cache": None,
        "theirs": None,
        "binary_data_output": None,
    }
    assert (
        oip.decode_request(json.dumps({"inputs": [TEXT], "parameters": parameters}).encode(), None) == absent
    )
    outputs = [{"name": "y", "parameters": None}, {"name": "z", "parameters": {"binary_data": None}}]
    asked = oip.decode_request(json.dumps({"inputs": [TEXT], "outputs": outputs}).encode(), None)
    assert [(output.name, output.binary) for output in asked.outputs] == [("y", False), ("z", False)]
    entry = {
        "name": "t",
        "shape": [1],
        "datatype": "BYTES",
        "data": None,
        "parameters": {"binary_data_size": 5},
    }
    head = json.dumps({"inputs": [entry]}).encode()
    assert oip.decode_request(head + b"\1\0\0\0a", len(head)).inputs[0].data == (b"a",)


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_shared_memory_is_refused_with_its_place(place):
    region = {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}
    tree = {"inputs": [TEXT], "outputs": [{"name": "y"}]}
    tree[place] = [*tree[place], {"name": "z", "shape": [1], "datatype": "FP32"} | region]
    with pytest.raises(InvalidRequest, match=rf"{place}\[1\]\.parameters\.shared_memory_region"):
        oip.decode_request(json.dumps(tree).encode(), None)


SIGNATURE = Signature(
    (TensorSpec("text", "BYTES", (-1,)), TensorSpec("x", "FP32", (-1, 3))),
    (TensorSpec("y", "FP32", (-1,)),),
    (TensorSpec("scores", "FP32", (-1, 5)),),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "texts"}, r"inputs\[0\]: this model has no input of that name; its inputs are 'text', 'x'"),
        ({"datatype": "FP32"}, r"inputs\[0\]: input 'text' has datatype BYTES"),
        ({"shape": [1, 1]}, r"inputs\[0\]: input 'text' has shape \[-1\]"),
        ({"name": "x", "datatype": "FP32", "shape": [1, 2]}, r"inputs\[0\]: input 'x' has shape \[-1, 3\]"),
    ],
)
def test_with_a_signature_a_wrong_input_is_refused_before_its_data_is_read(change, words, monkeypatch):
    monkeypatch.setattr(oip, "read_json", None)
    with pytest.raises(InvalidRequest, match=words):
        oip.decode_request(json.dumps({"inputs": [TEXT | change]}).encode(), None, SIGNATURE)


def test_with_a_signature_an_unknown_output_is_refused_before_data_is_read(monkeypatch):
    body = {"inputs": [TEXT], "outputs": [{"name": "y"}, {"name": "scores"}]}
    assert len(oip.decode_request(json.dumps(body).encode(), None, SIGNATURE).outputs) == 2
    body["outputs"].append({"name": "z"})
    monkeypatch.setattr(oip, "read_json", None)
    with pytest.raises(InvalidRequest, match=r"outputs\[2\]: .* 'y', 'scores'"):
        oip.decode_request(json.dumps(body).encode(), None, SIGNATURE)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"inputs":[],"parameters":{"a":"' + b"x" * 70_000 + b'"}}', "parameters: longer than 65536 bytes"),
        (
            b'{"inputs":[],"parameters":{' + b",".join(b'"%d":1' % at for at in range(20_000)) + b"}}",
            "parameters: longer than 65536 bytes",
        ),
        (
            b'{"inputs":[' + b",".join([b'{"name":"","datatype":"","shape":[]}'] * 40_000) + b"]}",
            "More than 32 inputs",
        ),
        (
            b'{"inputs":[],"outputs":[' + b",".join([b'{"name":""}'] * 40_000) + b"]}",
            "outputs: longer than 65536 bytes",
        ),
    ],
)
def test_masses_of_entries_are_too_large_before_they_are_decoded(body, words):
    with pytest.raises(TooLarge, match=words):
        complete(oip.decoding_request(body, None))


def test_a_model_that_answers_with_nan_has_failed_and_its_caller_has_not():
    nan = Tensor("y", "FP32", (2,), np.array([1, np.nan], np.float32))
    with pytest.raises(EngineFailed, match="binary"):
        oip.encode_reply(InferReply("m", "1", (nan,)))
    long = Tensor("y", "FP32", (20_000,), np.full(20_000, np.inf, np.float32))
    with pytest.raises(EngineFailed):
        complete(oip.encoding_reply(InferReply("m", "1", (long,))))
    assert oip.encode_reply(InferReply("m", "1", (nan,), binary_outputs=frozenset({"y"})))[1] is not None
