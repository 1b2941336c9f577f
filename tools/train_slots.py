"""Train a bundle that finds intents and slots (`text_slots`) and pack it.

    python -m tools.snips FOLDER build/snips.jsonl
    python -m tools.train_slots build/snips.jsonl --out models/commands-slots --checkpoint build/slots

DATA is JSONL or CSV with text, label, slots and split. A small quantised net learns from the rows, and from rows
in which values of a slot are exchanged; it has no teacher. With `--checkpoint FOLDER` every epoch is kept, and a killed
run continues after the last one. Progress goes to stderr, the report as JSON to stdout.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.bundles.folder import write_bundle
from edge_runtime.bundles.manifest import CalibrationEntry
from edge_runtime.processing.text_slots import best_path, chances_of, spans_of
from edge_runtime.processing.words import WordFeaturiser
from tools.evaluate_slots import evaluate
from tools.rows import BadRows, LabelledText, digest_of, read_rows
from tools.slots.calibration import calibrate
from tools.slots.fit import Lessons, Recipe, Trainer
from tools.slots.net import Shape, SlotNet, export, logits_of
from tools.slots.rows import Exchange, encoded, tags_of
from tools.snips import CREDIT

FEATURES, GRAMS, LENGTHS = 20, (3, 4), (8, 12, 16, 24, 32, 64)
#: Longest training text in words; SNIPS has 39.
WORDS = 40


def say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def exact_of(
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
    rows: Sequence[LabelledText],
    intents: Sequence[str],
    slots: Sequence[str],
    temperature: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], float, float]:
    """Each row's score, whether all of it is right, intent accuracy and F1 of spans of words."""
    scores, right, named, hits, sizes = [], [], 0, 0, 0
    for by_intent, by_tag, row in zip(*logits, rows, strict=True):
        truth = tags_of(row, slots, WORDS)
        tags = by_tag[: len(truth)]
        path = best_path(tags)
        found, wanted = set(spans_of(path)), set(spans_of(truth))
        best = int(by_intent.argmax())
        scores.append(
            chances_of(by_intent[None], [best], temperature)[0]
            * math.prod(chances_of(tags, path, temperature))
        )
        named += intents[best] == row.label
        hits, sizes = hits + len(found & wanted), sizes + len(found) + len(wanted)
        right.append(intents[best] == row.label and found == wanted)
    return np.array(scores, np.float64), np.array(right), named / len(rows), 2 * hits / max(1, sizes)


def lessons_of(
    featuriser: WordFeaturiser,
    rows: Sequence[LabelledText],
    intents: Sequence[str],
    slots: Sequence[str],
    *,
    made: int,
    seed: int,
) -> Lessons:
    """True rows and made ones."""
    rng = np.random.default_rng(seed)
    exchange = Exchange(rows)
    known = list(rows)
    for _ in range(made):
        known += [exchange.made(row, rng) for row in rows]
    inputs, tags = encoded(featuriser, known, slots, WORDS)
    intents_of = np.array([intents.index(row.label) for row in known])
    return Lessons(inputs, tags, intents_of, len(rows))


def student(
    train: Sequence[LabelledText],
    val: Sequence[LabelledText],
    featuriser: WordFeaturiser,
    intents: Sequence[str],
    slots: Sequence[str],
    arguments: argparse.Namespace,
) -> SlotNet:
    """The trained net: the running mean of the weights."""
    torch.manual_seed(arguments.seed)
    shape = Shape(buckets=arguments.buckets, width=arguments.width)
    net = SlotNet(shape, len(intents), 2 * len(slots) + 1)
    trainer = Trainer(net, len(train), Recipe(epochs=arguments.epochs))
    inputs, _ = encoded(featuriser, val, slots, WORDS)
    kept = arguments.checkpoint / "student.pt" if arguments.checkpoint else None
    if kept is not None and kept.exists():
        trainer.resume(torch.load(kept, weights_only=True))
        say(f"going on behind epoch {trainer.epoch} of {kept}")
    # Making rows takes a minute; weights that only wait to be packed need none.
    made = arguments.made if trainer.epoch < arguments.epochs else 0
    lessons = lessons_of(featuriser, train, intents, slots, made=made, seed=arguments.seed)
    while trainer.epoch < arguments.epochs:
        started = time.monotonic()
        loss = trainer.run_epoch(lessons, arguments.seed * 1000 + trainer.epoch)
        _, right, named, f1 = exact_of(logits_of(trainer.mean, inputs), val, intents, slots, 1.0)
        say(
            f"epoch {trainer.epoch}/{arguments.epochs}: loss {loss:.3f}, val intent {named:.4f}, "
            f"slot F1 {f1:.4f}, wholly right {right.mean():.4f}, {time.monotonic() - started:.0f} s"
        )
        if kept is not None:
            torch.save(trainer.state(), kept)
    return trainer.mean


