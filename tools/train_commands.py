"""Make a calibrated, quantised bundle from a file of commands:

    python -m tools.train_commands commands.csv --tier edge --name my-commands --out my-commands

DATA is JSONL or CSV with `text` and `label`, optionally `split` (train or val); the label `oos` marks out-of-scope
texts. A killed run continues where it stopped when it is started again. docs/training.md has the details.
"""

import argparse
import datetime as dt
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from edge_runtime.bundles.folder import Bundle, find_bundle, load_bundle, sign_bundle
from edge_runtime.bundles.manifest import MANIFEST, CreditEntry
from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.protocol.ids import is_id
from edge_runtime.engines.build import build_engine
from tools.calibrate import report_lines, share
from tools.calibration.fit import ESCALATE, Calibrated, calibrate
from tools.pack import MINILM, engine_logits, next_version, pack_classifier, refuse_other_folder
from tools.rows import BadRows, LabelledText, digest_of, read_rows
from tools.trained_rows import found_in, read_trained, remember
from tools.training.data import Data, prepare
from tools.training.edge import SELF_TAUGHT, Trained, train_edge
from tools.training.own_teacher import OwnTeacher
from tools.training.report import confusions, label_table, microseconds, write_report
from tools.training.sentences import is_english
from tools.training.teacher import BundleTeacher, Teacher

#: The word for --teacher that stands for no teacher.
NOBODY = "none"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    try:
        _check(arguments)
        report = run(arguments)
    except (BadRows, EdgeRuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join(["", *report["summary"], "", "Next:", *report["next"]]))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, calibrate, pack, sign, report. Raises BadRows, EdgeRuntimeError and OSError."""
    began = time.monotonic()
    out: Path = arguments.out
    refuse_other_folder(out)
    key = arguments.key.read_bytes() if arguments.key else None
    torch.set_num_threads(arguments.threads)
    rows = read_rows(arguments.data)
    data = prepare(rows, seed=arguments.seed, where=arguments.data.name)
    notes = [*data.notes, *_notes(rows, data, arguments.teacher)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(data.train)} train and {len(data.val)} val rows, {len(data.names)} labels", file=sys.stderr)
    trained, made_from = _train(arguments, data)
    engine = build_engine("onnx", trained.model, max_batch=trained.max_batch, threads=arguments.threads)
    logits = engine_logits(engine, trained.rows, labels=len(data.names))
    engine.close()
    calibrated = calibrate(
        logits,
        data.val.labels,
        data.oos,
        fitted_on=f"val rows of {arguments.data.name}",
        escalate=arguments.escalate,
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        data_sha256=digest_of(
            LabelledText(text, data.names[label])
            for text, label in zip(data.val.texts, data.val.labels, strict=True)
        ),
    )
    bundle = pack_classifier(
        out,
        name=arguments.name,
        version=str(arguments.bundle_version or _next_version(out)),
        model=trained.model,
        labels=data.names,
        processing=trained.processing,
        max_batch=trained.max_batch,
        calibration=calibrated.entry,
        licence=arguments.licence,
        credits_=[*(arguments.credit or [_own(arguments.data, data)]), *made_from],
        metrics=calibrated.report.metrics("val_")
        | {"train_rows": len(data.train), "data_sha256": data.sha256},
        trained_rows=remember(data.train.texts).to_bytes(),
        extra=trained.extra,
    )
    if key is not None:
        bundle = sign_bundle(out, key)
    answers = logits.argmax(1)
    report = {
        **_report(arguments, data, trained, calibrated, bundle),
        "notes": notes,
        "confusions": confusions(data, answers),
        "labels": label_table(data, answers),
        "microseconds": microseconds(out.resolve(), data.val.texts),
        "seconds": round(time.monotonic() - began, 1),
    }
    folder = arguments.report or beside(out, "-report")
    write_report(folder, report, trained.curve, calibrated.curve)
    example = next(
        (text for text, right in zip(data.val.texts, answers == data.val.labels, strict=True) if right), ""
    )
    config = _write_config(folder, out, arguments.key)
    report["summary"] = _summary(report, calibrated)
    report["next"] = _next(arguments, config, example or data.train.texts[0], folder)
    return report


def beside(out: Path, suffix: str) -> Path:
    """A folder next to the bundle: inside it nothing but the bundle may lie."""
    return out.with_name(out.name + suffix)


def _train(arguments: argparse.Namespace, data: Data) -> tuple[Trained, list[CreditEntry]]:
    """Run the tier's trainer; also whose weights went in besides the data."""
    work = arguments.work or beside(arguments.out, ".work")
    common = {"work": work, "seed": arguments.seed, "epochs": arguments.epochs}
    if arguments.tier == "edge":
        teacher = _teacher(arguments, data)
        known = {credit.name for credit in arguments.credit or ()}
        made_from = [credit for credit in teacher.credits if credit.name not in known] if teacher else []
        recipe = SELF_TAUGHT if isinstance(teacher, OwnTeacher) else None
        return train_edge(data, teacher=teacher, recipe=recipe, **common), made_from
    from tools.training.cloud import train_cloud

    given = arguments.member_checkpoints or ()
    trained = train_cloud(data, members=arguments.members, given=given, distil=arguments.distil, **common)
    return trained, [MINILM]


