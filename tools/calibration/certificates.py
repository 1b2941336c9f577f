"""Certificates for the answers that are kept: exact binomial bounds, tested from the safest threshold down.

Source: Clopper and Pearson 1934; Learn then Test (Angelopoulos et al. 2021) for the fixed sequence, in which
each test may use the whole of delta because testing ends with the first failure.
"""

import math

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundles.manifest import CertificateEntry

ERRORS = (0.01, 0.02, 0.05)
DELTA = 0.05
#: Nothing is certified on fewer rows.
MIN_ROWS = 200
#: The sequence of thresholds steps by this share of the rows.
_STEPS = 100


def upper_bound(wrong: int, rows: int, delta: float) -> float:
    """Clopper-Pearson: the largest error rate under which `wrong` or fewer of `rows` still have chance `delta`."""
    if wrong >= rows:
        return 1.0
    ways = _log_ways(wrong, rows)
    low, high = wrong / rows, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _log_tail(ways, rows, middle) > math.log(delta):
            low = middle
        else:
            high = middle
    return high


def passes(wrong: int, rows: int, error: float, delta: float) -> bool:
    """Whether the upper bound is at most `error`; cheaper than the bound itself."""
    return wrong < rows and _log_tail(_log_ways(wrong, rows), rows, error) <= math.log(delta)


def rows_needed(wrong: int, error: float, delta: float) -> int:
    """How many rows must be kept for `wrong` of them to pass; for none the rule of three in exact form."""
    high = max(1, math.ceil((wrong + 3) / error))
    while not passes(wrong, high, error, delta):
        high *= 2
    low = wrong
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(wrong, middle, error, delta) else (middle, high)
    return high


def certify(
    chances: NDArray[np.float64], right: NDArray[np.bool_], error: float, delta: float = DELTA
) -> CertificateEntry:
    """The lowest threshold that holds, or how many more rows could give one.

    Which thresholds are tested depends on the order of the chances, not on which rows are right: they begin
    where the kept rows could pass with two of them wrong (with fewer where there are not enough), since a
    sequence that begins with the smallest possible set ends with the first stray error.
    """
    n = len(chances)
    cuts, kept, wrong = _candidates(chances, right)
    enough = [rows_needed(k, error, delta) for k in (2, 1, 0)]
    start = next((need for need in enough if need <= n), None)
    best: tuple[float, int, int] | None = None
    if n >= MIN_ROWS and start is not None:
        last = 0
        for cut, m, k in zip(cuts, kept, wrong, strict=True):
            if m < start or (m < last + n // _STEPS and m < n):
                continue
            if not passes(k, m, error, delta):
                break
            best, last = (cut, m, k), m
    if best is not None:
        return CertificateEntry(error, delta, best[0], n, best[1], best[2])
    return CertificateEntry(error, delta, None, n, missing_rows=_missing(kept, wrong, n, error, delta))


def _candidates(
    chances: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[list[float], list[int], list[int]]:
    """Thresholds between neighbouring chances, the safest first, with the rows kept and the wrong among them.

    Half-way between two chances: a float32 more or less at run time keeps the same rows.
    """
    order = np.argsort(-chances, kind="stable")
    falling = chances[order]
    ends = np.flatnonzero(np.append(falling[1:] < falling[:-1], True)) if len(falling) else np.array([], int)
    lower = np.append(falling[1:], 0.0)[ends]
    cuts = (falling[ends] + lower) / 2
    return cuts.tolist(), (ends + 1).tolist(), np.cumsum(~right[order])[ends].tolist()


def _missing(kept: list[int], wrong: list[int], n: int, error: float, delta: float) -> int:
    """Rows to add until some threshold passes if the new rows are like these; 0 where none ever would."""
    least = max(MIN_ROWS, rows_needed(0, error, delta))
    some = list(zip(kept, wrong, strict=True))[:: -max(1, len(kept) // _STEPS)]
    # A set that keeps less than a twentieth is too small to say anything of a larger sample.
    found = [_total(m, k, n, error, delta) for m, k in some if k / m < error and m * 20 >= n]
    if not found:
        return max(0, least - n)
    return max(1, max(min(found), least) - n)


def _total(m: int, k: int, n: int, error: float, delta: float) -> int:
    """How large the whole sample must grow for a set that keeps `m` of `n` rows, `k` of them wrong."""
    low, high = 1.0, 2.0
    while not passes(math.ceil(k * high), int(m * high), error, delta):
        low, high = high, high * 2
        if high > 1e4:
            break
    for _ in range(20):
        middle = (low + high) / 2
        if passes(math.ceil(k * middle), int(m * middle), error, delta):
            high = middle
        else:
            low = middle
    return math.ceil(n * high)


def _log_ways(wrong: int, rows: int) -> NDArray[np.float64]:
    """log C(rows, i) for i = 0..wrong."""
    i = np.arange(1, wrong + 1)
    return np.concatenate([[0.0], np.cumsum(np.log((rows - i + 1) / i))])


def _log_tail(ways: NDArray[np.float64], rows: int, rate: float) -> float:
    """log P(at most len(ways)-1 of `rows` are wrong) at error rate `rate`."""
    if rate <= 0.0:
        return 0.0
    if rate >= 1.0:
        return -math.inf
    i = np.arange(len(ways))
    terms = ways + i * math.log(rate) + (rows - i) * math.log1p(-rate)
    top = float(terms.max())
    return top + math.log(float(np.exp(terms - top).sum()))
