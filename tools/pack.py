"""Bundles of text classifiers: manifest fields, credits, and the answers of a packed model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.folder import Bundle, write_bundle
from edge_runtime.bundles.manifest import MANIFEST, CalibrationEntry, CreditEntry, ProcessingEntry
from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Row
from edge_runtime.engines import Engine, run_rows
from edge_runtime.loading.model import load_model
from edge_runtime.processing import encode_rows

MINILM = CreditEntry(
    name="all-MiniLM-L6-v2",
    authors="sentence-transformers; MiniLM by Microsoft",
    licence="Apache-2.0",
    url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
)
SIGNATURE = {
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
    "outputs": [
        {"name": "intent", "datatype": "BYTES", "shape": [-1]},
        {"name": "confidence", "datatype": "FP32", "shape": [-1]},
    ],
}


def pack_classifier(
    out: Path,
    *,
    name: str,
    version: str,
    model: bytes,
    labels: Sequence[str],
    processing: ProcessingEntry,
    max_batch: int,
    calibration: CalibrationEntry,
    licence: str,
    credits_: Sequence[CreditEntry],
    metrics: Mapping[str, float | str],
    trained_rows: bytes | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Write a bundle that turns texts into intents. `extra` are payloads besides the model and the labels.

    Raises BundleError for what `load_bundle` would refuse.
    """
    files = {"model.onnx": model, "labels.json": msgspec.json.encode(list(labels)), **(extra or {})}
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "task": "text-classification",
        "signature": SIGNATURE,
        "engine": "onnx",
        "model": "model.onnx",
        "labels": "labels.json",
        "processing": processing,
        "batch": {"max": max_batch, "invariant": True},
        "calibration": calibration,
        "licence": licence,
        "credits": list(credits_),
        "metrics": dict(metrics),
    }
    if trained_rows is not None:
        files["trained.bin"] = trained_rows
        fields["trained_rows"] = "trained.bin"
    return write_bundle(out, fields, files)


def rewrite(bundle: Bundle, out: Path, files: Mapping[str, bytes] | None = None, **changes: Any) -> Bundle:
    """Write `bundle` to `out` with other manifest fields, unsigned, and with `files` in place of its payloads.

    Raises BundleError.
    """
    fields: dict[str, Any] = msgspec.to_builtins(bundle.manifest) | changes
    for computed in ("format", "files"):
        del fields[computed]
    return write_bundle(out, fields, bundle.files if files is None else files)


def next_version(bundle: Bundle) -> str:
    """The version of changed content: devices refuse other content under one they know."""
    return str(int(bundle.manifest.version) + 1)


def labels_of(bundle: Bundle) -> list[str]:
    """The bundle's labels in the order of the logits. Raises BundleError where it has none."""
    if bundle.manifest.labels is None or bundle.manifest.calibration is None:
        raise BundleError(
            f"bundle {bundle.manifest.name!r} has no labels with a confidence; give another one"
        )
    if bundle.manifest.task != "text-classification":
        raise BundleError(
            f"bundle {bundle.manifest.name!r} is for {bundle.manifest.task}; its confidence is not of labels alone, so "
            "train it again with its own tool"
        )
    return list(msgspec.json.decode(bundle.files[bundle.manifest.labels], type=list[str]))


def refuse_other_folder(out: Path) -> None:
    """Raise BundleError where writing a bundle to `out` would replace something that is none."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise BundleError(f"{out.name!r} exists and is no bundle; choose another place")


def bundle_logits(
    path: Path,
    texts: Sequence[str],
    threads: int = 2,
    after_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Logits [n, labels] of a packed bundle, computed as the runtime computes them; `after_batch` is called with the number of rows done."""
    model = load_model(path, threads=threads)
    rows = encode_rows(model.processor, [text.encode() for text in texts])
    return engine_logits(model.engine, rows, after_batch)


def engine_logits(
    engine: Engine,
    rows: Sequence[Row],
    after_batch: Callable[[int], None] | None = None,
    *,
    labels: int = 0,
) -> NDArray[np.float32]:
    """Logits [n, labels] of encoded rows: grouped by shape, in batches as large as the engine takes.

    `labels` is the width where there are no rows.
    """
    found = [output[0] for output in outputs_of(engine, rows, after_batch)]
    return np.stack(found) if found else np.zeros((0, labels), np.float32)


def outputs_of(
    engine: Engine, rows: Sequence[Row], after_batch: Callable[[int], None] | None = None
) -> list[Row]:
    """The model's outputs for encoded rows, in their order: grouped by shape, in batches as large as the engine takes."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(array.shape for array in row), []).append(i)
    outputs: list[Row] = [()] * len(rows)
    done = 0
    for members in groups.values():
        for start in range(0, len(members), engine.max_batch):
            part = members[start : start + engine.max_batch]
            for i, output in zip(part, run_rows(engine, [rows[i] for i in part]), strict=True):
                outputs[i] = output
            done += len(part)
            if after_batch is not None:
                after_batch(done)
    return outputs
