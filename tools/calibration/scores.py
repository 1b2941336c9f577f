"""Logits to one score a row: softmax at a fitted temperature, its largest value."""

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 0.05, 20.0
_GOLDEN = (5**0.5 - 1) / 2


def scores_of(logits: NDArray[np.float32], temperature: float, oos: int | None = None) -> NDArray[np.float64]:
    """The largest softmax value of each row of logits [n, labels] at `temperature`.

    With the index `oos` of the label of what is out of scope, times what this label leaves over.
    """
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return np.asarray(shares.max(1) * (1.0 if oos is None else 1.0 - shares[:, oos]))


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017), to 0.1 %.

    Rows of label -1 (none of the model's) are left out. A weak prior around 1, worth one row at a factor of
    four, decides where there are no rows or where all are right.
    """
    known = labels >= 0
    shifted = logits[known].astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    chosen = shifted[np.arange(len(shifted)), labels[known]]

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        likelihood = float((chosen * scale - np.log(np.exp(shifted * scale).sum(1))).sum())
        return 0.5 * log_temperature**2 - likelihood

    # Golden section: the likelihood is concave in 1/T, so there is one minimum.
    low, high = float(np.log(LOW)), float(np.log(HIGH))
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-3:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    return float(np.exp((low + high) / 2))
