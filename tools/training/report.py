"""The report of a training, as JSON and as a self-contained page with plots."""

import html
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import run_rows
from edge_runtime.loading.model import load_model
from edge_runtime.processing import encode_rows
from tools.calibration.error import Bin
from tools.training.data import Data, rows_per_label
from tools.training.loop import Epoch

WORST = 10
_TIMED = 1000


def confusions(data: Data, answers: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The ten pairs of labels that are taken for one another most often, with an example each."""
    wrong = np.flatnonzero(answers != data.val.labels)
    pairs = Counter((int(data.val.labels[i]), int(answers[i])) for i in wrong)
    example = {(int(data.val.labels[i]), int(answers[i])): data.val.texts[i] for i in reversed(wrong)}
    return [
        {"label": data.names[a], "answer": data.names[b], "rows": n, "example": example[a, b]}
        for (a, b), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:WORST]
    ]


def label_table(data: Data, answers: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Rows of each label, and how many of the val ones are right."""
    right = np.bincount(data.val.labels[answers == data.val.labels], minlength=len(data.names))
    return [
        {"label": name, "train": train, "val": val, "right": int(right[i])}
        for i, (name, (train, val)) in enumerate(rows_per_label(data).items())
    ]


def microseconds(bundle: Path, texts: Sequence[str]) -> dict[str, float]:
    """Median time of one text on one thread: turning it into numbers, running the model, both."""
    model = load_model(bundle)
    some = [text.encode() for text in (list(texts) * (1 + 200 // max(1, len(texts))))[:_TIMED]] or [b"hello"]
    for text in some[:50]:
        run_rows(model.engine, encode_rows(model.processor, [text]))
    work, run = [], []
    for text in some:
        began = time.perf_counter()
        (row,) = encode_rows(model.processor, [text])
        encoded = time.perf_counter()
        run_rows(model.engine, [row])
        work.append(encoded - began)
        run.append(time.perf_counter() - encoded)
    model.engine.close()
    found = {"text": float(np.median(work) * 1e6), "model": float(np.median(run) * 1e6)}
    return {key: round(value, 1) for key, value in found.items()}


def write_report(
    folder: Path, report: dict[str, Any], curve: Sequence[Epoch], reliability: Sequence[Bin]
) -> None:
    """Write `report.json` and `report.html` into `folder`. Plots are drawn with matplotlib as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(_page(report, curve, reliability), encoding="utf-8")


def _page(report: dict[str, Any], curve: Sequence[Epoch], reliability: Sequence[Bin]) -> str:
    c = report["calibration"]
    facts = [
        ("tier", report["tier"]),
        ("version", report["version"]),
        ("data", (f"{report['data']['file']}, {report['data']['train']} train and {report['data']['val']} val rows, "
                 f"{report['data']['labels']} labels")),
        ("right in scope", _percent(c["accuracy"])),
        ("out of scope seen as such", _percent(c["oos_recall"])),
        ("calibration error", (f"{c['ece']:.4f}, debiased {c['ece_debiased']:.4f} "
                              f"({c['rows'] + c['oos_rows']} rows, {c['ece_bins']} bins, cross-fitted)")),
        ("escalated in scope", f"{_percent(c['escalated'])} at threshold {c['accept_threshold']}"),
        ("right of what is kept", _percent(c["kept_accuracy"])),
        ("size", f"{report['bytes']:,} bytes"),
        ("one text", f"{report['microseconds']['text']} µs to read, {report['microseconds']['model']} µs to run"),
    ]  # fmt: skip
    parts = [
        f"<h1>{html.escape(report['name'])}</h1>",
        _table((), facts),
        *(f"<p class=note>{html.escape(note)}</p>" for note in report["notes"]),
        "<h2>Is it as sure as it should be?</h2>",
        _svg(_draw_reliability, reliability),
        "<h2>What may be promised</h2>",
        _table(("at most wrong", "keep at", "rows kept", "wrong", "rows missing"), [
            (f"{x['error']:.0%}", "not certifiable" if x["threshold"] is None else f"{x['threshold']:.4f}",
             x["kept"], x["wrong"], x["missing_rows"])
            for x in report["certificates"]
        ]),
        f"<p>With confidence {1 - report['certificates'][0]['delta']:.0%}, for data like these rows.</p>",
        "<h2>Training</h2>",
        _svg(_draw_curve, curve),
        "<h2>What it takes for what</h2>",
        _table(("label", "answered as", "rows", "for example"), [
            (x["label"], x["answer"], x["rows"], x["example"]) for x in report["confusions"]
        ]),
        "<h2>Labels</h2>",
        _table(("label", "train rows", "val rows", "right"), [
            (x["label"], x["train"], x["val"], x["right"])
            for x in sorted(report["labels"], key=lambda x: x["right"] / x["val"] if x["val"] else 2.0)
        ]),
    ]  # fmt: skip
    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{text-align:left;padding:.15em .8em;border-bottom:1px solid #ddd}"
        ".note{background:#fff3d6;padding:.4em .8em;white-space:pre-wrap}svg{max-width:100%;height:auto}"
    )
    title = html.escape(f"{report['name']} {report['version']}")
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    )
    return head + "\n".join(parts) + "</html>\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    top = line(head, "th") if head else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def _draw_reliability(axes: Any, bins: Sequence[Bin]) -> None:
    claimed, true = [b.claimed for b in bins], [b.true for b in bins]
    # Two standard errors: what chance alone does to a bin.
    noise = [2 * (b.true * (1 - b.true) / b.rows) ** 0.5 for b in bins]
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.errorbar(claimed, true, yerr=noise, marker="o", capsize=3)
    axes.set_xlabel("claimed probability of being right")
    axes.set_ylabel("share that is right")


def _draw_curve(axes: Any, curve: Sequence[Epoch]) -> None:
    epochs = range(1, len(curve) + 1)
    axes.plot(epochs, [point.loss for point in curve], color="tab:grey", label="loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    second = axes.twinx()
    shares = [float("nan") if point.accuracy is None else 100 * point.accuracy for point in curve]
    second.plot(epochs, shares, color="tab:blue", label="val")
    second.set_ylabel("right in scope, % of val")


def _svg(draw: Any, points: Sequence[Any]) -> str:
    if not points:
        return "<p>no rows</p>"
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    draw(axes, points)
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]
