"""The SNIPS voice commands as they are published (Coucke et al. 2018): JSONL rows with intent and slot spans.

    python -m tools.snips FOLDER build/snips.jsonl

FOLDER holds one `<Intent>.*json` per intent. About one row in twenty becomes a validation row, the same share for each
intent. Texts that differ only in case and blanks stay on one side.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.bundles.manifest import CreditEntry
from tools.rows import normalised

VAL_SHARE = 0.05
CREDIT = CreditEntry(
    name="SNIPS natural language understanding benchmark",
    authors="Alice Coucke, Alaa Saade, Adrien Ball, Theodore Bluche, Alexandre Caulier, David Leroy, Clement Doumouro, "
    "Thibault Gisselbrecht, Francesco Caltagirone, Thibaut Lavril, Mael Primet, Joseph Dureau (2018)",
    licence="CC0-1.0",
    url="https://github.com/sonos/nlu-benchmark",
)


def read_snips(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows `text`, `label`, `slots` with the text exactly as published; spans without outer blanks."""
    for path in sorted(folder.glob("*.json")):
        for label, examples in json.loads(path.read_text(encoding="utf-8")).items():
            for example in examples:
                text, slots = "", []
                for part in example["data"]:
                    value = part["text"]
                    if "entity" in part and value.strip():
                        start = len(text) + len(value) - len(value.lstrip())
                        slots.append(
                            {"slot": part["entity"], "start": start, "end": start + len(value.strip())}
                        )
                    text += value
                yield {"text": text, "label": label, "slots": slots}


def split_of(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """`train` or `val` for each row."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        groups[row["label"]][normalised(row["text"])].append(i)
    found = ["train"] * len(rows)
    rng = np.random.default_rng(seed)
    for label in sorted(groups):
        alike = list(groups[label].values())
        for g in rng.permutation(len(alike))[: round(VAL_SHARE * len(alike))]:
            for i in alike[g]:
                found[i] = "val"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = list(read_snips(arguments.folder))
    splits = split_of(rows, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        for row, split in zip(rows, splits, strict=True):
            file.write(json.dumps(row | {"split": split}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} rows, {splits.count('val')} of them for validation", file=sys.stderr)


if __name__ == "__main__":
    main()
