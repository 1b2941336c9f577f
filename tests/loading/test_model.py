"""Whole models: the shipped bundles answer rightly, alone and in company; unfit ones are refused in a sentence."""

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.bundles.folder import load_bundle, write_bundle
from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Tensor
from edge_runtime.engines import run_rows
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.loading.model import load_model
from edge_runtime.loading.self_test import difference_in_company
from edge_runtime.processing import decode_rows, encode_rows

QUESTIONS = {
    "turn off the kitchen lights please": "smart_home",
    "how do you say good morning in spanish": "translate",
    "set an alarm for seven tomorrow morning": "alarm",
    "what's the weather like in boston today": "weather",
    "play the next song": "next_song",
    "how much money is in my checking account": "balance",
    "tell me a joke": "tell_joke",
    "flip a coin for me": "flip_coin",
    "i lost my credit card, please report it": "report_lost_card",
    "what does the word ubiquitous mean": "definition",
}


def tensor_bundle(path, nodes, *, invariant=True, weights=(), **changes):
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tensors = {
        side: [{"name": name, "datatype": "FP32", "shape": [-1, 2]}]
        for side, name in (("inputs", "x"), ("outputs", "y"))
    }
    fields = {
        "name": "tiny",
        "version": "1",
        "task": "tensors",
        "signature": tensors,
        "engine": "onnx",
        "model": "model.onnx",
        "processing": {"kind": "tensors", "version": "1"},
        "batch": {"max": 8, "invariant": invariant},
        "licence": "Apache-2.0",
        **changes,
    }
    write_bundle(path, fields, {"model.onnx": model.SerializeToString(), "labels.json": b'["a", "b"]'})
    return path


DOUBLE = [helper.make_node("Add", ["x", "x"], ["y"])]
TEXT = {
    "signature": {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "intent", "datatype": "BYTES", "shape": [-1]},
            {"name": "confidence", "datatype": "FP32", "shape": [-1]},
        ],
    },
    "labels": "labels.json",
    "calibration": {"temperature": 1.0, "knots": [[0, 0], [1, 1]]},
}


@pytest.fixture(scope="module", params=["commands", "commands-cloud"])
def shipped(request):
    if request.param == "commands-cloud":
        pytest.importorskip("tokenizers")
    return load_model(request.param)


def answer_of(model, text):
    outputs = run_rows(model.engine, encode_rows(model.processor, [text]))
    return decode_rows(model.processor, outputs, [text])[0]


def test_shipped_models_answer_rightly(shipped):
    for text, intent in QUESTIONS.items():
        answer = answer_of(shipped, text.encode())
        assert answer.values[0] == intent.encode(), text
        assert answer.confidence is not None
        assert 0.5 < answer.confidence < 1.0


def test_shipped_rows_do_not_depend_on_neighbours(shipped):
    assert shipped.is_batch_invariant
    odd = [
        "",
        "\U0001f600",
        "zz " * 500,
        "turn it off",
        "what is my balance and when was it last changed by someone",
    ]
    rows = encode_rows(shipped.processor, [text.encode() for text in [*QUESTIONS, *odd]])
    for row in rows:
        alike = [other for other in rows if other[0].shape == row[0].shape]
        (alone,) = run_rows(shipped.engine, [row])
        (twice, _) = run_rows(shipped.engine, [row, alike[-1]])
        among = run_rows(shipped.engine, [row, *alike[::-1]])[0]
        # The same batch with other neighbours is the same to the bit; another size may choose another kernel.
        swapped = run_rows(shipped.engine, [row, *alike])[0]
        np.testing.assert_array_equal(among[0], swapped[0])
        for other in (twice, among):
            np.testing.assert_allclose(other[0], alone[0], rtol=0, atol=1e-5)


def test_shipped_models_say_what_they_are(shipped):
    info = shipped.info
    assert (info.name, info.platform, info.max_batch > 1) == ("commands", "onnxruntime_onnx", True)
    assert len(info.digest) == 64
    assert {credit.licence for credit in shipped.manifest.credits} >= {"CC-BY-3.0"}
    assert shipped.accept_threshold is not None


def test_the_edge_bundle_is_small():
    bundle = load_bundle(load_bundle_path("commands"))
    assert bundle.stored_bytes <= 1_000_000
    assert "data_location" not in str(onnx.ModelProto.FromString(bundle.files["model.onnx"]).graph.node[:1])


def load_bundle_path(name):
    from edge_runtime.bundles.folder import find_bundle

    return find_bundle(name)


def test_tensor_models_run(tmp_path):
    model = load_model(tensor_bundle(tmp_path / "tiny", DOUBLE))
    data = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    rows = encode_rows(model.processor, model.processor.split([Tensor("x", "FP32", (3, 2), data)]))
    got = [answer.values[0] for answer in decode_rows(model.processor, run_rows(model.engine, rows), rows)]
    np.testing.assert_array_equal(got, data * 2)
    assert (model.max_batch, model.accept_threshold) == (8, None)


def test_a_claim_of_dependence_is_believed(tmp_path):
    assert load_model(tensor_bundle(tmp_path / "tiny", DOUBLE, invariant=False)).max_batch == 1


def test_the_self_test_finds_what_the_scan_cannot(tmp_path):
    # Divides by the largest value of the whole batch: no forbidden operator, and yet neighbours matter.
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Div", ["x", "m"], ["y"]),
    ]
    model = load_model(tensor_bundle(tmp_path / "tiny", nodes))
    assert model.max_batch == 1
    assert not model.is_batch_invariant
    assert not model.info.is_batch_invariant


