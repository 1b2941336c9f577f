"""An escalated answer that keeps what the edge knew: both tiers' evidence joined, where the bundle was fitted for it."""

from dataclasses import dataclass

import numpy as np

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.escalation.score_fusion import Pooling, join
from edge_runtime.core.messages import Answer
from edge_runtime.processing import Processor
from edge_runtime.processing.text_classification import TextClassification


@dataclass(frozen=True, slots=True)
class Joining:
    """What joins the answers of one model with those of the cloud's version `cloud_version`."""

    cloud_version: str
    labels: tuple[bytes, ...]
    pooling: Pooling

    def join(self, edge: Answer, cloud: Answer) -> Answer:
        """One answer from two that both carry their scores, finite ones as `read_answers` sees to.

        Raises InvalidRequest where the cloud's scores contradict its answer.
        """
        (scores,) = cloud.extras
        if self.labels[int(scores.argmax())] != cloud.values[0]:
            raise InvalidRequest("The cloud's scores do not belong to its answer.")
        pooled, best, chance = join(edge.extras[0], scores, self.pooling)
        return Answer((self.labels[best], np.float32(chance)), chance, (pooled,))


def joining_of(manifest: Manifest, processor: Processor) -> Joining | None:
    """How this model's answers join the cloud's; None where its bundle does not say."""
    fusion = manifest.calibration.fusion if manifest.calibration is not None else None
    if fusion is None or not isinstance(processor, TextClassification):
        return None
    scores, chances = zip(*fusion.knots, strict=True)
    return Joining(
        fusion.cloud_version,
        processor.labels,
        Pooling(fusion.edge_weight, fusion.cloud_weight, scores, chances),
    )
