"""TFLite models, and the shipped commands as one of them: the same answers as ONNX gives, alone and in company.

Skipped where no runtime is installed; `make tflite` runs them with LiteRT and with tflite-runtime and says which it
wants in EDGE_RUNTIME_TFLITE, so that there a missing one fails.
"""

import os
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.bundles.folder import find_bundle, load_bundle, write_bundle
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.engines import run_rows
from edge_runtime.engines.build import build_engine
from edge_runtime.loading.model import load_model
from edge_runtime.loading.quarantine import Quarantine
from edge_runtime.processing import decode_rows, encode_rows
from tools import tflite_graph
from tools.convert_tflite import convert, export_tflite, made_up_texts, read_weights
from tools.tflite_graph import OPEN, Graph, Op

WANTED = os.environ.get("EDGE_RUNTIME_TFLITE")
try:
    from edge_runtime.engines.litert import LitertEngine
except ImportError:
    if WANTED:
        raise
    pytest.skip("no TFLite runtime is installed: make tflite", allow_module_level=True)

TEXTS = [
    "turn off the kitchen lights please",
    "how do you say good morning in spanish",
    "set an alarm for seven tomorrow morning",
    "",
    "\U0001f600",
    "zz " * 500,
    *made_up_texts(60),
]


@pytest.fixture(scope="module")
def source():
    return find_bundle("commands")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "commands-tflite"
    convert(source, out, TEXTS)
    return out


@pytest.fixture(scope="module")
def commands(folder):
    return load_model(folder)


def identity(shape=(OPEN, 2), dtype=np.float32):
    graph = Graph()
    x = graph.input("x", shape, dtype)
    return graph.model(
        {"x": x},
        {
            "y": graph.op(
                Op.RESHAPE, x, graph.weight(np.array([-1, *shape[1:]], np.int32)), shape=shape, dtype=dtype
            )
        },
    )


def mixing(kind=Op.ADD):
    """Every row is joined with the mean of its batch."""
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    mean = graph.op(Op.MEAN, x, graph.weight(np.array([0], np.int32)), shape=(1, 2), options=[("Bool", 1)])
    return graph.model({"x": x}, {"y": graph.arithmetic(kind, x, mean)})


def rows(count, seed=0):
    return [(row,) for row in np.random.default_rng(seed).standard_normal((count, 2)).astype(np.float32)]


def test_the_wanted_runtime_is_the_one_that_runs(commands):
    assert commands.engine.name in {"litert", "tflite_runtime"}
    if WANTED:
        assert commands.engine.name == WANTED
    assert commands.info.platform == f"{commands.engine.name}_tflite"
    assert commands.info.name == "commands"
    assert commands.is_batch_invariant
    assert commands.max_batch == 64


