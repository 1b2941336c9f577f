"""New commands for the teacher to label: texts cut, crossed and worded differently. No labels are invented here."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Scripts that are written without blanks: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNITS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_INNER_BLANK = re.compile(rf"(?<=[{UNSPACED}]) (?=[{UNSPACED}])")


_CHARACTER = re.compile(rf"[{UNSPACED}]")


def is_unspaced(texts: Sequence[str]) -> bool:
    """Whether most characters are of scripts that are written without blanks."""
    line = "".join("".join(text.split()) for text in texts)
    return 2 * len(_CHARACTER.findall(line)) > len(line)


def recombine(
    texts: Sequence[str], labels: NDArray[np.int64], count: int, rng: np.random.Generator
) -> list[str]:
    """Return at most `count` texts, each made from one or two of `texts`; fewer where no new ones are left.

    Half are crossed within a label (the head of one, the tail of another), the rest are words dropped,
    words swapped in from anywhere, two neighbours exchanged, a letter mistyped, or two labels crossed,
    which gives the teacher's doubt something to say. Where a script has no blanks, characters stand for words.
    """
    words = [_UNITS.findall(text) for text in texts]
    vocabulary = sorted({word for line in words for word in line})
    by_label = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    known = set(texts)
    made: list[str] = []
    for _ in range(10 * count):
        if len(made) == count:
            break
        i = int(rng.integers(len(words)))
        line = list(words[i])
        kind = rng.random()
        if kind < 0.5:
            line = _cross(line, words[int(rng.choice(by_label[int(labels[i])]))], rng)
        elif kind < 0.65:
            line = [word for word in line if rng.random() > 0.2]
        elif kind < 0.8:
            line = [vocabulary[int(rng.integers(len(vocabulary)))] if rng.random() < 0.2 else w for w in line]
        elif kind < 0.87 and len(line) > 1:
            j = int(rng.integers(len(line) - 1))
            line[j], line[j + 1] = line[j + 1], line[j]
        elif kind < 0.93:
            line = _mistype(line, rng)
        else:
            line = _cross(line, words[int(rng.integers(len(words)))], rng)
        text = _INNER_BLANK.sub("", " ".join(line))
        if text and text not in known:
            known.add(text)
            made.append(text)
    return made


def _cross(head: list[str], tail: list[str], rng: np.random.Generator) -> list[str]:
    """The beginning of one line and the end of another, cut at random places."""
    return head[: int(rng.integers(1, len(head) + 1))] + tail[int(rng.integers(0, len(tail))) :]


def _mistype(line: list[str], rng: np.random.Generator) -> list[str]:
    """One word with a letter left out or doubled."""
    j = int(rng.integers(len(line)))
    word = line[j]
    k = int(rng.integers(len(word)))
    line[j] = word[:k] + (word[k] * 2 if rng.random() < 0.5 else "") + word[k + 1 :]
    return [word for word in line if word]
