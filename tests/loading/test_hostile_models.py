"""Hostile and broken model files: none of them ends or holds up the process that asked for them."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.bundles.folder import load_bundle, write_bundle
from edge_runtime.config import Config, ServerSettings, TrustSettings
from edge_runtime.core.errors import BundleError
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.model import load_model
from edge_runtime.loading.quarantine import Quarantine
from edge_runtime.loading.sandbox import Limits
from edge_runtime.runtime import Runtime
from tests.bundles.test_folder import FIELDS
from tests.engines.test_engines import branch, external, sparse
from tests.engines.test_engines import model as onnx_model
from tests.loading.hard_models import children, endless_loop, memory_bomb
from tests.loading.test_model import DOUBLE, tensor_bundle
from tools.tflite_graph import OPEN, Graph, Op

#: `make fuzz` tries 10,000 for each format, which takes minutes.
MUTANTS = int(os.environ.get("EDGE_RUNTIME_FUZZ", "300"))
SHORT = Limits(cpu_s=2)


@pytest.fixture(autouse=True)
def no_child_stays():
    before = set(children())
    yield
    assert set(children()) <= before


def serialised(nodes, weights):
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def quantised_network():
    """Two layers with int8 weights, quantised statically, as the project's own exporter writes them."""
    rng = np.random.default_rng(0)
    weights = {"scale": np.float32(0.02), "zero": np.int8(0), "b1": rng.standard_normal(8).astype(np.float32)}
    weights |= {
        "w1": rng.integers(-99, 99, (2, 8)).astype(np.int8),
        "w2": rng.integers(-99, 99, (8, 2)).astype(np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w1", "scale", "zero"], ["w1d"]),
        helper.make_node("Gemm", ["xd", "w1d", "b1"], ["h"], alpha=1.0, transB=0),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("DequantizeLinear", ["w2", "scale", "zero"], ["w2d"]),
        helper.make_node("MatMul", ["r", "w2d"], ["l"]),
        helper.make_node("Softmax", ["l"], ["y"], axis=-1),
    ]
    return serialised(nodes, weights)


def convolutional_network():
    weights = {
        "k": np.ones((3, 1, 3), np.float32),
        "s": np.array([0, 3, 2], np.int64),
        "o": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["x", "o"], ["u"]),
        helper.make_node("Conv", ["u", "k"], ["c"], pads=[1, 1], kernel_shape=[3], strides=[1]),
        helper.make_node("Reshape", ["c", "s"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["y"], axes=[1], keepdims=0),
    ]
    return serialised(nodes, weights)


def branching_network():
    def arm(name, operator):
        node = helper.make_node(operator, ["x", "x"], [name])
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )

    weights = {"zero": np.float32(0), "one": np.array([0, 1], np.int64)}
    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "sum"], ["never"]),
        helper.make_node("If", ["never"], ["i"], then_branch=arm("t", "Add"), else_branch=arm("e", "Mul")),
        helper.make_node("Where", ["never", "zero", "i"], ["y"]),
    ]
    return serialised(nodes, weights)