def test_logits_are_those_of_the_onnx_bundle(commands, source):
    onnx = load_model(source)
    for start in range(0, len(TEXTS), 33):
        batch = encode_rows(commands.processor, [text.encode() for text in TEXTS[start : start + 33]])
        for (ours,), (theirs,) in zip(
            run_rows(commands.engine, batch), run_rows(onnx.engine, batch), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert (
        decode_rows(commands.processor, run_rows(commands.engine, batch)[:1], [b""])[0].confidence is not None
    )
    assert commands.accept_threshold == onnx.accept_threshold


def test_the_bundle_is_small(folder):
    bundle = load_bundle(folder)
    # What knows the training rows again is carried over as it is; the writer answers for the rest.
    carried = bundle.manifest.trained_rows
    trained = sum(entry.stored_size for entry in bundle.manifest.files if entry.name == carried)
    assert bundle.stored_bytes - trained <= 830_000


def test_the_file_is_the_same_wherever_it_is_written(source):
    weights = read_weights(load_bundle(source).files["model.onnx"])
    assert export_tflite(weights) == export_tflite(weights)


def test_neighbours_change_nothing(commands):
    encoded = encode_rows(commands.processor, [text.encode() for text in TEXTS])
    extreme = (np.zeros(192, np.int32),)  # the same n-gram in every slot
    for row in encoded[:8]:
        (alone,) = run_rows(commands.engine, [row])
        among = run_rows(commands.engine, [row, *[extreme] * 31])[0]
        swapped = run_rows(commands.engine, [row, *encoded[-31:]])[0]
        np.testing.assert_array_equal(among[0], swapped[0])
        np.testing.assert_allclose(among[0], alone[0], rtol=0, atol=1e-5)


def test_the_ladder_needs_an_interpreter_per_step(commands):
    encoded = encode_rows(commands.processor, [text.encode() for text in TEXTS[:64]])
    alone = [run_rows(commands.engine, [row])[0][0] for row in encoded]
    for count in (1, 2, 3, 5, 8, 9, 64, 7, 1):
        for (answer,), want in zip(run_rows(commands.engine, encoded[:count]), alone, strict=False):
            np.testing.assert_allclose(answer, want, rtol=0, atol=1e-5)
    (steps,) = commands.engine._buckets.values()
    assert set(steps) <= {1, 2, 4, 8, 16, 32, 64}
    assert {1, 2, 4, 8, 16, 64} <= set(steps)


def test_answers_are_copies():
    engine = LitertEngine(identity(), max_batch=4)
    (first,), (second,) = run_rows(engine, rows(2))
    kept = first.copy(), second.copy()
    run_rows(engine, rows(2, seed=1))
    first += 1
    np.testing.assert_array_equal(first, kept[0] + 1)
    np.testing.assert_array_equal(second, kept[1])


def test_padding_rows_are_zero_after_a_fuller_batch():
    engine = LitertEngine(mixing(), max_batch=4)
    ones = (np.ones(2, np.float32),)
    assert run_rows(engine, [ones] * 4)[0][0][0] == 2
    assert run_rows(engine, [ones] * 3)[0][0][0] == 1.75


def tensor_bundle(path, model):
    tensors = {
        side: [{"name": name, "datatype": "FP32", "shape": [-1, 2]}]
        for side, name in (("inputs", "x"), ("outputs", "y"))
    }
    fields = {"name": "tiny", "version": "1", "task": "tensors", "signature": tensors, "engine": "tflite"}
    fields |= {"model": "m.tflite", "processing": {"kind": "tensors", "version": "1"}, "licence": "x"}
    fields["batch"] = {"max": 8, "invariant": True}
    write_bundle(path, fields, {"m.tflite": model})
    return path


def test_the_self_test_finds_rows_that_depend_on_others(tmp_path):
    dependent = load_model(tensor_bundle(tmp_path / "tiny", mixing()))
    assert dependent.max_batch == 1
    assert "self-test" in dependent.batch_note
    assert load_model(tensor_bundle(tmp_path / "tiny", identity())).max_batch == 8


def test_the_first_load_is_tried_in_a_child(folder):
    tried = load_model(folder, quarantine=Quarantine(None))
    assert 1_000_000 < tried.memory_bytes < 50_000_000
    assert [rows for rows, _ in tried.latency_profile] == [1, 2, 4, 8, 16, 32, 64]


def test_a_memory_bomb_ends_with_its_child(tmp_path):
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    wide = graph.op(Op.MUL, x, graph.weight(np.ones((2**17, 1, 2), np.float32)), shape=(2**17, OPEN, 2))
    tall = graph.op(Op.RESHAPE, wide, graph.weight(np.array([-1, 1, 1], np.int32)), shape=(OPEN, 1, 1))
    vast = graph.arithmetic(Op.MUL, tall, graph.weight(np.ones((1, 1, 2**17), np.float32)))
    folder = tensor_bundle(tmp_path / "tiny", graph.model({"x": x}, {"y": vast}))
    with pytest.raises(BundleError, match="tiny"):
        load_model(folder, quarantine=Quarantine(None))


def test_shapes_get_buckets_of_their_own_and_old_ones_are_dropped():
    graph = Graph()
    x = graph.input("x", (OPEN, OPEN), np.float32)
    engine = LitertEngine(graph.model({"x": x}, {"y": graph.arithmetic(Op.ADD, x, x)}), max_batch=2)
    for length in [*range(1, 20), 1]:
        row = (np.arange(length, dtype=np.float32),)
        np.testing.assert_array_equal(run_rows(engine, [row, row])[1][0], row[0] * 2)
    assert len(engine._buckets) == 16


def test_too_many_rows_and_unfit_rows_fail():
    engine = LitertEngine(identity(), max_batch=2)
    long, wide, double = np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.zeros(2)
    for bad in ([], rows(3), [(long,)], [()], [(wide,)], [(double,)]):
        with pytest.raises(EngineFailed):
            run_rows(engine, bad)
    assert len(run_rows(engine, rows(2))) == 2


def test_a_failing_operator_is_an_engine_failure_and_no_end():
    graph = Graph()
    at = graph.input("x", (OPEN, 1), np.int32)
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    engine = LitertEngine(graph.model({"x": at}, {"y": graph.gather(table, at)}), max_batch=4)
    with pytest.raises(EngineFailed, match="failed"):
        run_rows(engine, [(np.array([99], np.int32),)])
    np.testing.assert_array_equal(run_rows(engine, [(np.array([1], np.int32),)])[0][0][0], table[1])


def test_batches_are_of_one_where_the_axis_is_fixed_or_the_caller_says_so():
    assert LitertEngine(identity((1, 2)), max_batch=8).max_batch == 1
    assert LitertEngine(identity(), max_batch=8, is_batch_invariant=False).max_batch == 1
    engine = LitertEngine(identity(), max_batch=8)
    run_rows(engine, rows(8))
    engine.deny_batches()
    assert (engine.max_batch, engine.is_batch_invariant) == (1, False)
    assert len(run_rows(engine, rows(1))) == 1


def test_no_batch_axis_is_refused():
    with pytest.raises(BundleError, match="batch axis"):
        LitertEngine(identity((4, 2)), max_batch=8)


def test_what_numpy_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setitem(tflite_graph._TYPES, np.dtype(np.complex64), 8)
    with pytest.raises(BundleError, match="only numbers"):
        LitertEngine(identity(dtype=np.complex64), max_batch=8)


def test_what_scan_or_runtime_refuse_is_a_bundle_error():
    good = identity()
    for bad in (b"", good[:40], good.replace(b"TFL3", b"TFL2")):
        with pytest.raises(BundleError, match="readable TFLite"):
            LitertEngine(bad, max_batch=1)
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    newer = graph.op(Op.RESHAPE, x, graph.weight(np.array([-1, 2], np.int32)), shape=x.shape, version=99)
    with pytest.raises(BundleError, match="loaded"):
        LitertEngine(graph.model({"x": x}, {"y": newer}), max_batch=1)


def test_outputs_that_do_not_follow_the_batch_are_an_engine_failure():
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    halves = graph.op(Op.RESHAPE, x, graph.weight(np.array([-1, 1], np.int32)), shape=(OPEN, 1))
    with pytest.raises(EngineFailed, match="one output row"):
        run_rows(LitertEngine(graph.model({"x": x}, {"y": halves}), max_batch=4), rows(1))


def test_engines_are_built_by_name_and_closed_twice():
    engine = build_engine("tflite", identity(), max_batch=4, threads=1)
    np.testing.assert_array_equal(run_rows(engine, rows(3))[2][0], rows(3)[2][0])
    engine.close()
    engine.close()


def test_a_net_that_answers_otherwise_is_not_written(source, tmp_path, monkeypatch):
    from tools import convert_tflite

    def spoilt(model):
        weights = read_weights(model)
        return replace(weights, norm=replace(weights.norm, scale=-weights.norm.scale))

    monkeypatch.setattr(convert_tflite, "read_weights", spoilt)
    with pytest.raises(BundleError, match="another label"):
        convert(source, tmp_path / "out", TEXTS)
    assert not (tmp_path / "out").exists()
