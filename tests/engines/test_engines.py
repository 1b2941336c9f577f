"""Engines: prebound buffers, padding, refusals; models are built here with `onnx`."""

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.engines import run_rows
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.engines.onnx_scan import scan

WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def model(nodes=None, weights=None, *, inputs=None, outputs=None, functions=(), extra_domain=None, sparse=()):
    nodes = nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "main",
        inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        outputs or [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(WEIGHTS, "w")] if weights is None else weights,
        sparse_initializer=sparse,
    )
    opsets = [helper.make_opsetid("", 17)]
    if extra_domain:
        opsets.append(helper.make_opsetid(extra_domain, 1))
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=8, functions=functions
    ).SerializeToString()


def external(name="w", shape=(2, 3)):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def rows(count, seed=0):
    return [(row,) for row in np.random.default_rng(seed).standard_normal((count, 2)).astype(np.float32)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_rows_are_answered_in_order(count):
    engine = OnnxEngine(model(), max_batch=8)
    batch = rows(count)
    for row, (answer,) in zip(batch, run_rows(engine, batch), strict=True):
        np.testing.assert_allclose(answer, row[0] @ WEIGHTS, rtol=1e-6)


def test_answers_are_copies():
    engine = OnnxEngine(model(), max_batch=4)
    (first,) = run_rows(engine, rows(1))[0]
    kept = first.copy()
    run_rows(engine, rows(1, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_padding_rows_are_zero_after_a_fuller_batch():
    # The output is the sum over the batch, so a stale row in the padding would show.
    nodes = [
        helper.make_node("ReduceSum", ["x", "zero"], ["s"], keepdims=1),
        helper.make_node("Add", ["s", "x"], ["y"]),
    ]
    summing = model(
        nodes,
        [numpy_helper.from_array(np.array([0]), "zero")],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    engine = OnnxEngine(summing, max_batch=4)
    ones = (np.ones(2, np.float32),)
    assert run_rows(engine, [ones] * 4)[0][0][0] == 5
    assert run_rows(engine, [ones] * 3)[0][0][0] == 4


def test_shapes_get_buckets_of_their_own_and_old_ones_are_dropped():
    identity = model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
    )
    engine = OnnxEngine(identity, max_batch=4)
    for length in [*range(1, 40), 1]:
        row = (np.arange(length, dtype=np.float32),)
        np.testing.assert_array_equal(run_rows(engine, [row, row])[1][0], row[0])
    assert len(engine._buckets) <= 16


def test_too_many_rows_and_unfit_rows_fail():
    engine = OnnxEngine(model(), max_batch=2)
    for bad in ([], rows(3), [(np.zeros(3, np.float32),)], [()], [(np.zeros((1, 2), np.float32),)]):
        with pytest.raises(EngineFailed):
            run_rows(engine, bad)
    assert len(run_rows(engine, rows(2))) == 2


def test_a_failing_operator_is_an_engine_failure_and_no_end():
    gather = model(
        [helper.make_node("Gather", ["w", "x"], ["y"])],
        inputs=[helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    engine = OnnxEngine(gather, max_batch=4)
    with pytest.raises(EngineFailed):
        run_rows(engine, [(np.array(99),)])
    np.testing.assert_array_equal(run_rows(engine, [(np.array(1),)])[0][0], WEIGHTS[1])


def test_a_fixed_batch_of_one_runs_single_rows():
    fixed = model(
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    assert OnnxEngine(fixed, max_batch=8).max_batch == 1


@pytest.mark.parametrize("shape", [[], [4, 2]])
def test_no_batch_axis_is_refused(shape):
    fixed = model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    with pytest.raises(BundleError, match="batch axis"):
        OnnxEngine(fixed, max_batch=8)


def test_strings_are_refused():
    strings = model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [],
        inputs=[helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])],
    )
    with pytest.raises(BundleError, match="only numbers"):
        OnnxEngine(strings, max_batch=8)


def quantising():
    return model(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )


def test_dynamic_quantisation_forces_single_rows():
    engine = OnnxEngine(quantising(), max_batch=8)
    assert engine.max_batch == 1
    assert not engine.is_batch_invariant
    assert engine.batch_unsafe == {"DynamicQuantizeLinear"}


@pytest.mark.parametrize(
    ("attributes", "outputs", "opset", "is_unsafe"),
    [
        ({}, ["y"], 17, False),
        ({"training_mode": 0}, ["y"], 17, False),
        ({"training_mode": 1}, ["y", "mean2", "variance2"], 17, True),
        ({"training_mode": 1}, ["y", "", ""], 17, True),
        ({}, ["y", "mean2", "variance2", "mean3", "variance3"], 9, True),
        ({}, ["y", "", "", "", ""], 9, False),
    ],
)
def test_batch_normalisation_is_unsafe_while_it_trains(attributes, outputs, opset, is_unsafe):
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], outputs, **attributes)
    graph = helper.make_graph([node], "main", [], [])
    found = scan(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString())
    assert found.batch_unsafe == ({"BatchNormalization"} if is_unsafe else set())


def branch(tensor):
    def arm(name):
        return helper.make_graph(
            [helper.make_node("Identity", ["w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [tensor],
        )

    return helper.make_node("If", ["c"], ["v"], then_branch=arm("a"), else_branch=arm("b"))


def in_function():
    node = helper.make_node("Constant", [], ["out"], value=external())
    return helper.make_function("local", "F", [], ["out"], [node], [helper.make_opsetid("", 17)])


def sparse():
    found = onnx.SparseTensorProto(dims=[2, 3])
    found.values.CopyFrom(external("w", (1,)))
    found.indices.CopyFrom(numpy_helper.from_array(np.array([0]), ""))
    return found


def with_training():
    whole = onnx.ModelProto.FromString(model())
    whole.training_info.add().algorithm.initializer.append(external())
    return whole.SerializeToString()


@pytest.mark.parametrize(
    "placed",
    [
        lambda: model(weights=[external()]),
        lambda: model([helper.make_node("Constant", [], ["y"], value=external())], []),
        lambda: model([branch(external())], []),
        lambda: model(functions=[in_function()]),
        lambda: model(weights=[], sparse=[sparse()]),
        with_training,
    ],
    ids=["initialiser", "constant", "branch", "function", "sparse", "training"],
)
def test_external_data_is_refused(placed):
    with pytest.raises(BundleError, match="other files"):
        scan(placed())


def test_custom_operators_are_refused():
    node = helper.make_node("Evil", ["x"], ["y"], domain="evil.example")
    with pytest.raises(BundleError, match="custom operators"):
        scan(model([node], extra_domain="evil.example"))


def test_deep_nesting_is_refused():
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(20):
        arm = helper.make_graph([node], "g", [], [])
        node = helper.make_node("If", ["c"], ["v"], then_branch=arm, else_branch=arm)
        node.attribute.pop()
    with pytest.raises(BundleError, match="nested"):
        scan(model([node]))


def test_mutants_are_refused_or_scanned():
    good = model()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = int(rng.integers(256))
        try:
            scan(bytes(bad[: int(rng.integers(len(bad)))]))
        except BundleError:
            continue


@pytest.mark.parametrize("raw", [b"\x3a\xff\x01", b"\x0b", b"\x3a", b"\xff" * 20, b"\x09\x00"])
def test_broken_protobuf_is_refused(raw):
    with pytest.raises(BundleError, match="readable"):
        scan(raw)
    with pytest.raises(BundleError):
        OnnxEngine(raw, max_batch=1)


@pytest.mark.parametrize("name", [b"<in>", b"<out>"])
def test_a_name_that_is_no_text_is_a_bundle_error(name, capfd):
    value = helper.make_tensor_value_info
    good = model(
        [helper.make_node("MatMul", ["<in>", "w"], ["<out>"])],
        inputs=[value("<in>", TensorProto.FLOAT, ["n", 2])],
        outputs=[value("<out>", TensorProto.FLOAT, ["n", 3])],
    )
    OnnxEngine(good, max_batch=1)
    with pytest.raises(BundleError, match="cannot be loaded"):
        OnnxEngine(good.replace(name, b"\xff" * len(name)), max_batch=1)
    assert capfd.readouterr().out == ""


def test_what_the_runtime_refuses_is_a_bundle_error():
    with pytest.raises(BundleError):
        OnnxEngine(b"", max_batch=1)
    with pytest.raises(BundleError):
        OnnxEngine(model([helper.make_node("NoSuchOp", ["x"], ["y"])]), max_batch=1)


def test_fake_records_fails_and_miscounts():
    engine = FakeEngine(lambda row: (row[0] * 2,), fail_on=[2], error=ValueError("x"), miscount=0)
    assert run_rows(engine, [(np.array(2, np.float32),)])[0][0] == 4
    with pytest.raises(ValueError, match="x"):
        run_rows(engine, rows(3))
    engine.miscount = 2
    assert len(run_rows(engine, rows(3))) == 5
    engine.miscount = -1
    assert len(run_rows(engine, rows(3))) == 2
    assert engine.batch_sizes == [1, 3, 3, 3]
    engine.close()
    assert engine.is_closed


def test_fake_waits_at_its_gate():
    gate = threading.Event()
    engine = FakeEngine(gate=gate)
    done = []
    thread = threading.Thread(target=lambda: done.extend(run_rows(engine, rows(1))))
    thread.start()
    assert engine.entered.wait(5)
    assert not done
    gate.set()
    thread.join(5)
    assert len(done) == 1