def _teacher(arguments: argparse.Namespace, data: Data) -> Teacher | None:
    """The bundle that was named; else the sentence encoder where it is installed and knows the language."""
    if arguments.teacher == NOBODY:
        return None
    if arguments.teacher is not None:
        return BundleTeacher(find_bundle(arguments.teacher), data.names, arguments.threads)
    if not is_english(data.train.texts):
        return None
    try:
        return OwnTeacher(data, seed=arguments.seed)
    except EdgeRuntimeError as error:
        print(f"note: no teacher: {error}", file=sys.stderr)
        return None


def _notes(rows: Sequence[LabelledText], data: Data, teacher: str | None) -> list[str]:
    notes = []
    if any(row.slots for row in rows):
        notes.append("slots are not learned here; tools.train_slots does that")
    if not len(data.val):
        notes.append("no row could be set aside: accuracy is unknown and the confidence a guess")
    elif len(data.val) < 200:
        notes.append(f"{len(data.val)} val rows say little of the confidence; 200 more make a calibration")
    bundle = load_bundle(find_bundle(teacher)) if teacher not in (None, NOBODY) else None
    if bundle is not None and bundle.manifest.trained_rows:
        found, too_many = found_in(read_trained(bundle.files[bundle.manifest.trained_rows]), data.val.texts)
        if too_many:
            notes.append(
                f"the teacher has learned {len(found)} of the val rows: accuracy and confidence flatter; train the "
                "teacher on the same file with the same seed"
            )
    return notes


def _report(
    arguments: argparse.Namespace, data: Data, trained: Trained, calibrated: Calibrated, bundle: Bundle
) -> dict[str, Any]:
    entry = calibrated.entry
    return {
        "name": arguments.name,
        "version": bundle.manifest.version,
        "tier": arguments.tier,
        "bundle": str(arguments.out),
        "digest": bundle.digest,
        "bytes": bundle.stored_bytes,
        "signed": arguments.key is not None,
        "data": {
            "file": arguments.data.name,
            "sha256": data.sha256,
            "train": len(data.train),
            "val": len(data.val),
            "labels": len(data.names),
        },
        "calibration": {
            **msgspec.to_builtins(calibrated.report),
            "temperature": round(entry.temperature, 4),
            "accept_threshold": None if entry.accept_threshold is None else round(entry.accept_threshold, 4),
            "curve": [{"rows": b.rows, "claimed": b.claimed, "true": b.true} for b in calibrated.curve],
        },
        "certificates": msgspec.to_builtins(entry.certificates),
        "training": [msgspec.to_builtins(point) for point in trained.curve],
        "recipe": trained.recipe,
        "seed": arguments.seed,
        "teacher": trained.teacher,
    }


def _summary(report: dict[str, Any], calibrated: Calibrated) -> list[str]:
    us = report["microseconds"]
    return [
        (
            f"{report['bundle']}: {report['name']} {report['version']}, {report['bytes']:,} bytes, "
            f"{us['text']:.0f} + {us['model']:.0f} µs a text, made in {report['seconds']:.0f} s"
        ),
        *report_lines(calibrated),
    ]