def test_a_dynamically_quantised_model_runs_single_rows_and_says_why(tmp_path, caplog):
    quantization = pytest.importorskip("onnxruntime.quantization")
    weights = [
        numpy_helper.from_array(np.random.default_rng(0).standard_normal((2, 2)).astype(np.float32), "w")
    ]
    folder = tensor_bundle(
        tmp_path / "tiny", [helper.make_node("MatMul", ["x", "w"], ["y"])], weights=weights
    )
    assert load_model(folder).max_batch == 8
    plain = onnx.ModelProto.FromString(load_bundle(folder).files["model.onnx"])
    quantization.quantize_dynamic(plain, tmp_path / "quantised.onnx")
    fields = msgspec.to_builtins(load_bundle(folder).manifest) | {"name": "dynamic"}
    del fields["format"], fields["files"]
    payloads = {"model.onnx": (tmp_path / "quantised.onnx").read_bytes()}
    write_bundle(tmp_path / "dynamic", fields, payloads)
    model = load_model(tmp_path / "dynamic")
    assert (model.max_batch, model.is_batch_invariant) == (1, False)
    assert model.batch_note == "DynamicQuantizeLinear computes over all rows of a batch"
    assert caplog.text.count("event=batches_denied model=dynamic") == 1
    # And rightly so: were the scan blind, the self-test would see it.
    raw = onnxruntime.InferenceSession(payloads["model.onnx"])
    row, neighbour = np.array([[0.3, 0.7]], np.float32), np.array([[50.0, -50.0]], np.float32)
    (alone,), (among,) = raw.run(None, {"x": row}), raw.run(None, {"x": np.concatenate([row, neighbour])})
    assert np.abs(alone[0] - among[0]).max() > 1e-2


def test_independence_on_a_fake():
    rows = [(np.array([float(i)], np.float32),) for i in range(3)]
    assert difference_in_company(FakeEngine(), rows) == 0.0
    calls = []
    assert (
        difference_in_company(FakeEngine(lambda row: (row[0] + len(calls), calls.append(0))[:1]), rows) >= 1
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "pickle"}, "engine"),
        ({"processing": {"kind": "python", "version": "1"}}, "processing"),
        ({"processing": {"kind": "tensors", "version": "99"}}, "processing"),
        ({**TEXT, "processing": {"kind": "text_ngrams", "version": "1"}}, "slots"),
        (
            {
                **TEXT,
                "processing": {
                    "kind": "text_ngrams",
                    "version": "1",
                    "parameters": {"slots": 10**9, "buckets": 9, "grams": [3]},
                },
            },
            "slots",
        ),
        (
            {
                **TEXT,
                "processing": {
                    "kind": "text_ngrams",
                    "version": "1",
                    "parameters": {"slots": 9, "buckets": 9, "grams": [3]},
                },
            },
            "does not fit",
        ),
        (
            {
                **TEXT,
                "processing": {
                    "kind": "text_wordpiece",
                    "version": "1",
                    "parameters": {"tokenizer": "labels.json", "lengths": [8]},
                },
            },
            "tokeni",
        ),
        (
            {
                "processing": {
                    "kind": "text_ngrams",
                    "version": "1",
                    "parameters": {"slots": 9, "buckets": 9, "grams": [3]},
                }
            },
            "signature",
        ),
    ],
)
def test_unfit_bundles_are_refused_in_one_sentence(tmp_path, changes, words):
    with pytest.raises(BundleError, match=words) as caught:
        load_model(tensor_bundle(tmp_path / "tiny", DOUBLE, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("datatype", "shape"), [("FP32", [-1, 3]), ("FP64", [-1, 2]), ("FP32", [-1])])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_signature_that_is_not_the_models_is_refused(tmp_path, side, datatype, shape):
    signature = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    signature[side] = [{"name": "x", "datatype": datatype, "shape": shape}]
    with pytest.raises(BundleError, match="does not fit"):
        load_model(tensor_bundle(tmp_path / "tiny", DOUBLE, signature=signature))


def test_labels_must_be_as_many_as_logits(tmp_path):
    slots = helper.make_tensor_value_info("slots", TensorProto.INT32, ["n", 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])
    node = helper.make_node("Cast", ["slots"], ["logits"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "main", [slots], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder = tensor_bundle(tmp_path / "tiny", DOUBLE)
    fields = {**TEXT, "name": "tiny", "version": "1", "task": "text-classification", "engine": "onnx"}
    fields |= {"model": "model.onnx", "batch": {"max": 2, "invariant": True}, "licence": "x"}
    parameters = {"slots": 4, "buckets": 9, "grams": [3]}
    fields["processing"] = {"kind": "text_ngrams", "version": "1", "parameters": parameters}
    payloads = {"model.onnx": model.SerializeToString(), "labels.json": b'["a","b","c","d"]'}
    write_bundle(folder, fields, payloads)
    load_model(folder)
    write_bundle(folder, fields, {**payloads, "labels.json": b'["a","b","c"]'})
    with pytest.raises(BundleError, match="does not fit"):
        load_model(folder)


def test_external_data_is_refused_at_load(tmp_path):
    weight = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="x.bin")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    with pytest.raises(BundleError, match="other files"):
        load_model(tensor_bundle(tmp_path / "tiny", nodes, weights=[weight]))
