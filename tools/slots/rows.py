"""Labelled spans as tags of words, and new rows made by exchanging values of a slot."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.processing.words import WordFeaturiser, places_of
from tools.rows import LabelledText, Span

#: The target of a word that is padding.
IGNORED = -100


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
        (indices,) = featuriser.encode(row.text)
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

    def made(self, row: LabelledText, rng: np.random.Generator) -> LabelledText:
        """One more row: most values replaced by others of their slot, one row in four in lower case."""
        text, at, spans = "", 0, []
        for span in row.slots:
            text += row.text[at : span.start]
            value = row.text[span.start : span.end]
            if rng.random() < 0.8:
                choices = self._values[span.slot]
                value = choices[int(rng.integers(len(choices)))]
            spans.append(Span(span.slot, len(text), len(text) + len(value)))
            text += value
            at = span.end
        text += row.text[at:]
        if rng.random() < 0.25 and len(text.lower()) == len(text):
            text = text.lower()
        return replace(row, text=text, slots=tuple(spans))
