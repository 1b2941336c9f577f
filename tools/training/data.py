"""Rows to what a trainer takes: label indices, a train and a validation part, and notes on what looks wrong."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.rows import OOS, BadRows, LabelledText, digest_of, normalised, shortened

#: Validation rows that calibrate by isotonic regression; a larger share than needed for them is not set aside.
ENOUGH = 1000
LEAST_SHARE, MOST_SHARE = 0.1, 0.2


@dataclass(frozen=True)
class Part:
    """Texts and the index of each one's label [n]."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Data:
    """`train` is fitted on, `val` measures and calibrates; no text is in both. Names are sorted."""

    names: tuple[str, ...]
    train: Part
    val: Part
    notes: tuple[str, ...]
    sha256: str  # of all rows as they were given

    @property
    def oos(self) -> int | None:
        """The index of the out-of-scope label."""
        return self.names.index(OOS) if OOS in self.names else None


def prepare(rows: Sequence[LabelledText], *, seed: int, where: str) -> Data:
    """Split as the rows say, or at random by label. Raises BadRows if there are fewer than two labels."""
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise BadRows(f"{where} has one label only ({names[0]}); at least two are needed.")
    train, val, notes = _divided(rows, seed, where)
    index = {name: i for i, name in enumerate(names)}

    def part(chosen: Sequence[LabelledText]) -> Part:
        labels = np.array([index[row.label] for row in chosen], np.int64)
        return Part(tuple(row.text for row in chosen), labels)

    notes = [*notes, *_oddities(rows, train)]
    return Data(names, part(train), part(val), tuple(notes), digest_of(rows))


def val_share(rows: int) -> float:
    """20 %, less where 1,000 rows are reached with less, never below 10 %."""
    return max(LEAST_SHARE, min(MOST_SHARE, ENOUGH / rows))


def stratified(
    rows: Sequence[LabelledText], share: float, seed: int
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Divide at random so that each label gives about its share, each keeps a row to learn from, and equal
    texts stay together.
    """
    rng = np.random.default_rng(seed)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[normalised(row.text)].append(i)
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_label[rows[members[0]].label].append(members)
    left = Counter(row.label for row in rows)
    chosen: set[int] = set()
    carried = 0.0  # what rounding owes: labels of two rows give one in five cases, not never
    for label in sorted(by_label):
        carried += share * sum(map(len, by_label[label]))
        for k in rng.permutation(len(by_label[label])):
            members = by_label[label][k]
            taken = Counter(rows[i].label for i in members)
            if len(members) <= carried + 1e-9 and all(left[name] > count for name, count in taken.items()):
                chosen.update(members)
                left -= taken
                carried -= len(members)
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def _divided(
    rows: Sequence[LabelledText], seed: int, where: str
) -> tuple[list[LabelledText], list[LabelledText], list[str]]:
    if not any(row.split for row in rows):
        return *stratified(rows, val_share(len(rows)), seed), []
    unsaid = [f"line {row.line}: split is empty" for row in rows if not row.split]
    if unsaid:
        raise BadRows(f"{where}: other rows say train or val, {len(unsaid)} do not:\n{shortened(unsaid)}")
    train = [row for row in rows if row.split == "train"]
    val = [row for row in rows if row.split == "val"]
    if not train:
        raise BadRows(f"{where}: no row has the split train; there is nothing to learn from.")
    if not val:
        note = "no row has the split val: some are set aside at random"
        return *stratified(train, val_share(len(train)), seed), [note]
    learned = {normalised(row.text) for row in train}
    fresh = [row for row in val if normalised(row.text) not in learned]
    same = len(val) - len(fresh)
    return train, fresh, [f"{same} val rows whose text is also in train are left out"] if same else []


def _oddities(rows: Sequence[LabelledText], train: Sequence[LabelledText]) -> list[str]:
    """Notes on conflicting and repeated texts and on labels with too little to learn from."""
    notes = []
    by_text: dict[str, list[LabelledText]] = defaultdict(list)
    for row in rows:
        by_text[normalised(row.text)].append(row)
    conflicts = [same for same in by_text.values() if len({row.label for row in same}) > 1]
    if conflicts:
        lines = [f"{_places(same)}: {same[0].text!r}" for same in conflicts]
        notes.append(f"{len(conflicts)} texts have more than one label:\n{shortened(lines)}")
    repeated = sum(len(same) - 1 for same in by_text.values())
    if repeated:
        notes.append(f"{repeated} rows repeat the text of another one")
    counts = Counter(row.label for row in rows)
    learned = Counter(row.label for row in train)
    notes += _named("labels have a single row", [label for label, n in counts.items() if n == 1])
    notes += _named("labels have val rows only", [label for label in counts if not learned[label]])
    return notes


def _places(same: Sequence[LabelledText]) -> str:
    return ", ".join(f"line {row.line} {row.label}" for row in same)


def _named(what: str, labels: list[str]) -> list[str]:
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    return [f"{len(labels)} {what}: {', '.join(sorted(labels)[:10])}{more}"] if labels else []


def rows_per_label(data: Data) -> Mapping[str, tuple[int, int]]:
    """Train and val rows of each label."""
    train = np.bincount(data.train.labels, minlength=len(data.names))
    val = np.bincount(data.val.labels, minlength=len(data.names))
    return {name: (int(train[i]), int(val[i])) for i, name in enumerate(data.names)}
