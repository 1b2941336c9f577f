"""Commands to intents with their slots: a text in, a label, the named values inside the text and a confidence out."""

from collections.abc import Sequence
from math import exp, prod
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.core.messages import Answer, Array, Signature, TensorSpec
from edge_runtime.processing.text_classification import Calibration, TextTask
from edge_runtime.processing.words import WordFeaturiser, Words

#: The slots of a text are a JSON list; see `TextSlots.decode_batch`.
SIGNATURE = Signature(
    inputs=(TensorSpec("text", "BYTES", (-1,)),),
    outputs=(
        TensorSpec("intent", "BYTES", (-1,)),
        TensorSpec("confidence", "FP32", (-1,)),
        TensorSpec("slots", "BYTES", (-1,)),
    ),
)
OUTSIDE = 0
Reals = NDArray[np.floating[Any]]
#: The exponentials of this and of its negative are normal numbers in FP32, and so is the sum of a thousand of them.
_REACH = 80.0
_encode = msgspec.json.Encoder().encode


class TextSlots(TextTask):
    """Splits requests into texts, encodes their words, and reads logits `[labels]` and `[words, tags]`.

    Tag 0 is outside of any slot, 2k + 1 begins a value of slot k and 2k + 2 continues it.
    """

    def __init__(
        self,
        featuriser: WordFeaturiser,
        labels: Sequence[str],
        slots: Sequence[str],
        calibration: Calibration,
        *,
        version: str,
        max_text_bytes: int,
    ) -> None:
        """`calibration` maps the joint probability of the intent and all tags to that of a wholly right answer."""
        super().__init__(SIGNATURE, featuriser, labels, version=version, max_text_bytes=max_text_bytes)
        self._slots = tuple(slots)
        self._calibration = calibration

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots, in the order of the tags."""
        return self._slots

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """Logits of intents `[labels] FP32`, and of tags `[words, tags] FP32`."""
        return (
            TensorSpec("logits", "FP32", (-1, len(self._labels))),
            TensorSpec("tags", "FP32", (-1, -1, 2 * len(self._slots) + 1)),
        )

    def decode_batch(self, outputs: Sequence[Array], batch: Sequence[Words]) -> list[Answer]:
        """Return intent, confidence and slots from logits `[rows, labels]` and `[rows, words, tags] FP32`.

        Slots are a JSON list of objects `slot`, `value`, `start`, `end` (code points of the text, the end
        exclusive) and `confidence`, the probability of these tags. The answer's confidence is that intent
        and all slots are right.
        """
        logits, tags = outputs
        return [self._answer(logits[i], tags[i], words) for i, words in enumerate(batch)]

    def _answer(self, logits: Array, tags: Array, words: Words) -> Answer:
        text, places = words
        tags = tags[: len(places)]
        path = best_path(tags)
        temperature = self._calibration.temperature
        chances = chances_of(tags, path, temperature)
        found = []
        for slot, first, end in spans_of(path):
            start, stop = places[first][0], places[end - 1][1]
            found.append(
                {
                    "slot": self._slots[slot],
                    "value": text[start:stop],
                    "start": start,
                    "end": stop,
                    "confidence": round(prod(chances[first:end]), 4),
                }
            )
        of_intents = logits.tolist()
        top = max(of_intents)
        spread = sum([exp((logit - top) / temperature) for logit in of_intents])
        raw = prod(chances) / spread
        confidence = self._calibration.chance(raw)
        label = self._labels[of_intents.index(top)]
        return Answer((label, np.float32(confidence), _encode(found)), confidence, raw_score=raw)


def chances_of(logits: Reals, path: Sequence[int], temperature: float) -> list[float]:
    """The softmax of `[n, choices] FP32` at `temperature`, read at one choice in each row: that of `path`."""
    tops = [logits.item(at, top) for at, top in enumerate(logits.argmax(1).tolist())]
    # To subtract the largest value of each row takes most of the time; it is needed only where exp would leave FP32.
    if any(not -_REACH < top / temperature < _REACH for top in tops):
        logits = logits - np.array(tops, logits.dtype)[:, None]
    shares = np.exp(logits * np.float32(1 / temperature))
    totals = np.add.reduce(shares, 1).tolist()
    return [
        shares.item(at, choice) / total for at, (choice, total) in enumerate(zip(path, totals, strict=True))
    ]


def best_path(tags: Reals) -> list[int]:
    """Return the best sequence of `[words, tags] FP32` in which a value continues only after it began."""
    greedy: list[int] = tags.argmax(1).tolist() if len(tags) else []
    before = OUTSIDE
    for tag in greedy:
        if tag != OUTSIDE and tag % 2 == 0 and before not in (tag, tag - 1):
            return _viterbi(tags)
        before = tag
    return greedy


def _viterbi(tags: Reals) -> list[int]:
    """Viterbi's algorithm (1967). All allowed steps cost the same, so two candidates for each tag are enough."""
    count = tags.shape[1]
    begins, inside = np.arange(1, count, 2), np.arange(2, count, 2)
    score = tags[0].copy()
    score[inside] = -np.inf
    steps = []
    for row in tags[1:]:
        came = np.full(count, int(score.argmax()))
        came[inside] = np.where(score[inside] >= score[begins], inside, begins)
        score = score[came] + row
        steps.append(came)
    path = [int(score.argmax())]
    for came in reversed(steps):
        path.append(int(came[path[-1]]))
    return path[::-1]


def spans_of(path: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (slot, first word, end word) of each value in a sequence of tags that `best_path` allows."""
    spans: list[tuple[int, int, int]] = []
    for at, tag in enumerate(path):
        if tag == OUTSIDE:
            continue
        if tag % 2:
            spans.append((tag // 2, at, at + 1))
        else:
            slot, first, _ = spans[-1]
            spans[-1] = (slot, first, at + 1)
    return spans
