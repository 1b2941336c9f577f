"""Bundles of text classifiers: manifest fields, credits, and the answers of a packed model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle import Bundle, write_bundle
from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Row
from edge_runtime.engines import Engine
from edge_runtime.manifest import MANIFEST, CalibrationEntry, CreditEntry, ProcessingEntry
from edge_runtime.model import load_model

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
    """Logits [n, labels] of a packed bundle, computed as it is served; `after_batch` hears of rows done."""
    model = load_model(path, threads=threads)
    rows = [model.processor.encode(text.encode()) for text in texts]
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
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(array.shape for array in row), []).append(i)
    answers: list[NDArray[np.float32] | None] = [None] * len(rows)
    done = 0
    for members in groups.values():
        for start in range(0, len(members), engine.max_batch):
            part = members[start : start + engine.max_batch]
            for i, answer in zip(part, engine.run([rows[i] for i in part]), strict=True):
                answers[i] = answer[0]
            done += len(part)
            if after_batch is not None:
                after_batch(done)
    found = [answer for answer in answers if answer is not None]
    return np.stack(found) if found else np.zeros((0, labels), np.float32)
