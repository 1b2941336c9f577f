"""Measure a bundle on labelled texts, alone and with a cloud bundle behind it.

    python -m tools.evaluate models/commands DATA.jsonl --split val --cloud models/commands-cloud --plot curve.png

With `--cloud` both bundles answer every row. Each point of the curve escalates a share of the in-scope rows, the least
sure first. An escalated row gets the answer that the runtime would give: fused from both tiers if the edge bundle is
fitted for this cloud bundle (`python -m tools.fuse`), else the cloud's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.folder import find_bundle, load_bundle
from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.escalation.score_fusion import pool
from edge_runtime.loading.model import load_model
from edge_runtime.processing import decode_rows, encode_rows
from tools.calibration.error import expected_calibration_error
from tools.pack import labels_of, outputs_of
from tools.rows import OOS, BadRows, LabelledText, read_rows

SHARES = (0.05, 0.10, 0.15, 0.20, 0.30)


@dataclass(frozen=True)
class Answers:
    """A bundle's answer to each row: label names and calibrated confidences `[n]`.

    `scores` are the log-probabilities `[n, labels]`, None for tasks that have none.
    """

    labels: NDArray[np.str_]
    confidence: NDArray[np.float64]
    scores: NDArray[np.float32] | None = None


def answers_of(bundle: str, texts: Sequence[str], *, threads: int = 2) -> Answers:
    """Ask as the bundle is served: grouped by shape, in batches; progress on stderr. Raises BundleError."""
    model = load_model(bundle, threads=threads)

    def after_batch(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{bundle}: {done}/{len(texts)}", end="", file=sys.stderr)

    raw = [text.encode() for text in texts]
    outputs = outputs_of(model.engine, encode_rows(model.processor, raw), after_batch)
    model.engine.close()
    answers = decode_rows(model.processor, outputs, raw)
    labels = [answer.values[0].decode() for answer in answers if isinstance(answer.values[0], bytes)]
    scores = [answer.extras[0] for answer in answers if answer.extras]
    return Answers(
        np.array(labels),
        np.array([answer.confidence or 0.0 for answer in answers]),
        np.stack(scores) if scores else None,
    )


def joined(bundle: str, edge: Answers, cloud_bundle: str, cloud: Answers) -> Answers:
    """What the runtime answers for escalated rows: joined where `bundle` is fitted for this cloud, else the cloud's."""
    loaded = load_bundle(find_bundle(bundle))
    calibration = loaded.manifest.calibration
    fusion = calibration.fusion if calibration is not None else None
    version = load_bundle(find_bundle(cloud_bundle)).manifest.version
    if fusion is None or fusion.cloud_version != version or edge.scores is None or cloud.scores is None:
        return cloud
    if labels_of(loaded) != labels_of(load_bundle(find_bundle(cloud_bundle))):
        raise EdgeRuntimeError("The two bundles have different labels; give the cloud's of the same task.")
    pooled = pool(edge.scores, cloud.scores, fusion.edge_weight, fusion.cloud_weight)
    best = pooled.argmax(1)
    knots = np.array(fusion.knots)
    labels = np.array(labels_of(loaded))
    return Answers(labels[best], np.interp(np.exp(pooled.max(1)), knots[:, 0], knots[:, 1]), pooled)


def alone(edge: Answers, truth: NDArray[np.str_]) -> dict[str, float]:
    """Accuracy inside and outside the scope, and the error of the calibrated confidence over all rows."""
    right, inside = edge.labels == truth, truth != OOS
    report = {
        "rows": float(len(truth)),
        "in_scope": float(inside.sum()),
        "accuracy": float(right[inside].mean()),
        "ece": expected_calibration_error(edge.confidence, right),
    }
    return report | ({"oos_recall": float(right[~inside].mean())} if not inside.all() else {})


@dataclass(frozen=True)
class Point:
    """What happens when the share `offload` of in-scope rows is asked again in the cloud."""

    offload: float
    accuracy: float
    oos_escalated: float | None


def cascade(edge: Answers, back: Answers, truth: NDArray[np.str_]) -> list[Point]:
    """A point per in-scope row more that is escalated, the least sure first; `back` is what escalated rows get."""
    inside = truth != OOS
    order = np.argsort(edge.confidence[inside], kind="stable")
    n = len(order)
    right_edge = (edge.labels == truth)[inside][order]

    gained = np.cumsum((back.labels == truth)[inside][order].astype(int) - right_edge.astype(int))
    accuracy = (right_edge.sum() + np.concatenate([[0], gained])) / n
    bounds = np.append(edge.confidence[inside][order], np.inf)
    outside = edge.confidence[~inside]
    return [
        Point(
            k / n,
            float(accuracy[k]),
            float((outside < bounds[k]).mean()) if len(outside) else None,
        )
        for k in range(n + 1)
    ]


