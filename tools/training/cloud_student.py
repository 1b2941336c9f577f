"""One encoder that learns the mean answer of several: nearly as accurate, at the cost of one."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nnf

from tools.encoder import Encoder, Sizes
from tools.training.augment import recombine
from tools.training.data import Data
from tools.training.fine_tune import (
    Recipe,
    Task,
    accuracy_of,
    device_at_hand,
    fine_tune,
    half_precision,
    logits_of,
)
from tools.training.loop import Epoch
from tools.training.progress import Progress
from tools.training.teacher import cached
from tools.training.word_pieces import tokenised, tokenizer_of


@dataclass(frozen=True)
class Student:
    """How to learn from members: `hard_share` is the label's part of a row's target, the rest is their answer.

    Each true row brings `recombined` made-up texts, whose target is the answer alone.
    """

    hard_share: float = 0.6
    recombined: int = 1
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=1, rate=4e-5, head_factor=5.0, smoothing=0.0)
    )


STUDENT = Student()


def learn_from(
    members: Iterable[tuple[Encoder, list[Epoch]]],
    data: Data,
    student: Student,
    sizes: Sizes,
    source: Path,
    *,
    seed: int,
    work: Path,
) -> tuple[Encoder, list[Epoch]]:
    """Begin as the best of `members` on the val rows, the first of equals; learn from all of them.

    Returns the encoder and its curve, the member's before it. Members are taken one by one, so that two at most
    are in memory; their answers and the student are kept in `work`.
    """
    tokenizer = tokenizer_of(source)
    train = data.train
    made = recombine(train.texts, train.labels, student.recombined * len(train), np.random.default_rng(seed))
    ids, val = (tokenised(tokenizer, texts) for texts in ([*train.texts, *made], data.val.texts))
    net = Encoder(len(data.names), student.recipe.dropout, sizes)
    heard, digests, curve = _listened(net, members, data, ids, val, work)
    target = targets(heard, train.labels, student.hard_share)
    task = Task(ids, target, len(train), val, tokenizer.token_to_id("[MASK]"))
    key = (data.sha256, data.names, train.texts, digests, asdict(student), seed)
    net, more = fine_tune(
        net, task, student.recipe, data, seed=seed, work=work, name=f"student-{seed}", key=key
    )
    return net, [*curve, *more]


def _listened(
    net: Encoder,
    members: Iterable[tuple[Encoder, list[Epoch]]],
    data: Data,
    ids: Sequence[list[int]],
    val: Sequence[list[int]],
    work: Path,
) -> tuple[NDArray[np.float32], list[str], list[Epoch]]:
    """Give `net` the weights of the best; return the mean log-probabilities, all digests and the best's curve."""
    heard = np.zeros((len(ids), len(data.names)), np.float32)
    digests: list[str] = []
    curve: list[Epoch] = []
    most = -1.0
    for member, points in members:
        digests.append(_digest(member))
        right = accuracy_of(member.to(device_at_hand()), val, data) or 0.0
        print(f"member {len(digests)} alone: {right:.2%} of the val rows in scope", file=sys.stderr)
        heard += _answers(member, ids, digests[-1], work)
        if right > most:
            net.load_state_dict(member.state_dict())
            curve, most = points, right
    return heard / len(digests), digests, curve


def targets(heard: NDArray[np.float32], labels: NDArray[np.int64], hard_share: float) -> Tensor:
    """Probabilities [n, labels] to learn, from mean log-probabilities; the first rows are those with labels."""
    soft = torch.from_numpy(heard).softmax(1)
    hard = nnf.one_hot(torch.from_numpy(labels), heard.shape[1]).float()
    soft[: len(labels)] = hard_share * hard + (1 - hard_share) * soft[: len(labels)]
    return soft


def _answers(member: Encoder, ids: Sequence[list[int]], digest: str, work: Path) -> NDArray[np.float32]:
    """Log-probabilities [n, labels] of one member, in half precision where that is quicker."""
    progress = Progress("a member's answers", len(ids))

    def compute(chunk: Sequence[list[int]], start: int) -> NDArray[np.float32]:
        with half_precision(device_at_hand()):
            logits = logits_of(member, chunk, lambda done: progress.at(start + done))
        return torch.from_numpy(logits).log_softmax(1).numpy()

    return cached(work, digest, ids, compute).astype(np.float32)


def _digest(net: Encoder) -> str:
    whole = hashlib.sha256()
    for tensor in net.state_dict().values():
        whole.update(tensor.numpy().tobytes())
    return whole.hexdigest()
