"""Measure a bundle with intents and slots on labelled texts, and the time of an answer.

    python -m tools.evaluate_slots models/commands-slots DATA.jsonl --split val --json

Rows are asked one by one. Times are medians on one core without the server.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.engines import run_rows
from edge_runtime.loading.model import Model, load_model
from edge_runtime.processing import decode_rows, encode_rows
from tools.rows import BadRows, LabelledText, Span, read_rows
from tools.slots.metrics import Found, report_of


def answers_of(model: Model, texts: Sequence[str]) -> tuple[list[Found], dict[str, float]]:
    """Each text's answer, and the median microseconds of the three parts of an answer."""
    found, times = [], np.zeros((len(texts), 3))
    for i, text in enumerate(texts):
        raw = text.encode()
        marks = [time.perf_counter_ns()]
        (row,) = encode_rows(model.processor, [raw])
        marks.append(time.perf_counter_ns())
        (output,) = run_rows(model.engine, [row])
        marks.append(time.perf_counter_ns())
        intent, confidence, slots = decode_rows(model.processor, [output], [raw])[0].values
        marks.append(time.perf_counter_ns())
        times[i] = np.diff(marks) / 1000
        assert isinstance(intent, bytes)
        assert isinstance(slots, bytes)
        spans = tuple(Span(slot["slot"], slot["start"], slot["end"]) for slot in json.loads(slots))
        found.append(Found(intent.decode(), spans, float(confidence)))
    parts = dict(zip(("encode", "model", "decode"), np.median(times, axis=0).tolist(), strict=True))
    return found, parts | {"all": float(np.median(times.sum(1)))}


def evaluate(bundle: str, rows: Sequence[LabelledText]) -> dict[str, Any]:
    """Everything `main` prints. Raises BundleError."""
    model = load_model(bundle)
    if "slots" not in {spec.name for spec in model.processor.signature.outputs}:
        raise EdgeRuntimeError(f"{bundle} finds no slots; use tools.evaluate for it.")
    texts = [row.text for row in rows]
    answers_of(model, texts[:50])  # binds the buffers of the usual lengths
    found, micros = answers_of(model, texts)
    model.engine.close()
    report = asdict(report_of(found, rows))
    return {"bundle": bundle, **report, "stored_bytes": model.stored_bytes, "micros": micros}


def lines_of(tree: dict[str, Any]) -> list[str]:
    """The report for people."""
    slots, micros = tree["slots"], tree["micros"]
    lines = [
        f"{tree['bundle']}: {tree['rows']} rows, {tree['stored_bytes']:,} bytes",
        f"intent {tree['intent_accuracy']:.2%}, wholly right {tree['exact']:.2%}, calibration error {tree['ece']:.3f}",
        f"slots P {slots['precision']:.2%} R {slots['recall']:.2%} F1 {slots['f1']:.2%}",
        "{all:.0f} us an answer: text {encode:.0f}, model {model:.0f}, reading {decode:.0f}".format(**micros),
        "| slot | P | R | F1 | values |\n|---|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {s['precision']:.1%} | {s['recall']:.1%} | {s['f1']:.1%} | {s['support']} |"
        for name, s in tree["by_slot"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a bundle's folder or name")
    parser.add_argument("data", type=Path, help="JSONL or CSV with text, label and slots, optionally split")
    parser.add_argument(
        "--split", choices=("train", "val"), default="val", help="rows to use where the file has splits"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    try:
        tree = evaluate(arguments.bundle, read_rows(arguments.data, arguments.split))
    except (BadRows, EdgeRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(tree) if arguments.json else "\n".join(lines_of(tree)))


if __name__ == "__main__":
    main()
