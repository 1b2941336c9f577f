"""Labelled spans as tags of words, and new rows made by exchanging values of a slot."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.processing import encode_rows
from edge_runtime.processing.words import WordFeaturiser, places_of
from tools.rows import LabelledText, Span

#: The target of a word that is padding.
IGNORED = -100
#: Slots with so many values have no list of them: any name may be one.
_OPEN = 100
_MARKS = (
    ".",
    "?",
    "!",
    "!!",
    "...",
    " .",
    " ?",
    " \U0001f600",
    " \U0001f3b5",
    " \U0001f64f",
    "\u2026",
    " \u2764",
)
_ACCENTED = {"a": "\u00e0\u00e1\u00e3", "e": "\u00e8\u00e9\u00ea", "i": "\u00ec\u00ed\u00ee",
             "o": "\u00f2\u00f3\u00f5", "u": "\u00f9\u00fa\u00fb"}  # fmt: skip


def tags_of(row: LabelledText, slots: Sequence[str], limit: int) -> list[int]:
    """The tag of each word: 0 outside, 2k + 1 at the beginning of slot k, 2k + 2 inside it."""
    tags = []
    for start, end in places_of(row.text, limit):
        tag = 0
        for span in row.slots:
            if start < span.end and span.start < end:
                tag = 2 * slots.index(span.slot) + (1 if start <= span.start else 2)
        tags.append(tag)
    return tags


def encoded(
    featuriser: WordFeaturiser, rows: Sequence[LabelledText], slots: Sequence[str], length: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Indices `[n, length, features]` and tags `[n, length]`; words past `length` are left out."""
    inputs = np.full((len(rows), length, featuriser.features), featuriser.buckets, np.int32)
    tags = np.full((len(rows), length), IGNORED, np.int64)
    for i, row in enumerate(rows):
        ((indices,),) = encode_rows(featuriser, [row.text.encode()])
        known = tags_of(row, slots, length)
        inputs[i, : len(indices)] = indices[:length]
        tags[i, : len(known)] = known
    return inputs, tags


class Exchange:
    """Values of each slot, to be put in the place of others."""

    def __init__(self, rows: Sequence[LabelledText]) -> None:
        values: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            for span in row.slots:
                values[span.slot].add(row.text[span.start : span.end])
        self._values = {slot: sorted(found) for slot, found in values.items()}
        self._open = [slot for slot, found in self._values.items() if len(found) >= _OPEN]

    def made(self, row: LabelledText, rng: np.random.Generator) -> LabelledText:
        """One more row: most values replaced by others of their slot, and at times written otherwise."""
        text, at, spans = "", 0, []
        for span in row.slots:
            text += row.text[at : span.start]
            value = row.text[span.start : span.end]
            if rng.random() < 0.8:
                slot = span.slot
                if slot in self._open and rng.random() < 0.05:
                    # A title may be named like a place: the words around a value have the last word.
                    slot = self._open[int(rng.integers(len(self._open)))]
                choices = self._values[slot]
                value = choices[int(rng.integers(len(choices)))]
            spans.append(Span(span.slot, len(text), len(text) + len(value)))
            text += value
            at = span.end
        return replace(row, text=_written(text + row.text[at:], rng), slots=tuple(spans))


def _written(text: str, rng: np.random.Generator) -> str:
    """The text in lower case (one in four), with other accents (one in ten), or with a mark behind it (one in ten)."""
    if rng.random() < 0.25 and len(text.lower()) == len(text):
        text = text.lower()
    if rng.random() < 0.1:
        plain = "".join(unicodedata.normalize("NFD", letter)[0] for letter in text)
        vowel = "aeiou"[int(rng.integers(5))]
        text = plain if plain != text else text.replace(vowel, _ACCENTED[vowel][int(rng.integers(3))])
    if rng.random() < 0.1:
        text += _MARKS[int(rng.integers(len(_MARKS)))]
    return text
