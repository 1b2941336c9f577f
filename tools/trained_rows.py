"""Knows training texts again without holding them: a Bloom filter, carried in the bundle as `trained.bin`.

Format: `ERTR` and a version byte, the number of hashes (1 byte), padding (2), the rows (4, little-endian), then
the bits. A text found may be a false positive (one in a thousand), one not found was not trained on.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tools.rows import normalised

PAYLOAD = "trained.bin"
_MAGIC = b"ERTR\x01"
_HEAD = struct.Struct("<5sB2xI")
#: One in a thousand false positives; 15 bits a row with everything else.
_BITS, _HASHES = 14.4, 10
#: Small files get more: there a single false positive would be a large share.
_LEAST_BYTES = 512
#: More rows found than this chance explains were trained on.
SUSPICION = 1e-6


class TrainedRows:
    """Which texts a model has probably learned from."""

    def __init__(self, bits: NDArray[np.uint8], hashes: int, rows: int) -> None:
        self._bits, self._hashes, self.rows = bits, hashes, rows

    def __contains__(self, text: str) -> bool:
        places = _places(text, self._hashes, 8 * len(self._bits))
        return bool((self._bits[places >> 3] >> (places & 7).astype(np.uint8) & 1).all())

    @property
    def false_positives(self) -> float:
        """The chance that a text is found which is none of them."""
        return float(np.unpackbits(self._bits).mean() ** self._hashes)

    def to_bytes(self) -> bytes:
        """The payload."""
        return _HEAD.pack(_MAGIC, self._hashes, self.rows) + self._bits.tobytes()


def remember(texts: Iterable[str]) -> TrainedRows:
    """Make the filter of some texts, each counted once."""
    unique = sorted({normalised(text) for text in texts})
    bits = np.zeros(max(_LEAST_BYTES, math.ceil(len(unique) * _BITS / 8)), np.uint8)
    for text in unique:
        places = _places(text, _HASHES, 8 * len(bits))
        np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
    return TrainedRows(bits, _HASHES, len(unique))


def read_trained(payload: bytes) -> TrainedRows:
    """Read what `to_bytes` wrote. Raises ValueError."""
    try:
        magic, hashes, rows = _HEAD.unpack_from(payload)
    except struct.error:
        raise ValueError("the trained rows are cut off") from None
    bits = np.frombuffer(payload, np.uint8, offset=_HEAD.size)
    if magic != _MAGIC or not 1 <= hashes <= 32 or not len(bits):
        raise ValueError("the trained rows are of another format")
    return TrainedRows(bits, hashes, rows)


def found_in(trained: TrainedRows, texts: Sequence[str]) -> tuple[list[int], bool]:
    """Indices of the texts that are found, and whether there are too many of them for false positives."""
    seen: dict[str, bool] = {}
    for text in map(normalised, texts):
        if text not in seen:
            seen[text] = text in trained
    found = [i for i, text in enumerate(texts) if seen[normalised(text)]]
    return found, _chance_of(sum(seen.values()), len(seen), trained.false_positives) < SUSPICION


def _chance_of(found: int, rows: int, rate: float) -> float:
    """P(at least `found` of `rows`) at a small rate, in exact terms summed from `found` on."""
    if found == 0 or rate >= 1.0:
        return 1.0
    if rate <= 0.0:
        return 0.0
    term = (
        math.lgamma(rows + 1) - math.lgamma(found + 1) - math.lgamma(rows - found + 1)
        + found * math.log(rate) + (rows - found) * math.log1p(-rate)
    )  # fmt: skip
    total, value = 0.0, math.exp(term)
    for i in range(found, rows + 1):
        total += value
        value *= (rows - i) / (i + 1) * rate / (1.0 - rate)
        if value < total * 1e-12:
            break
    return min(1.0, total)


def _places(text: str, hashes: int, bits: int) -> NDArray[np.int64]:
    """Bit positions by double hashing (Kirsch and Mitzenmacher 2008)."""
    first, second = struct.unpack("<QQ", hashlib.blake2b(normalised(text).encode(), digest_size=16).digest())
    return np.array([(first + i * (second | 1)) % bits for i in range(hashes)], np.int64)
