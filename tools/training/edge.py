"""Train the edge tier's classifier: hashed n-grams, a small quantised net, a teacher where there is one."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as nnf

from edge_runtime.bundles.manifest import ProcessingEntry
from edge_runtime.core.messages import Row
from edge_runtime.processing import encode_rows
from edge_runtime.processing.ngrams import NgramFeaturiser
from tools.training.augment import is_unspaced, recombine
from tools.training.data import Data
from tools.training.edge_net import EdgeNet, Shape, export, logits_of
from tools.training.loop import Checkpoint, Epoch, in_scope_accuracy, passes, run_epochs, seeded
from tools.training.progress import Progress
from tools.training.teacher import Teacher

MAX_BATCH = 64


@dataclass(frozen=True)
class Features:
    """Parameters of the bundle's `text_ngrams` processing."""

    slots: int = 192
    grams: tuple[int, ...] = (3, 4, 5)
    skips: bool = True


@dataclass(frozen=True)
class Recipe:
    """How to train. `soft_share` weighs the teacher's answer against the label.

    A teacher also labels `recombined` made-up texts per row (at least and at most as below); true texts then
    count `copies` times, since the made-up ones outnumber them.
    """

    epochs: int = 30
    rate: float = 4e-3
    batch: int = 128
    least_rows: int = 4000  # an epoch visits at least so many rows: small files are visited several times
    keep: float = 0.8
    dropout: float = 0.3
    smoothing: float = 0.1
    soft_share: float = 0.8
    temperature: float = 2.0
    decay: float = 1e-4
    quantise_from: float = 0.5  # share of the training after which the table is rounded
    recombined: int = 6
    least_recombined: int = 20_000
    most_recombined: int = 90_000
    copies: int = 2


#: Without a teacher, with a bundle as one, and with a teacher of our own, which is to cost no more than minutes.
ALONE = Recipe()
TAUGHT = Recipe(epochs=12, keep=0.85, dropout=0.15, smoothing=0.0)
SELF_TAUGHT = replace(TAUGHT, epochs=14, recombined=2, least_recombined=6000, most_recombined=15_000)


@dataclass(frozen=True)
class Trained:
    """A model ready to be packed, and how it came about."""

    model: bytes
    processing: ProcessingEntry
    extra: dict[str, bytes]
    rows: list[Row]  # of the val texts, as the bundle encodes them
    curve: list[Epoch]
    recipe: dict[str, object]
    teacher: str | None = None  # the digest or name of the teacher
    max_batch: int = MAX_BATCH


def features_for(texts: Sequence[str]) -> Features:
    """The features of a language: scripts without blanks are read by whole characters of three bytes."""
    return Features(grams=(3, 6)) if is_unspaced(texts) else Features()


def featurised(texts: Sequence[str], features: Features, shape: Shape) -> NDArray[np.int32]:
    """Indices [n, slots] as the bundle computes them."""
    featuriser = NgramFeaturiser(buckets=shape.buckets, **asdict(features))
    rows = [indices for (indices,) in encode_rows(featuriser, [text.encode() for text in texts])]
    return np.stack(rows) if rows else np.zeros((0, features.slots), np.int32)


def train_edge(
    data: Data,
    *,
    work: Path,
    seed: int = 0,
    epochs: int | None = None,
    teacher: Teacher | None = None,
    shape: Shape | None = None,
    recipe: Recipe | None = None,
) -> Trained:
    """Train, or go on where a killed run stopped; the folder `work` holds what that takes. Raises BadRows."""
    shape, features = shape or Shape(), features_for(data.train.texts)
    recipe = recipe or (TAUGHT if teacher else ALONE)
    recipe = replace(recipe, epochs=epochs) if epochs is not None else recipe
    texts, labels, soft = list(data.train.texts), data.train.labels, None
    key = (data.sha256, data.names, data.train.texts, asdict(shape), asdict(features), asdict(recipe), seed)
    if teacher is not None:
        key += (teacher.digest,)
        count = min(max(recipe.recombined * len(texts), recipe.least_recombined), recipe.most_recombined)
        made = recombine(texts, labels, count, np.random.default_rng(seed))
        soft = teacher.logits([*texts, *made], work)
        texts = texts * recipe.copies + made
        soft = np.concatenate([soft[: len(labels)]] * recipe.copies + [soft[len(labels) :]])
        labels = np.concatenate([labels] * recipe.copies + [np.full(len(made), -1)])
    torch.manual_seed(seed)
    net = EdgeNet(shape, len(data.names))
    val = featurised(data.val.texts, features, shape)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    curve = fit(
        net, featurised(texts, features, shape), labels, soft, recipe,
        seed=seed,
        checkpoint=Checkpoint(work / "edge.pt", digest),
        val=(val, data.val.labels, data.oos),
    )  # fmt: skip
    parameters = {
        "slots": features.slots,
        "buckets": shape.buckets,
        "grams": features.grams,
        "skips": features.skips,
    }
    return Trained(
        export(net, features.slots),
        ProcessingEntry("text_ngrams", "1", parameters),
        {},
        [(row,) for row in val],
        curve,
        {"shape": asdict(shape), "features": asdict(features), **asdict(recipe)},
        teacher=None if teacher is None else teacher.digest,
    )


def fit(
    net: EdgeNet,
    slots: NDArray[np.int32],
    labels: NDArray[np.int64],
    teacher: NDArray[np.float16] | None,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Checkpoint | None,
    val: tuple[NDArray[np.int32], NDArray[np.int64], int | None],
) -> list[Epoch]:
    """Fit on hard labels (-1: none) and, where given, the teacher's logits [n, labels]."""
    decayed = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.rate,
        fused=True,
    )
    inputs, hard = torch.from_numpy(slots), torch.from_numpy(labels)
    soft = None if teacher is None else torch.from_numpy(teacher)
    visits = len(passes(len(inputs), recipe.least_rows, np.random.default_rng(0)))
    batch = min(recipe.batch, visits)
    steps = visits // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=max(2, recipe.epochs * steps), pct_start=0.1
    )
    progress = Progress("training", recipe.epochs * steps)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = net(inputs[rows], recipe.keep, recipe.dropout)
        loss = nnf.cross_entropy(logits, hard[rows], ignore_index=-1, label_smoothing=recipe.smoothing)
        if soft is None:
            return loss
        t = recipe.temperature
        wanted = (soft[rows].float() / t).softmax(1)
        taught = nnf.kl_div((logits / t).log_softmax(1), wanted, reduction="batchmean")
        return (1 - recipe.soft_share) * loss.nan_to_num() + recipe.soft_share * t * t * taught

    def one_epoch(epoch: int) -> float:
        order = torch.from_numpy(passes(len(inputs), recipe.least_rows, seeded(seed, epoch)))
        net.train()
        net.is_quantised = epoch >= recipe.quantise_from * recipe.epochs
        total = 0.0
        for step in range(steps):
            loss = loss_of(order[step * batch : (step + 1) * batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
            progress.at(epoch * steps + step + 1, f"epoch {epoch + 1}/{recipe.epochs}")
        return total / steps

    def accuracy() -> float | None:
        return in_scope_accuracy(logits_of(net, val[0]).argmax(1), val[1], val[2])

    parts = {"net": net, "optimiser": optimiser, "schedule": schedule}
    curve = run_epochs(recipe.epochs, parts, checkpoint, one_epoch, accuracy)
    net.is_quantised = True
    return curve