def pack(
    out: Path,
    net: SlotNet,
    intents: Sequence[str],
    slots: Sequence[str],
    calibration: CalibrationEntry,
    metrics: dict[str, float | str],
    arguments: argparse.Namespace,
) -> None:
    """Write the bundle. Raises BundleError."""
    outputs = (("intent", "BYTES"), ("confidence", "FP32"), ("slots", "BYTES"))
    fields: dict[str, Any] = {
        "name": out.name,
        "version": arguments.bundle_version,
        "task": "text-slots",
        "signature": {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in outputs],
        },
        "engine": "onnx",
        "model": "model.onnx",
        "labels": "labels.json",
        "processing": {
            "kind": "text_slots",
            "version": "1",
            "parameters": {
                "slots": list(slots),
                "features": FEATURES,
                "buckets": net.shape.buckets,
                "grams": GRAMS,
                "lengths": LENGTHS,
            },
        },
        "batch": {"max": 32, "invariant": True},
        "calibration": calibration,
        "licence": arguments.licence,
        "credits": [CREDIT],
        "metrics": metrics,
    }
    payloads = {"model.onnx": export(net, FEATURES), "labels.json": msgspec.json.encode(list(intents))}
    write_bundle(out, fields, payloads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("models/commands-slots"))
    parser.add_argument("--checkpoint", type=Path, help="folder from which a killed run continues")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--made", type=int, default=6, help="made-up rows for each true one")
    parser.add_argument("--buckets", type=int, default=Shape.buckets)
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--bundle-version", default="1")
    parser.add_argument("--licence", default="Apache-2.0; trained on SNIPS voice commands (CC0-1.0)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        train, val = read_rows(arguments.data, "train"), read_rows(arguments.data, "val")
    except BadRows as error:
        say(f"error: {error}")
        sys.exit(1)
    if arguments.checkpoint:
        arguments.checkpoint.mkdir(parents=True, exist_ok=True)
    intents = sorted({row.label for row in train})
    slots = sorted({span.slot for row in train for span in row.slots})
    featuriser = WordFeaturiser(features=FEATURES, buckets=arguments.buckets, grams=GRAMS, lengths=LENGTHS)
    net = student(train, val, featuriser, intents, slots, arguments)
    logits = logits_of(net, encoded(featuriser, val, slots, WORDS)[0])

    def judged(temperature: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return exact_of(logits, val, intents, slots, temperature)[:2]

    targets = [tags_of(row, slots, WORDS) for row in val]
    labels = [intents.index(row.label) for row in val]
    calibration, ece = calibrate(logits, labels, targets, judged)
    calibration = msgspec.structs.replace(
        calibration, fitted_on=f"{len(val)} validation rows", rows=len(val), data_sha256=digest_of(val)
    )
    pack(arguments.out, net, intents, slots, calibration, {}, arguments)
    report = evaluate(str(arguments.out), val)
    metrics = {
        "val_intent_accuracy": round(report["intent_accuracy"], 4),
        "val_slot_f1": round(report["slots"]["f1"], 4),
        "val_exact": round(report["exact"], 4),
        "val_ece": round(ece, 4),
        "val_rows": f"{len(val)} rows held out, one in twenty of each intent; calibrated on these, ECE cross-fitted",
    }
    pack(arguments.out, net, intents, slots, calibration, metrics, arguments)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(
        json.dumps(report | {"cross_fitted_ece": ece, "settings": settings, "data": _digest(arguments.data)})
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
