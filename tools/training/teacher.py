"""The answers of a larger bundle as training targets in addition to the labels."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.folder import load_bundle
from edge_runtime.bundles.manifest import CreditEntry
from tools.pack import bundle_logits, labels_of
from tools.rows import BadRows, shortened
from tools.training.progress import Progress

#: Texts per file of the cache; a killed run loses at most so many.
CHUNK = 8192

T = TypeVar("T")


class BundleTeacher:
    """A bundle that knows at least these labels. Raises BadRows or BundleError where it does not."""

    def __init__(self, path: Path, names: Sequence[str], threads: int) -> None:
        bundle = load_bundle(path)
        labels = labels_of(bundle)
        index = {name: i for i, name in enumerate(labels)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise BadRows(f"the teacher does not know {len(unknown)} labels:\n{shortened(unknown)}")
        self.digest = bundle.digest
        self.credits: tuple[CreditEntry, ...] = bundle.manifest.credits
        self._columns = [index[name] for name in names]
        self._path, self._threads = path, threads

    def logits(self, texts: Sequence[str], work: Path) -> NDArray[np.float16]:
        """Logits [n, labels], kept in the folder `work` as they come: a transformer takes minutes."""
        progress = Progress("the teacher's answers", len(texts))

        def compute(chunk: Sequence[str], start: int) -> NDArray[np.float32]:
            heard = bundle_logits(self._path, chunk, self._threads, lambda done: progress.at(start + done))
            return heard[:, self._columns]

        return cached(work, repr((self.digest, self._columns)), texts, compute)


def cached(
    work: Path, key: str, texts: Sequence[T], compute: Callable[[Sequence[T], int], NDArray[np.float32]]
) -> NDArray[np.float16]:
    """What `compute(chunk, start)` returns for all texts (or their tokens), each chunk kept in a file of `work` as it is done."""
    work.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        name = hashlib.sha256(repr((key, chunk)).encode()).hexdigest()[:16]
        path = work / f"teacher-{name}.npy"
        if not path.exists():
            fresh = path.with_suffix(".new")
            with fresh.open("wb") as file:
                np.save(file, compute(chunk, start).astype(np.float16))
            fresh.replace(path)
        parts.append(np.load(path))
    return np.concatenate(parts)


class Teacher(Protocol):
    """A model that labels texts; `digest` identifies it."""

    digest: str
    credits: tuple[CreditEntry, ...]

    def logits(self, texts: Sequence[str], work: Path) -> NDArray[np.float16]:
        """Logits [n, labels]."""
