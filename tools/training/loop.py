"""Epochs that survive a kill: after each epoch the whole state of the training is on disk.

The randomness of an epoch depends only on the seed and the number of the epoch, so a resumed run gives the same result as
one that never stopped.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch


class Stateful(Protocol):
    """A network, an optimiser, an average."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Epoch:
    """One point of the training curve: mean loss, share of right in-scope val rows (None without any)."""

    loss: float
    accuracy: float | None
    seconds: float


class Checkpoint:
    """A file that belongs to one way of training; what another one left in it is not used."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None."""
        if not self.path.exists():
            return None
        saved: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
        if saved.get("key") != self._key:
            print(f"{self.path} is of other data or settings; starting from the beginning", file=sys.stderr)
            return None
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file in one step, so that a kill leaves either the old or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("wb") as file:
            torch.save({**state, "key": self._key}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def run_epochs(
    epochs: int,
    parts: Mapping[str, Stateful],
    checkpoint: Checkpoint | None,
    one_epoch: Callable[[int], float],
    accuracy: Callable[[], float | None],
) -> list[Epoch]:
    """Run what is left of `epochs`; `one_epoch` gets the epoch's number and returns its mean loss."""
    curve: list[Epoch] = []
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        curve = [Epoch(**point) for point in saved["curve"]]
        print(f"going on after epoch {len(curve)} of {epochs} ({checkpoint.path})", file=sys.stderr)
    for epoch in range(len(curve), epochs):
        began = time.monotonic()
        loss = one_epoch(epoch)
        curve.append(Epoch(loss, accuracy(), round(time.monotonic() - began, 2)))
        if checkpoint is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save({**states, "curve": [asdict(point) for point in curve]})
    return curve


def seeded(seed: int, epoch: int) -> np.random.Generator:
    """Seed torch for one epoch, and return numpy's generator for it."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def passes(rows: int, least: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of rows in an epoch: each as often as it takes for `least` visits in all."""
    rounds = -(-least // rows) if rows < least else 1
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])


def in_scope_accuracy(
    answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], oos: int | None
) -> float | None:
    """Share of right answers among the rows in scope; None without rows."""
    inside = labels != (-1 if oos is None else oos)
    return float((answers == labels)[inside].mean()) if inside.any() else None
