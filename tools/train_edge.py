"""Train the edge tier's `commands` bundle on CLINC150: hashed n-grams, a small quantised net, a teacher if given."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.processing.ngrams import NgramFeaturiser
from tools.augment import recombine
from tools.calibrate import calibrate
from tools.clinc import read_clinc
from tools.edge_net import EdgeNet, Recipe, Shape, fit, logits_of
from tools.graph import Graph, onnx
from tools.pack import CLINC, MINILM, bundle_logits, pack_commands

SLOTS, GRAMS = 192, (3, 4, 5)
#: Share of in-scope commands the threshold sends to the cloud.
ESCALATE = 0.15


def export(net: EdgeNet, slots: int) -> bytes:
    """Write the net as ONNX. The bag is a batched [1, slots] x [slots, width] product, each row on its own."""
    net.eval()
    labels = net.head.out_features
    width = net.shape.width

    def array(tensor: torch.Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().numpy(), np.float32)

    scales = net.scales()
    steps = net.rounded(scales).detach().numpy().astype(np.int8)
    weights = array(scales).ravel().copy()
    steps[-1], weights[-1] = 0, 0.0
    graph = Graph()
    entries = graph.op("Cast", graph.op("Gather", graph.weight(steps), "slots"), to=onnx.TensorProto.FLOAT)
    factors = graph.op("Gather", graph.weight(weights), "slots")
    factors = graph.op("Unsqueeze", factors, graph.weight(np.array([1])))
    bag = graph.op("MatMul", factors, entries)
    bag = graph.op("Reshape", bag, graph.weight(np.array([-1, width])))
    x = graph.normalised(bag, array(net.norm.weight), array(net.norm.bias), net.norm.eps)
    hidden = graph.gelu(graph.linear(x, array(net.up.weight).T, array(net.up.bias)))
    hidden = graph.normalised(hidden, array(net.norm_up.weight), array(net.norm_up.bias), net.norm_up.eps)
    head = graph.linear(hidden, array(net.head.weight).T, array(net.head.bias))
    logits = graph.op("Add", head, graph.linear(x, array(net.direct.weight).T))
    return graph.model({"slots": (onnx.TensorProto.INT32, ["batch", slots])}, logits, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data_full*.json of CLINC150")
    parser.add_argument("--teacher", type=Path, help="bundle whose logits are learned besides the labels")
    parser.add_argument("--teacher-cache", type=Path, help="where the teacher's logits are kept (.npy)")
    parser.add_argument("--out", type=Path, default=Path("models/commands"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--recombined", type=int, default=90_000, help="made-up commands for the teacher to label"
    )
    parser.add_argument("--buckets", type=int, default=Shape.buckets)
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--bundle-version", default="1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="kept weights (.pt): written, or read where it exists"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    data = read_clinc(arguments.data)
    shape = Shape(buckets=arguments.buckets, width=arguments.width)
    featuriser = NgramFeaturiser(slots=SLOTS, buckets=shape.buckets, grams=GRAMS, skips=True)

    def slots_of(texts: Sequence[str]) -> NDArray[np.int32]:
        return np.stack([featuriser.encode(text)[0] for text in texts])

    net = EdgeNet(shape, len(data.names))
    val = slots_of(data.val.texts)
    if arguments.checkpoint and arguments.checkpoint.exists():
        net.load_state_dict(torch.load(arguments.checkpoint, weights_only=True))
        net.is_quantised = True
    else:
        texts, labels, teacher = list(data.train.texts), data.train.labels, None
        recipe = Recipe(epochs=arguments.epochs)
        if arguments.teacher:
            rng = np.random.default_rng(arguments.seed)
            made = recombine(data.train.texts, data.train.labels, arguments.recombined, rng)
            # True texts count twice: the made-up ones outnumber them six to one.
            texts = texts * 2 + made
            labels = np.concatenate([labels, labels, np.full(len(made), -1)])
            teacher = _taught(arguments.teacher, arguments.teacher_cache, texts)
            recipe = Recipe(epochs=arguments.epochs, keep=0.85, dropout=0.15, smoothing=0.0)

        def after_epoch(epoch: int) -> None:
            right = logits_of(net, val).argmax(1) == data.val.labels
            share = right[data.val.labels != data.oos].mean()
            print(f"epoch {epoch + 1}/{recipe.epochs}: in-scope val accuracy {share:.4f}", file=sys.stderr)

        fit(net, slots_of(texts), labels, teacher, recipe, seed=arguments.seed, after_epoch=after_epoch)
        if arguments.checkpoint:
            arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), arguments.checkpoint)
    calibration, report = calibrate(
        logits_of(net, val),
        data.val.labels,
        data.oos,
        escalate=ESCALATE,
        fitted_on="CLINC150 val and oos_val",
    )
    bundle = pack_commands(
        arguments.out,
        version=arguments.bundle_version,
        model=export(net, SLOTS),
        labels=data.names,
        processing={
            "kind": "text_ngrams",
            "version": "1",
            "parameters": {"slots": SLOTS, "buckets": shape.buckets, "grams": GRAMS, "skips": True},
        },
        max_batch=64,
        calibration=calibration,
        report=report,
        made_from=[CLINC, MINILM] if arguments.teacher else [CLINC],
    )
    packed = bundle_logits(arguments.out, data.val.texts).argmax(1) == data.val.labels
    print(f"{report}\n{bundle.stored_bytes} bytes; packed {packed[data.val.labels != data.oos].mean():.4f}")


def _taught(bundle: Path, cache: Path | None, texts: Sequence[str]) -> NDArray[np.float32]:
    """The teacher's logits [n, labels]; minutes of work, so they may be kept."""
    if cache is not None and cache.exists():
        return np.asarray(np.load(cache), np.float32)
    logits = bundle_logits(bundle, texts)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, logits)
    return logits


if __name__ == "__main__":
    main()
