"""A teacher where none is given: the sentence encoder and an n-gram net of full precision together."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.bundles.manifest import CreditEntry
from tools.training.data import Data
from tools.training.edge import ALONE, Features, Recipe, features_for, featurised, fit
from tools.training.edge_net import EdgeNet, Shape, logits_of
from tools.training.loop import Checkpoint
from tools.training.sentences import SentenceTeacher

#: Unrounded, and shorter than where it stands alone: the pupil is what time is spent on.
RECIPE = replace(ALONE, epochs=10, quantise_from=2.0)
WEIGHTS = np.linspace(0.0, 1.0, 21)
#: Val rows that determine the weight; more of them only cost time.
WEIGHED = 1000


class OwnTeacher:
    """The weighted mean of both log-probabilities, with the weight of least loss on the val rows.

    The encoder helps if rows are few; with many rows the n-gram net is better, and the weight follows.
    Raises EdgeRuntimeError where the sentence encoder is not installed.
    """

    def __init__(self, data: Data, *, seed: int, recipe: Recipe = RECIPE) -> None:
        self._data, self._seed, self._recipe = data, seed, recipe
        self._sentences = SentenceTeacher(data.train, len(data.names), seed=seed)
        self.digest = f"{self._sentences.digest} and n-grams"
        self.credits: tuple[CreditEntry, ...] = self._sentences.credits

    def logits(self, texts: Sequence[str], work: Path) -> NDArray[np.float16]:
        """Log-probabilities [n, labels]; `texts` begin with those of the train part."""
        val = self._data.val
        some = np.random.default_rng(self._seed).permutation(len(val))[:WEIGHED]
        asked = [*texts, *(val.texts[i] for i in some)]
        meaning = _log_shares(self._sentences.logits(asked, work).astype(np.float32))
        letters = _log_shares(self._letters(asked, work))
        weight = best_weight(meaning[len(texts) :], letters[len(texts) :], val.labels[some])
        print(f"the teacher: {weight:.0%} sentence encoder, {1 - weight:.0%} n-grams", file=sys.stderr)
        return (weight * meaning + (1 - weight) * letters)[: len(texts)].astype(np.float16)

    def _letters(self, texts: Sequence[str], work: Path) -> NDArray[np.float32]:
        data, shape = self._data, Shape()
        features: Features = features_for(data.train.texts)
        torch.manual_seed(self._seed)
        net = EdgeNet(shape, len(data.names))
        train, val = (featurised(part.texts, features, shape) for part in (data.train, data.val))
        key = repr((data.sha256, data.train.texts, asdict(self._recipe), self._seed))
        fit(
            net, train, data.train.labels, None, self._recipe,
            seed=self._seed,
            checkpoint=Checkpoint(work / "teacher.pt", hashlib.sha256(key.encode()).hexdigest()),
            val=(val, data.val.labels, data.oos),
        )  # fmt: skip
        net.is_quantised = False
        return logits_of(net, featurised(texts, features, shape))


def best_weight(one: NDArray[np.float32], other: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The share of `one` in a sum of log-probabilities [n, labels] that loses least; a half without rows."""
    if not len(labels):
        return 0.5
    rows = np.arange(len(labels))
    losses = [-_log_shares(w * one + (1 - w) * other)[rows, labels].mean() for w in WEIGHTS]
    return float(WEIGHTS[int(np.argmin(losses))])


def _log_shares(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float32)
