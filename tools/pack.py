"""What the two commands bundles have in common: manifest fields, credits, and answers of a packed bundle."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle import Bundle, write_bundle
from edge_runtime.core.messages import Row
from edge_runtime.manifest import CalibrationEntry, CreditEntry
from edge_runtime.model import load_model
from tools.calibrate import Report

CLINC = CreditEntry(
    name="CLINC150",
    authors="Stefan Larson, Anish Mahendran, Joseph J. Peper, Christopher Clarke, Andrew Lee, Parker Hill, "
    "Jonathan K. Kummerfeld, Kevin Leach, Michael A. Laurenzano, Lingjia Tang, Jason Mars (2019)",
    licence="CC-BY-3.0",
    url="https://github.com/clinc/oos-eval",
)
MINILM = CreditEntry(
    name="all-MiniLM-L6-v2",
    authors="sentence-transformers; MiniLM by Microsoft",
    licence="Apache-2.0",
    url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
)


def pack_commands(
    out: Path,
    *,
    version: str,
    model: bytes,
    labels: Sequence[str],
    processing: dict[str, Any],
    max_batch: int,
    calibration: CalibrationEntry,
    report: Report,
    made_from: Sequence[CreditEntry],
    extra: dict[str, bytes] | None = None,
) -> Bundle:
    """Write a bundle of the task `commands`. `extra` are payloads besides the model and the labels."""
    fields = {
        "name": "commands",
        "version": version,
        "task": "text-classification",
        "signature": {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": "intent", "datatype": "BYTES", "shape": [-1]},
                {"name": "confidence", "datatype": "FP32", "shape": [-1]},
            ],
        },
        "engine": "onnx",
        "model": "model.onnx",
        "labels": "labels.json",
        "processing": processing,
        "batch": {"max": max_batch, "invariant": True},
        "calibration": calibration,
        "licence": "Apache-2.0; trained on CLINC150 (CC-BY-3.0)",
        "credits": list(made_from),
        "metrics": {f"val_{key}": round(value, 4) for key, value in asdict(report).items()}
        | {"val_rows": "3000 in scope, 100 out of scope; fitted on train, chosen and calibrated on these"},
    }
    files = {"model.onnx": model, "labels.json": msgspec.json.encode(list(labels)), **(extra or {})}
    return write_bundle(out, fields, files)


def bundle_logits(path: Path, texts: Sequence[str], threads: int = 2) -> NDArray[np.float32]:
    """Logits [n, labels] of a packed bundle, computed as it is served: grouped by shape, in batches."""
    model = load_model(path, threads=threads)
    rows = [model.processor.encode(text.encode()) for text in texts]
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(array.shape for array in row), []).append(i)
    answers: list[Row | None] = [None] * len(rows)
    for members in groups.values():
        for start in range(0, len(members), model.max_batch):
            part = members[start : start + model.max_batch]
            for i, answer in zip(part, model.engine.run([rows[i] for i in part]), strict=True):
                answers[i] = answer
    return np.stack([answer[0] for answer in answers if answer is not None])
