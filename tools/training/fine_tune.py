"""Fine-tune an encoder on labels or on probabilities; what is kept are its averaged weights."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nnf

from tools.encoder import Encoder
from tools.training.data import Data
from tools.training.loop import Checkpoint, Epoch, in_scope_accuracy, passes, run_epochs, seeded
from tools.training.progress import Progress
from tools.training.word_pieces import batches, hidden, padded


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: AdamW with warm-up and linear decay; the head learns faster than the encoder.

    `average` is the decay of the averaged weights per step, which are the ones that are kept.
    """

    epochs: int = 6
    rate: float = 1e-4
    head_factor: float = 20.0
    batch: int = 64
    least_rows: int = 2500  # an epoch visits at least so many rows: small files are visited several times
    dropout: float = 0.1
    hidden_words: float = 0.1
    smoothing: float = 0.05
    decay: float = 0.01
    warm_up: float = 0.1
    least_rate: float = 0.02  # share of the rate that the decay ends with
    clip: float = 1.0
    average: float = 0.995
    average_every: int = 4


class Average:
    """Exponential moving average of a network's weights, updated every few steps; slower to forget as it ages."""

    def __init__(self, net: torch.nn.Module, decay: float, every: int) -> None:
        self._net, self._decay, self._every = net, decay, every
        self.weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        self._steps = 0

    def after_step(self) -> None:
        """Take in the weights as they are now."""
        self._steps += 1
        if self._steps % self._every == 0:
            decay = min(self._decay, (1 + self._steps) / (10 + self._steps)) ** self._every
            with torch.no_grad():
                for name, tensor in self._net.state_dict().items():
                    self.weights[name].lerp_(tensor, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(tensor)


@dataclass(frozen=True)
class Task:
    """Token ids of texts, and what to answer: labels [n] INT64 or probabilities [n, labels] FP32.

    No words are hidden from text `whole_from` on. `val` are the token ids of the val texts.
    """

    ids: Sequence[list[int]]
    target: Tensor
    whole_from: int
    val: Sequence[list[int]]
    mask_token: int


def fine_tune(
    net: Encoder, task: Task, recipe: Recipe, data: Data, *, seed: int, work: Path, name: str, key: object
) -> tuple[Encoder, list[Epoch]]:
    """Train `net` where it stands; return one with its averaged weights, and the curve.

    A killed run continues from `work`/running-NAME.pt. The result is kept as `work`/NAME.pt for the same `key`.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    running = Checkpoint(work / f"running-{name}.pt", digest)
    finished = Checkpoint(work / f"{name}.pt", digest)
    done = finished.load()
    if done is not None:
        net.load_state_dict(done["weights"])
        return net, [Epoch(**point) for point in done["curve"]]
    device = device_at_hand()
    net.to(device)
    optimiser = optimiser_of(net, recipe)
    visits = len(passes(len(task.ids), recipe.least_rows, np.random.default_rng(0)))
    batch = min(recipe.batch, visits)
    steps = -(-visits // batch)
    schedule = schedule_of(optimiser, recipe, recipe.epochs * steps)
    average = Average(net, recipe.average, recipe.average_every)
    averaged = copy.deepcopy(net)
    progress = Progress(f"fine-tuning ({device.type})", recipe.epochs * steps)

    def one_epoch(epoch: int) -> float:
        rng = seeded(seed, epoch)
        net.train()
        total = 0.0
        for step, rows in enumerate(batches(task.ids, recipe.least_rows, batch, rng)):
            inputs, mask = padded([_shown(task, i, recipe.hidden_words, rng) for i in rows])
            with half_precision(device):
                logits = net(inputs.to(device), mask.to(device))
            wanted = task.target[rows].to(device)
            loss = nnf.cross_entropy(logits.float(), wanted, label_smoothing=recipe.smoothing)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimiser.step()
            schedule.step()
            average.after_step()
            total += float(loss.detach())
            progress.at(epoch * steps + step + 1, f"epoch {epoch + 1}/{recipe.epochs}")
        return total / steps

    def accuracy() -> float | None:
        averaged.load_state_dict(average.weights)
        return accuracy_of(averaged, task.val, data)

    parts = {"net": net, "optimiser": optimiser, "schedule": schedule, "average": average}
    curve = run_epochs(recipe.epochs, parts, running, one_epoch, accuracy)
    finished.save({"weights": average.weights, "curve": [asdict(point) for point in curve]})
    running.path.unlink(missing_ok=True)
    averaged.load_state_dict(average.weights)  # no epoch was left where a run was killed after its last one
    return averaged.cpu(), curve


def optimiser_of(net: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and biases are not decayed."""
    head = list(net.head.parameters())
    known = {id(p) for p in head}
    body = [p for p in net.parameters() if id(p) not in known]
    groups = [
        {"params": [p for p in body if p.dim() > 1], "weight_decay": recipe.decay},
        {"params": [p for p in body if p.dim() == 1], "weight_decay": 0.0},
        {"params": head, "lr": recipe.head_factor * recipe.rate, "weight_decay": recipe.decay},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, fused=True)


def schedule_of(
    optimiser: torch.optim.Optimizer, recipe: Recipe, total: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up, then fall in a straight line."""
    warm = max(1, round(recipe.warm_up * total))
    fall = max(1, total - warm)
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(recipe.least_rate, (total - step) / fall))
    )


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the processor has instructions for it; elsewhere it is only slower."""
    good = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(good))


def _shown(task: Task, row: int, share: float, rng: np.random.Generator) -> list[int]:
    return task.ids[row] if row >= task.whole_from else hidden(task.ids[row], share, task.mask_token, rng)


def device_at_hand() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accuracy_of(net: Encoder, val: Sequence[list[int]], data: Data) -> float | None:
    """Share of right answers among the val rows in scope, in full precision; None without rows."""
    return in_scope_accuracy(logits_of(net, val).argmax(1), data.val.labels, data.oos) if val else None


def logits_of(
    net: Encoder, ids: Sequence[list[int]], at: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """The output of the head `[n, width]` without dropout; `at` is called with the number of texts done."""
    net.eval()
    device = net.words.weight.device
    order = np.argsort([len(x) for x in ids], kind="stable")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), 128):
            rows = order[start : start + 128]
            inputs, mask = padded([ids[i] for i in rows])
            parts.append(net(inputs.to(device), mask.to(device)).float().cpu().numpy())
            if at is not None:
                at(start + len(rows))
    return np.concatenate(parts)[np.argsort(order)]