def _next(arguments: argparse.Namespace, config: Path, example: str, folder: Path) -> list[str]:
    """Commands that work as they stand, from this folder."""
    quoted = shlex.quote(str(config))
    lines = [
        f"  see   {folder / 'report.html'}",
        f"  edge-runtime serve --config {quoted}",
        f"  edge-runtime ask --config {quoted} --model {arguments.name} {shlex.quote(example)}",
    ]
    if arguments.key is None:
        lines += [
            f"  edge-runtime models sign {shlex.quote(str(arguments.out))} --key KEY     # a key: edge-runtime models keygen KEY",
            f"  {config} lets unsigned bundles run; on a device write [trust] keys instead",
        ]
    return lines


def _write_config(folder: Path, out: Path, key: Path | None) -> Path:
    """A configuration that serves the bundle from the folder the command was run in."""
    public = key.with_name(key.name + ".pub") if key is not None else None
    trust = (
        f"keys = [{json.dumps(str(public), ensure_ascii=False)}]"
        if public is not None and public.exists()
        else "unsigned = true                # for a trial; on a device: keys = [...]"
    )
    path = out if out.is_absolute() or str(out).startswith(".") else Path(f"./{out}")
    name = json.dumps(str(path) if str(path).startswith((".", "/")) else f"./{path}", ensure_ascii=False)
    config = folder / "edge.toml"
    config.write_text(f"models = [{name}]\n\n[trust]\n{trust}\n", encoding="utf-8")
    return config


def _own(path: Path, data: Data) -> CreditEntry:
    return CreditEntry(f"data: {path.name}", "not stated", "not stated", f"sha256:{data.sha256}")


def _next_version(out: Path) -> int:
    """Devices refuse another bundle of the same version, so each one made counts up."""
    return int(next_version(load_bundle(out))) if (out / MANIFEST).exists() else 1


def _credit(text: str) -> CreditEntry:
    parts = [part.strip() for part in text.split("|")]
    if not 3 <= len(parts) <= 4 or not all(parts[:3]):
        raise argparse.ArgumentTypeError("write NAME|AUTHORS|LICENCE or NAME|AUTHORS|LICENCE|URL")
    return CreditEntry(*parts)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _check(arguments: argparse.Namespace) -> None:
    if not is_id(arguments.name):
        raise BadRows(f"--name {arguments.name!r}: use lower-case letters, digits, dot, dash and underscore.")
    if arguments.teacher and arguments.tier == "cloud":
        raise BadRows("--teacher is for the edge tier; the cloud's is the teacher.")
    members = len(arguments.member_checkpoints or ()) or arguments.members
    if arguments.tier == "edge" and (arguments.member_checkpoints or members > 1 or arguments.distil):
        raise BadRows("--members, --member-checkpoints and --distil are for the cloud tier.")
    if arguments.distil and members < 2:
        raise BadRows("--distil learns from several members: add --members 2, or two --member-checkpoints.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("data", type=Path, metavar="DATA", help="JSONL or CSV with text and label")
    options.add_argument("--tier", choices=("edge", "cloud"), required=True)
    options.add_argument("--name", required=True, help="what clients call the model")
    options.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    options.add_argument(
        "--teacher",
        metavar="BUNDLE",
        help="edge: learn its answers besides the labels (./folder or name); 'none': nobody's; default, for English: "
        "what a sentence encoder and an n-gram net say",
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--epochs", type=_positive)
    options.add_argument("--threads", type=_positive, default=2)
    options.add_argument("--key", type=Path, help="private key to sign with, as keygen wrote it")
    options.add_argument("--bundle-version", type=_positive, help="default: one more than what is there")
    options.add_argument(
        "--work", type=Path, help="folder from which a stopped run continues; default: OUT.work"
    )
    options.add_argument(
        "--report", type=Path, help="where report.json and report.html go; default: OUT-report"
    )
    options.add_argument("--members", type=_positive, default=1, help="cloud: encoders whose mean answers")
    options.add_argument(
        "--member-checkpoints", type=Path, nargs="+", metavar="PT", help="cloud: pack these, train none"
    )
    options.add_argument(
        "--distil",
        action="store_true",
        help="cloud: one epoch more for a single encoder that learns what the members say together",
    )
    options.add_argument("--escalate", type=share, default=ESCALATE, help="share of in-scope rows to send on")
    options.add_argument("--licence", default="not stated", help="of the bundle")
    options.add_argument(
        "--credit", type=_credit, action="append", help="NAME|AUTHORS|LICENCE|URL of the data; repeatable"
    )
    options.add_argument("--json", action="store_true", help="for machines")
    return options


if __name__ == "__main__":
    main()
