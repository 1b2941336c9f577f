"""The sentence encoder as it is published, with a linear head fitted to the labels, as a teacher.

The encoder itself is not trained, so this costs one pass over the texts: 3 to 6 ms each, where fine-tuning takes a
quarter of an hour. It knows English.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as nnf

from edge_runtime.bundles.manifest import CreditEntry
from tools.encoder import Encoder, load_pretrained, pretrained_folder
from tools.pack import MINILM
from tools.training.data import Part
from tools.training.fine_tune import device_at_hand, half_precision, logits_of
from tools.training.progress import Progress
from tools.training.teacher import cached
from tools.training.word_pieces import tokenised, tokenizer_of

#: Unit vectors are stretched by this before the head; with it the head needs no weight decay to stay calibrated.
STRETCH = 10.0
EPOCHS, BATCH, RATE = 30, 128, 3e-3
#: Share of letters outside ASCII above which the encoder is not asked.
_FOREIGN = 0.1


def is_english(texts: Sequence[str]) -> bool:
    """Whether the encoder may know the language, judged by the script."""
    letters = [c for text in texts for c in text if c.isalpha()]
    return bool(letters) and sum(not c.isascii() for c in letters) <= _FOREIGN * len(letters)


class SentenceTeacher:
    """Logits by a linear head on sentence vectors. Raises EdgeRuntimeError where the encoder is not installed."""

    digest = "all-MiniLM-L6-v2"
    credits: tuple[CreditEntry, ...] = (MINILM,)

    def __init__(self, train: Part, labels: int, *, seed: int) -> None:
        source = pretrained_folder()
        encoder = Encoder(labels)
        load_pretrained(encoder, source / "model.safetensors")
        encoder.head = nn.Identity()  # type: ignore[assignment]
        self._device = device_at_hand()
        self._encoder = encoder.eval().to(self._device)
        self._tokenizer = tokenizer_of(source)
        self._train, self._labels, self._seed = train, labels, seed

    def logits(self, texts: Sequence[str], work: Path) -> NDArray[np.float16]:
        """Logits [n, labels]; `texts` begin with those of the train part. Vectors are kept in `work`."""
        vectors = torch.from_numpy(self._vectors(texts, work).astype(np.float32))
        vectors = STRETCH * nnf.normalize(vectors, dim=1)
        head = fit_head(vectors[: len(self._train)], self._train.labels, self._labels, self._seed)
        with torch.inference_mode():
            return head(vectors).numpy().astype(np.float16)

    def _vectors(self, texts: Sequence[str], work: Path) -> NDArray[np.float16]:
        progress = Progress("the teacher's vectors", len(texts))

        def compute(chunk: Sequence[str], start: int) -> NDArray[np.float32]:
            with half_precision(self._device):
                return logits_of(
                    self._encoder, tokenised(self._tokenizer, chunk), lambda done: progress.at(start + done)
                )

        return cached(work, self.digest, texts, compute)


def fit_head(vectors: torch.Tensor, labels: NDArray[np.int64], count: int, seed: int) -> nn.Linear:
    """A linear classifier of vectors [n, width]."""
    torch.manual_seed(seed)
    head = nn.Linear(vectors.shape[1], count)
    optimiser = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.0)
    target = torch.from_numpy(labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products as small as these take longer to share than to compute
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(vectors)).split(BATCH):
            loss = nnf.cross_entropy(head(vectors[rows]), target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.set_num_threads(threads)
    return head
