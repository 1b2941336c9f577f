"""Labelled texts from a file: JSONL or CSV with `text` and `label`, optionally `split` and `slots`.

Every mistake is reported with its line, and a file with a mistake is not used at all.
"""

import csv
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The label of what belongs to no other one.
OOS = "oos"
#: What bundles accept of one text (`max_text_bytes` of their processing).
MAX_TEXT_BYTES = 4096
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Span:
    """A value inside a text: code points `start` to `end`, the end exclusive."""

    slot: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One row. `split` is "train", "val", or empty where the file does not say; `line` is where it stood."""

    text: str
    label: str
    split: str = ""
    slots: tuple[Span, ...] = ()
    line: int = field(default=0, compare=False)


class BadRows(ValueError):  # noqa: N818 - says what was found
    """Rows that cannot be used, each with its line number; nothing was written."""


def read_rows(path: Path, split: str | None = None) -> list[LabelledText]:
    """Read all rows, or those of one split. Raises BadRows, which lists the first 20 mistakes by line."""
    rows: list[LabelledText] = []
    mistakes: list[str] = []
    try:
        for line, fields in _jsonl(path) if path.suffix.lower() not in {".csv", ".tsv"} else _csv(path):
            row = _row(fields, line)
            if isinstance(row, str):
                mistakes.append(f"line {line}: {row}")
            else:
                rows.append(row)
    except OSError as error:
        raise BadRows(f"{path.name} cannot be read ({error.strerror}); give a JSONL or CSV file.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRows(f"{path.name} cannot be read ({error}); give a JSONL or CSV file in UTF-8.") from None
    if mistakes:
        raise BadRows(f"{path.name}: {len(mistakes)} rows cannot be used:\n" + shortened(mistakes))
    if not rows:
        raise BadRows(f"{path.name} holds no rows; each needs a text and a label.")
    has_split = any(row.split for row in rows)
    if split is None or not has_split:
        return rows
    return [row for row in rows if row.split == split]


def shortened(lines: list[str]) -> str:
    """The first 20 lines, and how many more there are."""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


def normalised(text: str) -> str:
    """What makes two texts the same one: composed characters, lower case, single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def digest_of(rows: Iterable[LabelledText]) -> str:
    """SHA-256 in hex over texts and labels in their order, whatever the file's format."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.text, row.label], ensure_ascii=False).encode() + b"\n")
    return found.hexdigest()


def _row(fields: Any, line: int) -> LabelledText | str:
    """The row, or what is wrong with it."""
    if not isinstance(fields, dict):
        return "not a JSON object with text and label"
    if None in fields:
        return "more fields than the first line names; put quotes around texts that hold a comma"
    for name in ("text", "label"):
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"{name} is missing or empty"
        if not _is_utf8(value):
            return f"{name} holds half of a character pair (a lone surrogate)"
    text, label = fields["text"].strip(), fields["label"].strip()
    if len(text.encode()) > MAX_TEXT_BYTES:
        return f"text has {len(text.encode())} bytes; a bundle accepts {MAX_TEXT_BYTES}"
    if not label.isprintable():
        return "label holds a line break or another control character"
    split = fields.get("split") or ""
    if split not in ("", "train", "val"):
        return "split is neither train nor val"
    slots = _slots(fields.get("slots"), fields["text"])
    return slots if isinstance(slots, str) else LabelledText(text, label, split, slots, line)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _slots(value: Any, text: str) -> tuple[Span, ...] | str:
    """Spans moved to where they lie in the stripped text, or what is wrong with them."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "slots is not JSON"
    if value is None or value == "":
        return ()
    if not isinstance(value, list):
        return 'slots is not a list of {"slot", "start", "end"}'
    lead, length = len(text) - len(text.lstrip()), len(text.strip())
    spans: list[Span] = []
    for i, entry in enumerate(value, 1):
        span = _span(entry, text)
        if isinstance(span, str):
            return f"slot {i} {span}"
        spans.append(Span(span.slot, max(0, span.start - lead), min(length, span.end - lead)))
    spans.sort(key=lambda span: span.start)
    for left, right in pairwise(spans):
        if right.start < left.end:
            return f"slots {left.slot!r} and {right.slot!r} overlap"
    return tuple(spans)


def _span(entry: Any, text: str) -> Span | str:
    slot = entry.get("slot") if isinstance(entry, dict) else None
    if not isinstance(slot, str) or not slot.strip() or not slot.isprintable():
        return "has no name"
    start, end = entry.get("start"), entry.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        return f"({slot}) does not lie within the {len(text)} characters of the text"
    if not text[start:end].strip():
        return f"({slot}) holds only blanks"
    return Span(slot.strip(), start, end)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, None


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with the line each begins on; a quoted text may hold line breaks."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        names = reader.fieldnames or []
        if not {"text", "label"} <= set(names):
            raise BadRows(
                f"{path.name}: line 1 does not name the columns text and label, but {', '.join(names) or 'none'}."
            )
        for fields in reader:
            inner = sum(value.count("\n") for value in fields.values() if isinstance(value, str))
            yield reader.line_num - inner, fields
