"""Hashed word and character n-grams: a text becomes a fixed number of table indices, without a vocabulary.

Words are hashed by CRC-32 (equal on every platform, and in C), character n-grams are the text's own bytes
read as little-endian integers; one multiplication spreads both over the table. There is no randomness and
no state: the same text gives the same indices everywhere.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core.messages import Array
from edge_runtime.processing import PreparedRow

#: An odd number near 2^64 / golden ratio: a multiplication by it spreads keys over the high bits (Knuth 6.4).
SPREAD = 0x9E3779B97F4A7C15
_SPREAD = np.uint64(SPREAD)
_HALF = np.uint64(32)
#: Tags above the 32 bits of a CRC keep word keys apart from each other and from n-grams of up to 5 bytes.
_WORD, _PAIR, _SKIP = 1 << 56, 2 << 56, 3 << 56
#: The longest n-gram; a key has room for more, but the tags above begin at bit 56.
LONGEST_GRAM = 6
_DTYPES = (np.dtype(np.int32),)


class NgramFeaturiser:
    """Turns texts into `slots` indices below `buckets`; unused slots hold `buckets`, the pad index.

    Slots fill in the order words, neighbouring pairs, pairs with one word between, then n-grams by
    length as given in `grams`; what does not fit is left out, so very long texts keep their words.
    """

    def __init__(self, *, slots: int, buckets: int, grams: tuple[int, ...], skips: bool) -> None:
        if not 1 <= slots <= 4096 or not 1 <= buckets < 2**31:
            raise ValueError(f"ngrams: slots {slots} must be 1..4096 and buckets {buckets} 1..2^31-1")
        if not all(1 <= n <= LONGEST_GRAM for n in grams):
            raise ValueError(f"ngrams: lengths {list(grams)} must lie in 1..{LONGEST_GRAM}")
        self.slots = slots
        self.buckets = buckets
        self._grams = tuple((n, np.uint64((1 << 8 * n) - 1)) for n in grams)
        self._skips = skips
        self._scale = np.uint64(buckets)
        self._shapes = ((slots,),)

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """One input, INT32."""
        return _DTYPES

    def prepare(self, text: bytes) -> PreparedRow:
        """Return the text as it is: all texts have `[slots]` indices."""
        return PreparedRow(self._shapes, len(text), text)

    def encode_batch(self, batch: Sequence[bytes], buffers: Sequence[Array]) -> None:
        """Write the indices of each text into the only buffer, `[rows, slots] INT32`."""
        (out,) = buffers
        for i, text in enumerate(batch):
            self._write(text.decode("utf-8"), out[i])

    def _write(self, text: str, out: Array) -> None:
        """Write the indices `[slots] INT32` of one text; an empty text is all padding."""
        words = " ".join(text.lower().split()).encode("utf-8").split()
        if not words:
            out.fill(self.buckets)
            return
        hashes = [zlib.crc32(word) for word in words]
        heads = [_WORD | h for h in hashes]
        # The second word's CRC continues the first one's, so the order of a pair matters.
        heads += [_PAIR | zlib.crc32(word, h) for h, word in zip(hashes, words[1:], strict=False)]
        if self._skips:
            heads += [_SKIP | zlib.crc32(word, h) for h, word in zip(hashes, words[2:], strict=False)]
        used = min(len(heads), self.slots)
        keys = np.empty(self.slots, np.uint64)
        keys[:used] = heads[:used]
        # The eight bytes from each position on as one integer: a view with a stride of one byte, without a copy.
        line = b" " + b" ".join(words) + b" "
        windows: NDArray[np.uint64] = np.ndarray((len(line),), "<u8", line + bytes(8), 0, (1,))
        for n, mask in self._grams:
            count = min(len(line) - n + 1, self.slots - used)
            if count > 0:
                np.bitwise_and(windows[:count], mask, out=keys[used : used + count])
                used += count
        spread = keys[:used]
        spread *= _SPREAD
        spread >>= _HALF
        spread *= self._scale
        spread >>= _HALF
        out[:used] = spread
        out[used:] = self.buckets
