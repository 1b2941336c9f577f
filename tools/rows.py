"""Labelled texts from a file: JSONL or CSV with `text` and `label`, optionally `split` (train or val)."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The label of what belongs to no other one.
OOS = "oos"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One row. `split` is "train", "val", or empty where the file does not say."""

    text: str
    label: str
    split: str = ""


class BadRows(ValueError):  # noqa: N818 - says what was found
    """Rows that cannot be used, each with its line number; nothing was written."""


def read_rows(path: Path, split: str | None = None) -> list[LabelledText]:
    """Read all rows, or those of one split. Raises BadRows, which lists the first 20 mistakes by line."""
    read = _csv if path.suffix.lower() == ".csv" else _jsonl
    rows: list[LabelledText] = []
    mistakes: list[str] = []
    count = 0
    try:
        for line, fields in read(path):
            mistake = _mistake(fields)
            if mistake:
                count += 1
                mistakes += [f"line {line}: {mistake}"][: _SHOWN - len(mistakes)]
                continue
            rows.append(
                LabelledText(fields["text"].strip(), fields["label"].strip(), fields.get("split") or "")
            )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadRows(f"{path.name} cannot be read ({error}); give a JSONL or CSV file in UTF-8.") from None
    if mistakes:
        more = f"\n... and {count - len(mistakes)} more" if count > len(mistakes) else ""
        raise BadRows(f"{path.name}: {count} rows cannot be used:\n" + "\n".join(mistakes) + more)
    if not rows:
        raise BadRows(f"{path.name} holds no rows; each needs a text and a label.")
    has_split = any(row.split for row in rows)
    if split is None or not has_split:
        return rows
    return [row for row in rows if row.split == split]


def _mistake(fields: Any) -> str:
    if not isinstance(fields, dict):
        return "not a JSON object with text and label"
    for name in ("text", "label"):
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"{name} is missing or empty"
    if fields.get("split") not in (None, "", "train", "val"):
        return "split is neither train nor val"
    return ""


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    yield number, None


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for fields in reader:
            yield reader.line_num, fields
