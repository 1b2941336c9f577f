"""Word-piece ids of a text, padded to one of a few lengths. The only module that imports `tokenizers`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Array
from edge_runtime.processing import PreparedRow

_DTYPES = (np.dtype(np.int64), np.dtype(np.int64))


class WordpieceFeaturiser:
    """Turns texts into ids and mask of the first of `lengths` that holds them; longer texts are cut.

    Rows of equal length share a batch, so few lengths mean full batches.
    """

    def __init__(self, tokenizer: bytes, *, lengths: tuple[int, ...], pad: int) -> None:
        """Read a `tokenizer.json`. Raises BundleError if it is not one."""
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise BundleError(
                f"the tokeniser cannot be read ({str(error)[:80]}); make the bundle again"
            ) from None
        self._lengths = tuple(sorted(lengths))
        self._pad = pad
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._lengths[-1])

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """Ids and mask, both INT64."""
        return _DTYPES

    def prepare(self, text: bytes) -> PreparedRow:
        """Return the ids of one text, with the first of the lengths that holds them."""
        ids: list[int] = self._tokenizer.encode(text.decode("utf-8")).ids
        length = next(length for length in self._lengths if length >= len(ids))
        return PreparedRow(((length,), (length,)), 16 * length, ids)

    def encode_batch(self, batch: Sequence[list[int]], buffers: Sequence[Array]) -> None:
        """Write ids and mask, both `[rows, length] INT64` (mask 1: a token, 0: padding)."""
        ids, mask = buffers
        for i, tokens in enumerate(batch):
            count = len(tokens)
            ids[i, :count] = tokens
            ids[i, count:] = self._pad
            mask[i, :count] = 1
            mask[i, count:] = 0
