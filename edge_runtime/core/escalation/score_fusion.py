"""Score fusion: one answer from the log-probabilities of edge and cloud, as their weighted sum.

This is log-linear pooling (Genest and Zidek 1986, "Combining probability distributions"). Two models that make different
errors are right more often together than either alone. The weights are fitted by `python -m tools.fuse`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pooling:
    """The weights of both tiers, and the knots of the map from fused score (rising) to the chance of being right."""

    edge_weight: float
    cloud_weight: float
    scores: tuple[float, ...]
    chances: tuple[float, ...]


def pool(
    edge: NDArray[np.float32], cloud: NDArray[np.float32], edge_weight: float, cloud_weight: float
) -> NDArray[np.float32]:
    """The fused log-probabilities `[..., labels] FP32` of those of edge and cloud, which have the same shape."""
    summed = np.float32(edge_weight) * edge + np.float32(cloud_weight) * cloud
    summed -= summed.max(-1, keepdims=True)
    return np.asarray(summed - np.log(np.exp(summed).sum(-1, keepdims=True)), np.float32)


def join(
    edge: NDArray[np.float32], cloud: NDArray[np.float32], pooling: Pooling
) -> tuple[NDArray[np.float32], int, float]:
    """The fused log-probabilities `[labels] FP32`, the index of the best label, and its calibrated confidence."""
    pooled = pool(edge, cloud, pooling.edge_weight, pooling.cloud_weight)
    best = int(pooled.argmax())
    return pooled, best, float(np.interp(float(np.exp(pooled[best])), pooling.scores, pooling.chances))
