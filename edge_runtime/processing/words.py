"""Words of a text with their places, and hashed features of each word. There is no vocabulary.

Words are runs of letters and digits; every other visible character is a word of its own. A word is described by
itself, its shape and its character n-grams, each hashed into one table as `ngrams` does.
"""

import re
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.core.messages import Array
from edge_runtime.processing import PreparedRow
from edge_runtime.processing.ngrams import SPREAD

#: Splits "tobymac's" into three, so that a value never begins or ends inside a word.
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
_LOW = (1 << 64) - 1
#: Tags above the 32 bits of a CRC and the 40 bits of the longest n-gram keep the kinds of keys apart.
_EXACT, _SHAPE = 1 << 56, 2 << 56
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
#: Bytes of a word that are looked at: longer ones are not words, and would fill the memo.
_LONGEST_WORD = 40
#: Words whose indices are kept, about 200 bytes each: most words of a command were in another one shortly before.
_MEMO = 4096
_DTYPES = (np.dtype(np.int32),)


class Words(NamedTuple):
    """A text and where its words lie: start and end of each, in code points."""

    text: str
    places: list[tuple[int, int]]


def words_of(text: str, limit: int) -> list[str]:
    """Return the first `limit` words of a text."""
    return _WORD.findall(text)[:limit]


def places_of(text: str, limit: int) -> list[tuple[int, int]]:
    """Return start and end of the same words, in code points of the text."""
    return [match.span() for match in _WORD.finditer(text)][:limit]


class WordFeaturiser:
    """Turns words into `features` indices each below `buckets`; unused ones hold `buckets`, the pad index.

    A row is padded to the next of `lengths`; words beyond the longest are left out. The first index of a word is never
    the pad index, and that of a padded place always is.
    """

    def __init__(
        self, *, features: int, buckets: int, grams: tuple[int, ...], lengths: tuple[int, ...]
    ) -> None:
        if not 2 <= features <= 256 or not 1 <= buckets < 2**31:
            raise ValueError(f"words: features {features} must be 2..256 and buckets {buckets} 1..2^31-1")
        if not all(1 <= n <= 5 for n in grams):
            raise ValueError(f"words: lengths of n-grams {list(grams)} must lie in 1..5")
        if not lengths or list(lengths) != sorted(set(lengths)) or not 1 <= lengths[0] <= lengths[-1] <= 512:
            raise ValueError(f"words: lengths {list(lengths)} must rise within 1..512")
        self.features = features
        self.buckets = buckets
        self.lengths = lengths
        self._grams = grams
        self._padding = array("i", [buckets] * features).tobytes()
        self._indices = lru_cache(_MEMO)(self._computed)

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """One input, INT32."""
        return _DTYPES

    def prepare(self, text: bytes) -> PreparedRow:
        """Return the text with the places of its words; its shape is `[words, features]`."""
        plain = text.decode("utf-8")
        places = places_of(plain, self.lengths[-1])
        length = next(length for length in self.lengths if len(places) <= length)
        shape = (length, self.features)
        return PreparedRow((shape,), len(text) + 4 * length * self.features, Words(plain, places))

    def encode_batch(self, batch: Sequence[Words], buffers: Sequence[Array]) -> None:
        """Write the indices of each text into the only buffer, `[rows, words, features] INT32`."""
        (out,) = buffers
        length = out.shape[1]
        for i, (text, places) in enumerate(batch):
            rows = [self._indices(text[start : min(end, start + _LONGEST_WORD)]) for start, end in places]
            rows += [self._padding] * (length - len(places))
            out[i] = np.frombuffer(b"".join(rows), np.int32).reshape(length, self.features)

    def _computed(self, word: str) -> bytes:
        """The indices `[features] INT32` of one word, as memory."""
        low = word.lower().encode("utf-8")
        line = b"<" + low.translate(_DIGITS) + b">"
        keys = [_EXACT | zlib.crc32(low), _SHAPE | _shape(word)]
        read = int.from_bytes
        for n in self._grams:
            keys += [read(line[i : i + n], "little") for i in range(len(line) - n + 1)]
        del keys[self.features :]
        indices = array("i", [((key * SPREAD & _LOW) >> 32) * self.buckets >> 32 for key in keys])
        return indices.tobytes() + self._padding[4 * len(keys) :]


def _shape(word: str) -> int:
    """A small number for how a word is written: by its case, or by its number of digits."""
    if word.isdigit():
        return 16 + min(len(word), 8)
    if word.islower():
        return 1
    if word.istitle():
        return 2
    if word.isupper():
        return 3
    if word.isalpha():
        return 4  # mixed case, or a script without
    return 5 if any(letter.isalnum() for letter in word) else 6
