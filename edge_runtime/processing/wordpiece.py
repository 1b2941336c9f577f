"""The only door to `tokenizers`: a text becomes word-piece ids, padded to one of a few lengths."""

import numpy as np
from tokenizers import Tokenizer

from edge_runtime.core.errors import BundleError
from edge_runtime.core.messages import Row


class WordpieceFeaturiser:
    """Turns texts into ids and mask of the first of `lengths` that holds them; longer texts are cut.

    Few lengths mean few lanes: rows padded alike share a batch.
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

    def encode(self, text: str) -> Row:
        """Return ids `[length] INT64` and mask `[length] INT64` (1: a token, 0: padding)."""
        tokens = self._tokenizer.encode(text).ids
        count = len(tokens)
        length = next(length for length in self._lengths if length >= count)
        ids = np.full(length, self._pad, np.int64)
        ids[:count] = tokens
        mask = np.zeros(length, np.int64)
        mask[:count] = 1
        return ids, mask
