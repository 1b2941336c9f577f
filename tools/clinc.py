"""CLINC150 as it is published (Larson et al. 2019): texts and intent names, split by split."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OOS = "oos"


@dataclass(frozen=True)
class Split:
    """Texts and the index of each one's label."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Clinc:
    """`train` is fitted on, `val` chooses and calibrates; both hold their out-of-scope rows as the label `oos`."""

    names: tuple[str, ...]
    train: Split
    val: Split

    @property
    def oos(self) -> int:
        return self.names.index(OOS)


def read_clinc(path: Path) -> Clinc:
    """Read `data_full*.json`. Labels are sorted by name; `oos` is one of them."""
    raw: dict[str, list[list[str]]] = json.loads(path.read_text(encoding="utf-8"))
    names = tuple(sorted({label for rows in raw.values() for _, label in rows}))
    index = {name: i for i, name in enumerate(names)}

    def split(*parts: str) -> Split:
        rows = [row for part in parts for row in raw[part]]
        return Split(tuple(text for text, _ in rows), np.array([index[label] for _, label in rows]))

    return Clinc(names, split("train", "oos_train"), split("val", "oos_val"))


def main() -> None:
    """Write train and validation rows as JSONL, for the tools that read any labelled texts."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    data = read_clinc(source)
    with target.open("w", encoding="utf-8") as file:
        for name, part in (("train", data.train), ("val", data.val)):
            for text, label in zip(part.texts, part.labels, strict=True):
                row = {"text": text, "label": data.names[label], "split": name}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
