"""The training of `SlotNet` on true rows and on rows made from them."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from tools.slots.net import SlotNet
from tools.slots.rows import IGNORED


@dataclass(frozen=True)
class Lessons:
    """Rows to learn from: `inputs [n, words, features]`, `tags [n, words]`, `intents [n]`.

    The first `true` rows are real, the others made from them: row i from row i modulo `true`.
    """

    inputs: NDArray[np.int32]
    tags: NDArray[np.int64]
    intents: NDArray[np.int64]
    true: int


@dataclass(frozen=True)
class Recipe:
    """How to train. Every epoch sees each row once as it is and once with exchanged values."""

    epochs: int = 20
    batch: int = 64
    rate: float = 3e-3
    keep: float = 0.85  # share of features a word is seen with
    keep_exact: float = 0.8  # of those, how often the word itself: the rest teaches what new words look like
    dropout: float = 0.2
    smoothing: float = 0.05
    decay: float = 1e-4
    intent_share: float = 1.0  # weight of the intent's loss against that of a word's tag
    quantise_from: float = 0.5  # share of the training after which the table is rounded
    averaged: float = 0.997  # how much of the running mean stays at each fourth step


class Trainer:
    """A net in training with the running mean of its weights; saved and resumed between epochs."""

    def __init__(self, net: SlotNet, rows: int, recipe: Recipe) -> None:
        """Train on `rows` true rows and as many made ones an epoch."""
        self.net, self.mean, self.recipe, self.epoch = net, copy.deepcopy(net), recipe, 0
        decayed = [p for p in net.parameters() if p.dim() > 1]
        plain = [p for p in net.parameters() if p.dim() == 1]
        self._optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.rate,
            fused=True,
        )
        steps = recipe.epochs * -(-2 * rows // recipe.batch)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, recipe.rate, total_steps=steps, pct_start=0.1
        )

    def state(self) -> dict[str, object]:
        """All that `resume` needs."""
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        self.mean.load_state_dict(state["mean"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self.net.is_quantised = self.mean.is_quantised = self._quantises(self.epoch - 1)

    def run_epoch(self, lessons: Lessons, seed: int) -> float:
        """See each true row once and one row made of each; return the mean loss."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.net.train()
        self.net.is_quantised = self.mean.is_quantised = self._quantises(self.epoch)
        true, made = lessons.true, len(lessons.inputs) // lessons.true - 1
        rows = np.arange(true)
        if made:
            rows = np.concatenate([rows, rows + true * rng.integers(1, made + 1, true)])
        lengths = (lessons.tags[rows] != IGNORED).sum(1)
        # Rows of like length share a batch, so that little is spent on padding.
        rows = rows[np.argsort(lengths + 3.0 * rng.random(len(rows)), kind="stable")]
        parts = [rows[i : i + self.recipe.batch] for i in range(0, len(rows), self.recipe.batch)]
        seen = 0.0
        for count, which in enumerate(rng.permutation(len(parts))):
            loss = self._loss(lessons, parts[which])
            self._optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
            self._optimiser.step()
            self._schedule.step()
            seen += float(loss.detach())
            if count % 4 == 0:
                self._average()
        self.epoch += 1
        return seen / len(parts)

    def _quantises(self, epoch: int) -> bool:
        return epoch >= self.recipe.quantise_from * self.recipe.epochs

    def _loss(self, lessons: Lessons, rows: NDArray[np.int64]) -> Tensor:
        recipe, tags = self.recipe, lessons.tags[rows]
        width = max(1, int((tags != IGNORED).sum(1).max()))
        tags = tags[:, :width]
        by_intent, by_tag = self.net(
            torch.from_numpy(lessons.inputs[rows, :width]), recipe.keep, recipe.keep_exact, recipe.dropout
        )
        soft = recipe.smoothing
        intent = nnf.cross_entropy(by_intent, torch.from_numpy(lessons.intents[rows]), label_smoothing=soft)
        tag = nnf.cross_entropy(
            by_tag.flatten(0, 1),
            torch.from_numpy(tags).flatten(),
            ignore_index=IGNORED,
            label_smoothing=soft,
        )
        return recipe.intent_share * intent + tag

    def _average(self) -> None:
        done = self._schedule.last_epoch
        kept = min(
            self.recipe.averaged, done / (done + 40)
        )  # the first steps are averaged over a shorter time
        with torch.no_grad():
            for mean, fresh in zip(self.mean.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(fresh, 1.0 - kept)
