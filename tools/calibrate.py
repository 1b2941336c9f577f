"""Fit the confidence of a bundle to labelled texts of your own.

    python -m tools.calibrate ./my-bundle FRESH.jsonl --key my-key

The model stays the same. Temperature, map, threshold and certificates are fitted to the rows, and the version of the
bundle goes up by one. This needs at least 200 rows on which the model was not trained.
"""

import argparse
import datetime as dt
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.bundles.folder import SIGNATURE, Bundle, find_bundle, load_bundle, sign_bundle
from edge_runtime.bundles.manifest import CertificateEntry
from edge_runtime.core.errors import EdgeRuntimeError
from tools.calibration.certificates import MIN_ROWS
from tools.calibration.fit import ESCALATE, Calibrated, calibrate
from tools.pack import bundle_logits, labels_of, next_version, refuse_other_folder, rewrite
from tools.rows import OOS, BadRows, LabelledText, digest_of, read_rows, shortened
from tools.trained_rows import found_in, read_trained


def fresh_rows(bundle: Bundle, rows: Sequence[LabelledText], where: str) -> list[LabelledText]:
    """Return the rows that may calibrate: those with a label of the bundle that are not among its training rows.

    Out-of-scope rows are always accepted. Raises BadRows, with line numbers, for unknown labels, for more known
    texts than false positives explain, and for fewer than 200 rows.
    """
    labels = set(labels_of(bundle))
    unknown = [row for row in rows if row.label not in labels | {OOS}]
    if unknown:
        lines = [f"line {row.line}: {row.label}" for row in unknown]
        raise BadRows(
            f"{where}: {len(unknown)} rows have labels that the bundle does not know:\n{shortened(lines)}"
        )
    if bundle.manifest.trained_rows is not None:
        trained = read_trained(bundle.files[bundle.manifest.trained_rows])
        found, too_many = found_in(trained, [row.text for row in rows])
        if too_many:
            lines = [f"line {rows[i].line}: {rows[i].text}" for i in found]
            raise BadRows(
                f"{where}: {len(found)} of {len(rows)} rows were trained on, and would make the model look surer "
                f"than it is; leave them out:\n{shortened(lines)}"
            )
        rows = [row for i, row in enumerate(rows) if i not in set(found)]
    if len(rows) < MIN_ROWS:
        raise BadRows(f"{where}: {len(rows)} rows remain; calibration needs {MIN_ROWS} or more.")
    return list(rows)


def recalibrate(
    source: Path,
    rows: Sequence[LabelledText],
    out: Path,
    *,
    fitted_on: str,
    escalate: float,
    threads: int = 2,
) -> tuple[Bundle, Calibrated]:
    """Write the bundle of `source` to `out` with a calibration of these rows, unsigned and one version up.

    Raises BadRows and BundleError.
    """
    bundle = load_bundle(source)
    rows = fresh_rows(bundle, rows, fitted_on)
    names = labels_of(bundle)
    index = {name: i for i, name in enumerate(names)}
    done = calibrate(
        bundle_logits(source, [row.text for row in rows], threads),
        np.array([index.get(row.label, -1) for row in rows]),
        index.get(OOS),
        fitted_on=fitted_on,
        escalate=escalate,
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        data_sha256=digest_of(rows),
    )
    # Fusion with a cloud was fitted to the earlier scores, and does not outlive them.
    written = rewrite(
        bundle,
        out,
        version=next_version(bundle),
        calibration=done.entry,
        metrics=bundle.manifest.metrics | done.report.metrics("calibration_"),
    )
    return written, done


def certificate_lines(certificates: Sequence[CertificateEntry]) -> list[str]:
    """One sentence for each certificate."""
    lines = []
    for c in certificates:
        if c.threshold is not None:
            lines.append(
                f"at most {c.error:.0%} wrong (confidence {1 - c.delta:.0%}): keep at {c.threshold:.4f} or surer, "
                f"{c.kept} of {c.rows} rows, {c.wrong} wrong"
            )
        elif c.missing_rows:
            lines.append(
                f"at most {c.error:.0%} wrong: not certifiable, about {c.missing_rows} more rows are needed"
            )
        else:
            lines.append(f"at most {c.error:.0%} wrong: not certifiable, the model errs too often")
    return lines


def report_lines(done: Calibrated) -> list[str]:
    """The report as text."""
    r = done.report
    lines = [
        f"{r.accuracy:.2%} of {r.rows} rows in scope right"
        + (f", {r.oos_rows} rows out of scope" if r.oos_rows else ""),
        (
            f"calibration error {r.ece:.4f}, debiased {r.ece_debiased:.4f} "
            f"({r.rows + r.oos_rows} rows, {r.ece_bins} bins of equal mass, cross-fitted)"
        ),
    ]
    if done.entry.accept_threshold is not None:
        lines.append(
            f"threshold {done.entry.accept_threshold:.4f}: {r.escalated:.1%} of the rows in scope are escalated, "
            f"{r.kept_accuracy:.2%} of the others right"
        )
    return lines + certificate_lines(done.entry.certificates)


def share(text: str) -> float:
    """An option from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", help="a bundle's folder (./folder) or name")
    options.add_argument(
        "data", type=Path, help="JSONL or CSV with text and label; oos marks out-of-scope texts"
    )
    options.add_argument("--out", type=Path, help="where to write the new bundle; default: in place")
    options.add_argument("--split", choices=("train", "val"), help="rows to use where the file has splits")
    options.add_argument(
        "--escalate", type=share, default=ESCALATE, help="share of the in-scope rows to send on"
    )
    options.add_argument("--key", type=Path, help="private key to sign with, as keygen wrote it")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--json", action="store_true", help="for machines")
    return options


def main() -> None:
    arguments = parser().parse_args()
    try:
        source = find_bundle(arguments.bundle)
        out = arguments.out or source
        refuse_other_folder(out)
        key = arguments.key.read_bytes() if arguments.key else None
        was_signed = (source / SIGNATURE).exists()
        rows = read_rows(arguments.data, arguments.split)
        bundle, done = recalibrate(
            source,
            rows,
            out,
            fitted_on=arguments.data.name,
            escalate=arguments.escalate,
            threads=arguments.threads,
        )
        if key is not None:
            bundle = sign_bundle(out, key)
    except (BadRows, EdgeRuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    result = {
        "bundle": str(out),
        "version": bundle.manifest.version,
        "digest": bundle.digest,
        "signed": key is not None,
        "left_out": len(rows) - done.entry.rows,
        **asdict(done.report),
        "certificates": msgspec.to_builtins(done.entry.certificates),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print("\n".join(report_lines(done)))
    print(
        f"wrote {out}: {bundle.manifest.name} {bundle.manifest.version}, {'signed' if key else 'not signed'}"
    )
    if key is None:
        again = " again" if was_signed else ""
        print(f"sign it{again} before it is served: edge-runtime models sign {out} --key KEY")


if __name__ == "__main__":
    main()
