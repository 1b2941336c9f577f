"""Write the edge net of an ONNX bundle as a TFLite bundle, with the same weights, labels and calibration.

    python -m tools.convert_tflite models/commands models/commands-tflite --check DATA.jsonl

Nothing is trained. Both bundles then answer the same texts, and nothing is written unless all labels agree. Needs
a TFLite runtime (the extra `tflite`) besides the extra `train`.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_runtime.bundles.folder import Bundle, load_bundle
from edge_runtime.core.errors import BundleError, EdgeRuntimeError
from tools.evaluate import answers_of
from tools.pack import rewrite
from tools.rows import BadRows, read_rows
from tools.tflite_graph import OPEN, Graph, Op

Floats = NDArray[np.float32]
#: The operators that tools.training.edge_net writes, in any order.
_OPERATORS = {"Gather": 2, "Cast": 4, "Unsqueeze": 1, "MatMul": 4, "Reshape": 1, "LayerNormalization": 2}
_OPERATORS |= {"Mul": 6, "Add": 4, "Erf": 1, "Identity": 1}


@dataclass(frozen=True)
class Norm:
    """A layer normalisation."""

    scale: Floats
    bias: Floats
    epsilon: float


@dataclass(frozen=True)
class Dense:
    """int8 `steps` `[in, out]`, a scale per output, and perhaps a bias."""

    steps: NDArray[np.int8]
    scales: Floats
    bias: Floats | None


@dataclass(frozen=True)
class EdgeWeights:
    """All that `tools.training.edge_net` learned, as it is stored: `table` int8 `[buckets + 1, width]`, a scale per row."""

    slots: int
    table: NDArray[np.int8]
    scales: Floats
    norm: Norm
    up: Dense
    norm_up: Norm
    head: Dense
    direct: Dense


def export_tflite(weights: EdgeWeights) -> bytes:
    """Write the net as TFLite: slots `[batch, slots]` int32 -> logits `[batch, labels]` fp32.

    The bag of n-grams is an average pool over the slots: of the ways to sum rows it was the fastest for single
    rows under both runtimes (26 and 35 us a row; MEAN 31 and 42, BATCH_MATMUL 33 and 43).
    """
    graph = Graph()
    count, width = weights.slots, weights.table.shape[1]
    slots = graph.input("slots", (OPEN, count), np.int32)
    entries = graph.to_float(graph.gather(weights.table.reshape(-1, 1, width), slots))
    factors = graph.gather((weights.scales * np.float32(count)).reshape(-1, 1, 1), slots)
    scaled = graph.arithmetic(Op.MUL, entries, factors)
    window = [("Int8", 1), ("Int32", 1), ("Int32", 1), ("Int32", 1), ("Int32", count)]  # valid, strides, size
    bag = graph.op(Op.AVERAGE_POOL_2D, scaled, shape=(OPEN, 1, 1, width), options=window)
    bag = graph.op(Op.RESHAPE, bag, graph.weight(np.array([-1, width], np.int32)), shape=(OPEN, width))
    x = graph.normalised(bag, weights.norm.scale, weights.norm.bias, weights.norm.epsilon)
    up, head, direct = weights.up, weights.head, weights.direct
    hidden = graph.gelu(graph.linear(x, up.steps, up.scales, up.bias))
    norm = weights.norm_up
    hidden = graph.normalised(hidden, norm.scale, norm.bias, norm.epsilon)
    logits = graph.arithmetic(
        Op.ADD,
        graph.linear(hidden, head.steps, head.scales, head.bias),
        graph.linear(x, direct.steps, direct.scales),
    )
    return graph.model({"slots": slots}, {"logits": logits})


def read_weights(model: bytes) -> EdgeWeights:
    """Find the weights in the ONNX graph that `tools.training.edge_net` writes. Raises BundleError for any other."""
    graph = onnx.ModelProto.FromString(model).graph
    if Counter(node.op_type for node in graph.node) != _OPERATORS:
        raise BundleError(
            "the model is not an edge net of tools.train_commands, which is all this tool converts"
        )
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    tables = [arrays[node.input[0]] for node in graph.node if node.op_type == "Gather"]
    (table,) = (each for each in tables if each.dtype == np.int8)
    (scales,) = (each for each in tables if each.dtype == np.float32)
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    norm, norm_up = ([arrays[name] for name in node.input[1:]] for node in norms)
    first, second = (onnx.helper.get_node_attr_value(node, "epsilon") for node in norms)
    dense: dict[tuple[str, bool], Dense] = {}
    for node in graph.node:
        widened = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if widened is not None and widened.op_type == "Mul":
            steps = arrays[makers[widened.input[0]].input[0]]
            bias = _bias_of(node.output[0], graph.node, arrays)
            dense[node.input[0], bias is not None] = Dense(steps, arrays[widened.input[1]], bias)
    try:
        return EdgeWeights(
            slots=graph.input[0].type.tensor_type.shape.dim[1].dim_value,
            table=table,
            scales=scales,
            norm=Norm(norm[0], norm[1], first),
            up=dense[norms[0].output[0], True],
            norm_up=Norm(norm_up[0], norm_up[1], second),
            head=dense[norms[1].output[0], True],
            direct=dense[norms[0].output[0], False],
        )
    except KeyError:
        raise BundleError("the layers of the model are not those of tools.train_commands") from None


def _bias_of(product: str, nodes: Sequence[Any], arrays: dict[str, NDArray[Any]]) -> Floats | None:
    """The constant that is added to `product`."""
    users = [node for node in nodes if node.op_type == "Add" and node.input[0] == product]
    return arrays.get(users[0].input[1]) if users else None


def convert(source: Path, out: Path, texts: Sequence[str]) -> Bundle:
    """Write the TFLite bundle of `source` to `out` if both give all `texts` the same label. Raises BundleError."""
    bundle = load_bundle(source)
    manifest = bundle.manifest
    files = {name: data for name, data in bundle.files.items() if name != manifest.model}
    files["model.tflite"] = export_tflite(read_weights(bundle.files[manifest.model]))
    fields = {"engine": "tflite", "model": "model.tflite"}
    with tempfile.TemporaryDirectory() as folder:
        rewrite(bundle, Path(folder) / manifest.name, files, **fields)
        labels = [answers_of(f"{path}/", texts).labels for path in (source, Path(folder) / manifest.name)]
    different = np.flatnonzero(labels[0] != labels[1])
    if len(different):
        raise BundleError(f"{len(different)} of {len(texts)} texts get another label; nothing was written")
    return rewrite(bundle, out, files, **fields)


def made_up_texts(count: int = 512) -> list[str]:
    """Random strings of letters and spaces: without rows, these are enough to find a wrong layer."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz" + " " * 6))
    return ["".join(rng.choice(letters, rng.integers(1, 80))) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of an ONNX bundle of tools.train_commands")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--check", type=Path, help="JSONL or CSV whose texts must get equal labels")
    arguments = parser.parse_args()
    try:
        rows = read_rows(arguments.check, "val") if arguments.check else []
        texts = [row.text for row in rows] or made_up_texts()
        bundle = convert(arguments.source, arguments.out, texts)
    except (EdgeRuntimeError, BadRows) as error:
        sys.exit(f"convert_tflite: {error}")
    print(f"{bundle.stored_bytes} bytes; {len(texts)} of {len(texts)} labels agree")


if __name__ == "__main__":
    main()
