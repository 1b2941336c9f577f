"""The edge tier's network in torch: a quantised bag of n-grams, a normalisation and a small head."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

BATCH = 128


@dataclass(frozen=True)
class Shape:
    """What the size on disk depends on. `levels` is the largest magnitude of a table entry: fewer pack better."""

    buckets: int = 16000
    width: int = 96
    hidden: int = 192
    levels: int = 7


class EdgeNet(nn.Module):
    """Indices [n, slots] -> logits [n, labels]. The table's last row is the pad row and stays zero."""

    def __init__(self, shape: Shape, labels: int) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Parameter(torch.randn(shape.buckets + 1, shape.width) * 0.1)
        self.norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.norm_up = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, labels)
        self.direct = nn.Linear(shape.width, labels, bias=False)
        self.is_quantised = False

    def scales(self) -> Tensor:
        """Each table row's step [buckets + 1, 1]."""
        return self.table.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / self.shape.levels

    def rounded(self, scales: Tensor) -> Tensor:
        """Whole steps of each table entry, in -levels..levels."""
        return (self.table / scales).round()

    def forward(self, slots: Tensor, keep: float = 1.0, dropout: float = 0.0) -> Tensor:
        table = self.table
        if self.is_quantised:
            scales = self.scales()
            # The gradient passes as if nothing had been rounded (straight-through estimator).
            table = table + (self.rounded(scales) * scales - table).detach()
        weights = (slots != self.shape.buckets).float()
        if keep < 1.0:
            weights = weights * (torch.rand_like(weights) < keep)
        bag = nnf.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")
        x = nnf.dropout(self.norm(bag), dropout, self.training)
        hidden = nnf.dropout(self.norm_up(nnf.gelu(self.up(x))), dropout, self.training)
        return self.head(hidden) + self.direct(x)


@dataclass(frozen=True)
class Recipe:
    """How to train. `soft_share` weighs the teacher's answer against the label."""

    epochs: int = 30
    rate: float = 4e-3
    keep: float = 0.8
    dropout: float = 0.3
    smoothing: float = 0.1
    soft_share: float = 0.8
    temperature: float = 2.0
    decay: float = 1e-4
    quantise_from: float = 0.5  # share of the training after which the table is rounded


def logits_of(net: EdgeNet, slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [n, labels] without dropout."""
    net.eval()
    with torch.inference_mode():
        parts = [net(part) for part in torch.from_numpy(slots).split(512)]
    return torch.cat(parts).numpy()


def fit(
    net: EdgeNet,
    slots: NDArray[np.int32],
    labels: NDArray[np.int64],
    teacher: NDArray[np.float32] | None,
    recipe: Recipe,
    *,
    seed: int,
    after_epoch: Callable[[int], None],
) -> None:
    """Fit on hard labels (-1: none) and, where given, the teacher's logits [n, labels]."""
    torch.manual_seed(seed)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.rate,
        fused=True,
    )
    inputs, hard = torch.from_numpy(slots), torch.from_numpy(labels)
    soft = None if teacher is None else torch.from_numpy(teacher)
    steps = recipe.epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=steps, pct_start=0.1)
    for epoch in range(recipe.epochs):
        net.train()
        net.is_quantised = epoch >= recipe.quantise_from * recipe.epochs
        order = torch.randperm(len(inputs))
        for step in range(len(inputs) // BATCH):
            rows = order[step * BATCH : (step + 1) * BATCH]
            logits = net(inputs[rows], recipe.keep, recipe.dropout)
            loss = nnf.cross_entropy(logits, hard[rows], ignore_index=-1, label_smoothing=recipe.smoothing)
            if soft is not None:
                t = recipe.temperature
                wanted = (soft[rows] / t).softmax(1)
                loss = (1 - recipe.soft_share) * loss.nan_to_num() + recipe.soft_share * t * t * (
                    nnf.kl_div((logits / t).log_softmax(1), wanted, reduction="batchmean")
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        after_epoch(epoch)
    net.is_quantised = True