def fuzzed(engine, originals, count, capsys):
    """What became of `count` broken files, by the words of `fuzz_child`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.loading.fuzz_child", engine, "1", str(count)],
        input=json.dumps([base64.b64encode(data).decode() for data in originals]), text=True,
        capture_output=True, cwd=Path(__file__).parents[2], timeout=1800, check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        sys.stdout.write(f"\n{engine}: {count} broken files: {found}\n")
    assert sum(found.values()) == count
    assert "escaped" not in found, [line for line in done.stdout.splitlines() if line.startswith("escaped")]
    return found


def test_broken_onnx_files_are_refused_or_run_or_end_their_child(capsys):
    found = fuzzed(
        "onnx", [quantised_network(), convolutional_network(), branching_network()], MUTANTS, capsys
    )
    assert found["refused"] > MUTANTS // 4
    assert found["ran"] > 0


def tflite_networks():
    """Two layers with int8 weights and a norm between them; a chain of arithmetic. As `tools` exports models."""
    rng = np.random.default_rng(0)

    def layer(width, depth):
        return rng.integers(-99, 99, (width, depth)).astype(np.int8), np.full(depth, 0.02, np.float32)

    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    hidden = graph.normalised(
        graph.linear(x, *layer(2, 8)), np.ones(8, np.float32), np.zeros(8, np.float32), 1e-5
    )
    yield graph.model({"x": x}, {"y": graph.linear(hidden, *layer(8, 2), np.zeros(2, np.float32))})
    graph = Graph()
    x = graph.input("x", (OPEN, 2), np.float32)
    wide = graph.op(Op.RESHAPE, x, graph.weight(np.array([-1, 1, 2], np.int32)), shape=(OPEN, 1, 2))
    apart = graph.arithmetic(Op.SQUARED_DIFFERENCE, wide, graph.weight(np.ones((3, 2), np.float32)))
    mean = graph.op(
        Op.MEAN, apart, graph.weight(np.array([1], np.int32)), shape=(OPEN, 2), options=[("Bool", 0)]
    )
    yield graph.model({"x": x}, {"y": mean})


def test_broken_tflite_files_are_refused_or_run_or_end_their_child(capsys):
    try:
        engine_version("tflite")
    except BundleError:
        if "EDGE_RUNTIME_TFLITE" in os.environ:
            raise
        pytest.skip("no TFLite runtime is installed: make tflite")
    found = fuzzed("tflite", list(tflite_networks()), MUTANTS, capsys)
    assert found["refused"] > MUTANTS // 4
    assert found["ran"] > 0


def model_bundle(path, model):
    write_bundle(path, FIELDS, {"model.onnx": model})
    return path


EXTERNAL = {
    "initialiser": lambda: onnx_model(weights=[external()]),
    "constant": lambda: onnx_model([helper.make_node("Constant", [], ["y"], value=external())], []),
    "sparse": lambda: onnx_model(weights=[], sparse=[sparse()]),
    "branch": lambda: onnx_model([branch(external())], []),
}


@pytest.mark.parametrize("placement", EXTERNAL)
def test_data_in_other_files_is_refused_wherever_it_is_named(tmp_path, monkeypatch, placement):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(24))  # where the runner would find it
    folder = model_bundle(tmp_path / "bundle", EXTERNAL[placement]())
    for quarantine in (Quarantine(None), None):  # in the child, and again where there can be none
        with pytest.raises(BundleError, match="other files"):
            load_model(folder, quarantine=quarantine)


def batch_bomb(path):
    """2 GiB for each row, and only once it runs."""
    weights = [numpy_helper.from_array(np.array([2**14, 2**14], np.int64), "wide")]
    nodes = [
        helper.make_node("Tile", ["x", "wide"], ["t"]),
        helper.make_node("ReduceMax", ["t"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    return tensor_bundle(path, nodes, weights=weights)


BOMBS = {
    "memory": (memory_bomb, "needed more than"),
    "batch": (batch_bomb, "needed more than"),
    "loop": (endless_loop, "used more than 2 s of processor time"),
    "cut off": (lambda path: model_bundle(path, onnx_model()[:-20]), "readable"),
    "length": (lambda path: model_bundle(path, b"\x3a" + b"\xff" * 9), "readable"),
    "byte": (lambda path: model_bundle(path, b"x"), "readable"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_in_a_sentence_and_the_process_goes_on(tmp_path, bomb):
    build, words = BOMBS[bomb]
    folder = build(tmp_path / "bomb")
    assert len(load_bundle(folder).files["model.onnx"]) < 500
    with pytest.raises(BundleError, match=words) as caught:
        load_model(folder, quarantine=Quarantine(None, limits=SHORT))
    assert "\n" not in str(caught.value)
    load_model(tensor_bundle(tmp_path / "good", DOUBLE))


def test_a_runtime_that_met_a_bomb_opens_with_another_model(tmp_path):
    async def answer(*models):
        config = Config(
            models=models, server=ServerSettings(tcp="off", socket="off"), trust=TrustSettings(unsigned=True)
        )
        async with Runtime.open(config) as runtime:
            return (await runtime.ask("tell me a joke")).answer.values[0]

    bomb = str(memory_bomb(tmp_path / "bomb"))
    with pytest.raises(BundleError, match="needed more than"):
        asyncio.run(answer("commands", bomb))
    assert asyncio.run(answer("commands")) == b"tell_joke"
