"""Texts as the cloud's encoder reads them: token ids, some masked, in padded batches of similar length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tools.encoder import PAD
from tools.training.loop import passes

#: Lengths that a packed bundle pads to; texts are cut at the last one.
LENGTHS = (8, 16, 32, 64)


def tokenizer_of(source: Path) -> Tokenizer:
    """The folder's tokeniser, cutting at the longest length and never padding."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    return tokenizer


def tokenised(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the sentence marks."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def hidden(ids: list[int], share: float, mask_token: int, rng: np.random.Generator) -> list[int]:
    """The tokens with a share of them hidden, never the sentence marks at both ends."""
    draws = rng.random(len(ids)) < share
    return [
        mask_token if draw and 0 < i < len(ids) - 1 else x
        for i, (x, draw) in enumerate(zip(ids, draws, strict=True))
    ]


def padded(ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, longest]."""
    length = max(map(len, ids))
    table = torch.full((len(ids), length), PAD, dtype=torch.long)
    mask = torch.zeros(len(ids), length)
    for row, tokens in enumerate(ids):
        table[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1.0
    return table, mask


def batches(
    ids: Sequence[list[int]], least_rows: int, batch: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Shuffled batches of rows of like length, so that little is spent on padding."""
    rows = passes(len(ids), least_rows, rng)
    lengths = np.array([len(ids[i]) for i in rows])
    order = rows[np.argsort(lengths + 2.0 * rng.random(len(rows)), kind="stable")]
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [parts[i] for i in rng.permutation(len(parts))]
