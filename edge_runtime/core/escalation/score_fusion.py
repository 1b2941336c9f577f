"""One answer from two: the evidence of edge and cloud joined by a weighted sum of log-probabilities.

Log-linear pooling (Genest and Zidek 1986, "Combining probability distributions"): two models that err
differently are together right more often than either. The weights are fitted with the bundle's calibration.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pooling:
    """Weights of both tiers' log-probabilities, and the knots (rising scores, chances) of the joined score."""

    edge_weight: float
    cloud_weight: float
    scores: tuple[float, ...]
    chances: tuple[float, ...]


def pool(
    edge: NDArray[np.float32], cloud: NDArray[np.float32], edge_weight: float, cloud_weight: float
) -> NDArray[np.float32]:
    """Log-probabilities `[..., labels] FP32` of the joined answer from those of both tiers."""
    summed = np.float32(edge_weight) * edge + np.float32(cloud_weight) * cloud
    summed -= summed.max(-1, keepdims=True)
    return np.asarray(summed - np.log(np.exp(summed).sum(-1, keepdims=True)), np.float32)


def join(
    edge: NDArray[np.float32], cloud: NDArray[np.float32], pooling: Pooling
) -> tuple[NDArray[np.float32], int, float]:
    """Pooled log-probabilities `[labels]`, the index of the best label and the probability that it is right."""
    pooled = pool(edge, cloud, pooling.edge_weight, pooling.cloud_weight)
    best = int(pooled.argmax())
    return pooled, best, float(np.interp(float(np.exp(pooled[best])), pooling.scores, pooling.chances))