def summary(points: Sequence[Point], cloud_accuracy: float) -> dict[str, Any]:
    """The figures people compare: areas, chosen shares, and where the cascade equals the cloud alone."""
    last = len(points) - 1
    equal = next((p.offload for p in points if p.accuracy >= cloud_accuracy), None)
    above = next((p.offload for p in points if p.accuracy > cloud_accuracy), None)
    return {
        "cloud_accuracy": cloud_accuracy,
        "area": float(np.mean([p.accuracy for p in points])),
        "at": [asdict(points[round(share * last)]) for share in SHARES],
        "equals_cloud_at": equal,
        "above_cloud_at": above,
        "best_accuracy": max(p.accuracy for p in points),
    }


def plot(points: Sequence[Point], cloud_accuracy: float, out: Path) -> None:
    """Accuracy against offload as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    shares = [100 * p.offload for p in points]
    axes.plot(shares, [100 * p.accuracy for p in points], label="edge, unsure rows from the cloud")
    axes.axhline(100 * cloud_accuracy, linestyle=":", color="grey", label="cloud alone")
    axes.set_xlabel("in-scope requests escalated, %")
    axes.set_ylabel("in-scope accuracy, %")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)


def evaluate(
    bundle: str, rows: Sequence[LabelledText], cloud: str | None, picture: Path | None
) -> dict[str, Any]:
    """Everything `main` prints. Raises BundleError."""
    texts, truth = [row.text for row in rows], np.array([row.label for row in rows])
    known = labels_of(load_bundle(find_bundle(bundle)))
    foreign = sorted({row.label for row in rows} - {*known, OOS})
    if foreign:
        raise EdgeRuntimeError(
            f"The bundle does not know the label {foreign[0]!r}; give rows with its labels."
        )
    if not (truth != OOS).any():
        raise EdgeRuntimeError("There are no rows in scope to judge by; give some, or another --split.")
    edge = answers_of(bundle, texts)
    report: dict[str, Any] = {"bundle": bundle, **alone(edge, truth)}
    if cloud is not None:
        second = answers_of(cloud, texts)
        report["cloud"] = {"bundle": cloud, **alone(second, truth)}
        back = joined(bundle, edge, cloud, second)
        points = cascade(edge, back, truth)
        report["cascade"] = summary(points, report["cloud"]["accuracy"])
        report["cascade"]["joined"] = back is not second
        if back is not second:
            report["cascade"]["ece"] = expected_calibration_error(back.confidence, back.labels == truth)
        if picture is not None:
            plot(points, report["cloud"]["accuracy"], picture)
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{part['bundle']}: {part['accuracy']:.2%} of {part['in_scope']:.0f} rows in scope right, "
        f"calibration error {part['ece']:.3f}"
        for part in (report, report.get("cloud"))
        if part
    ]
    if "cascade" in report:
        found = report["cascade"]
        lines.append(
            "escalated rows get "
            + ("both tiers' joined evidence" if found["joined"] else "the cloud's answer")
        )
        lines.append("| in scope escalated | accuracy | out of scope escalated |\n|---|---|---|")
        lines += [
            f"| {p['offload']:.0%} | {p['accuracy']:.2%} | "
            + (f"{p['oos_escalated']:.0%} |" if p["oos_escalated"] is not None else "- |")
            for p in found["at"]
        ]
        for name, word in (("equals_cloud_at", "equals"), ("above_cloud_at", "is above")):
            share = found[name]
            lines.append(
                f"the cascade {word} the cloud "
                + (f"from {share:.1%} escalated" if share is not None else "nowhere")
            )
        lines.append(f"area under the curve {found['area']:.4f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a bundle's folder or name")
    parser.add_argument("data", type=Path, help="JSONL or CSV with text and label, optionally split")
    parser.add_argument(
        "--split", choices=("train", "val"), default="val", help="rows to use where the file has splits"
    )
    parser.add_argument("--cloud", help="the bundle behind it")
    parser.add_argument("--plot", type=Path, help="where to write the curve as PNG")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.cloud:
        parser.error("--plot draws the curve of a cascade; give --cloud too")
    try:
        rows = read_rows(arguments.data, arguments.split)
        report = evaluate(arguments.bundle, rows, arguments.cloud, arguments.plot)
    except (BadRows, EdgeRuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(report) if arguments.json else "\n".join(_lines(report)))


if __name__ == "__main__":
    main()
