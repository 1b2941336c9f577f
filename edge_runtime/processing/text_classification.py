"""From texts to labels: one BYTES tensor of texts in, a label and a calibrated confidence for each text out."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core.errors import InvalidRequest, TooLarge
from edge_runtime.core.escalation.score_fusion import Pooling, join
from edge_runtime.core.messages import Answer, Array, InferReply, Signature, Tensor, TensorSpec
from edge_runtime.core.protocol.replies import read_answer
from edge_runtime.processing import Encoder, PreparedRow

#: The output on request that carries a tier's evidence, by which the answers of two tiers are fused.
SCORES = "scores"
SIGNATURE = Signature(
    inputs=(TensorSpec("text", "BYTES", (-1,)),),
    outputs=(TensorSpec("intent", "BYTES", (-1,)), TensorSpec("confidence", "FP32", (-1,))),
)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How answers of this model are fused with those of the cloud's model in version `cloud_version`."""

    cloud_version: str
    pooling: Pooling


@dataclass(frozen=True, slots=True)
class Calibration:
    """Maps logits to the probability that the answer is right: softmax at `temperature`, then the knots.

    The raw score is the largest value of the softmax. With `out_of_scope`, the index of the label of texts that belong
    to no other label, the score is multiplied by one minus the probability of that label, so that such a text is not
    kept as a sure answer: of 100 such texts 96 instead of 92 are escalated, with 15 % of the other texts, at equal
    accuracy of the kept answers.

    The knots map `scores`, which rise, to `chances`, which do not fall; linearly between knots, constant beyond them.
    """

    temperature: float
    scores: tuple[float, ...]
    chances: tuple[float, ...]
    out_of_scope: int | None = None

    def read(self, logits: NDArray[np.float32], best: int) -> tuple[float, NDArray[np.float32]]:
        """Return the raw score of label `best` (the largest logit), and all log-probabilities.

        Both arrays are `[labels] FP32`; the log-probabilities are the softmax at `temperature`. `chance` turns
        the raw score into the probability that the label is right.
        """
        shifted = (logits - logits[best]) / np.float32(self.temperature)
        shares = np.exp(shifted)
        total = shares.sum()
        score = 1.0 / float(total)
        if self.out_of_scope is not None:
            score *= 1.0 - score * float(shares[self.out_of_scope])
        return score, shifted - np.log(total)

    def chance(self, score: float) -> float:
        """Return the probability that an answer of this raw score is right."""
        if score <= self.scores[0]:
            return self.chances[0]
        if score >= self.scores[-1]:
            return self.chances[-1]
        # As np.interp computes it; np.interp takes eight times as long, since it turns the knots into arrays.
        at = bisect_right(self.scores, score, 1, len(self.scores) - 1)
        left, low = self.scores[at - 1], self.chances[at - 1]
        return (self.chances[at] - low) / (self.scores[at] - left) * (score - left) + low


def texts_of(inputs: Sequence[Tensor], max_text_bytes: int) -> list[bytes]:
    """Return the UTF-8 texts of a request's only input, `text [n] BYTES`. Raises InvalidRequest and TooLarge."""
    if len(inputs) != 1 or inputs[0].name != "text":
        raise InvalidRequest("this model takes exactly one input, named 'text'")
    (tensor,) = inputs
    if tensor.datatype != "BYTES" or not isinstance(tensor.data, tuple):
        raise InvalidRequest(f"input 'text' has datatype {tensor.datatype}; send BYTES")
    if len(tensor.shape) != 1:
        raise InvalidRequest(f"input 'text' has shape {list(tensor.shape)}; send [n], one text per row")
    if not tensor.data:
        raise InvalidRequest("input 'text' is empty; send at least one text")
    if len(tensor.data) != tensor.shape[0]:
        raise InvalidRequest(
            f"input 'text' has {len(tensor.data)} texts where its shape says {tensor.shape[0]}"
        )
    for at, text in enumerate(tensor.data):
        if len(text) > max_text_bytes:
            raise TooLarge(
                f"text {at} has {len(text)} bytes; at most {max_text_bytes} are accepted, send less"
            )
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"text {at} is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
    return list(tensor.data)


class TextTask:
    """What tasks on texts share: a row is a UTF-8 text, and the first output is a label.

    Answers of two tiers are not fused unless a subclass does it.
    """

    def __init__(
        self,
        signature: Signature,
        featuriser: Encoder,
        labels: Sequence[str],
        *,
        version: str,
        max_text_bytes: int,
    ) -> None:
        self._signature = signature
        self._featuriser = featuriser
        self._labels = tuple(label.encode("utf-8") for label in labels)
        self._known = frozenset(self._labels)
        self._version = version
        self._max_text_bytes = max_text_bytes

    @property
    def signature(self) -> Signature:
        """`text [n] BYTES` -> `intent [n] BYTES`, `confidence [n] FP32` and what the task adds."""
        return self._signature

    @property
    def version(self) -> str:
        """Part of every cache key."""
        return self._version

    @property
    def labels(self) -> tuple[bytes, ...]:
        """The intents, in the order of the logits."""
        return self._labels

    @property
    def input_dtypes(self) -> tuple[np.dtype[Any], ...]:
        """Those of the featuriser."""
        return self._featuriser.input_dtypes

    @property
    def fusion_version(self) -> str | None:
        """None: answers of two tiers are not fused."""
        return None

    def split(self, inputs: Sequence[Tensor]) -> list[bytes]:
        """Return each text's exact UTF-8 bytes; see `Processor.split`."""
        return texts_of(inputs, self._max_text_bytes)

    def canonical(self, question: bytes) -> bytes:
        """Return the text itself."""
        return question

    def prepare(self, question: bytes) -> PreparedRow:
        """See `Encoder.prepare`."""
        return self._featuriser.prepare(question)

    def encode_batch(self, batch: Sequence[Any], buffers: Sequence[Array]) -> None:
        """See `Encoder.encode_batch`."""
        self._featuriser.encode_batch(batch, buffers)

    def tensors(self, question: bytes) -> tuple[Tensor, ...]:
        """Return `text [1] BYTES`."""
        return (Tensor("text", "BYTES", (1,), (question,)),)

    def read(self, reply: InferReply, *, with_extras: bool) -> Answer:
        """Read a reply of one row; its first output must be one of the labels. See `Processor.read`."""
        answer = read_answer(self._signature, reply, "confidence", with_extras=with_extras)
        if answer.values[0] not in self._known:
            raise InvalidRequest("The cloud answered with a label this device does not know.")
        return answer

    def fuse(self, edge: Answer, cloud: Answer) -> Answer:  # noqa: ARG002 - see `fusion_version`
        """Return the cloud's answer."""
        return cloud


class TextClassification(TextTask):
    """Splits requests into texts, encodes them, and reads logits `[labels]` as an answer.

    On request an answer has `scores [n, labels] FP32`: log-probabilities in the order of the labels.
    """

    def __init__(
        self,
        featuriser: Encoder,
        labels: Sequence[str],
        calibration: Calibration,
        *,
        version: str,
        max_text_bytes: int,
        fusion: Fusion | None = None,
    ) -> None:
        signature = replace(SIGNATURE, on_request=(TensorSpec(SCORES, "FP32", (-1, len(labels))),))
        super().__init__(signature, featuriser, labels, version=version, max_text_bytes=max_text_bytes)
        self._calibration = calibration
        self._fusion = fusion

    @property
    def model_outputs(self) -> tuple[TensorSpec, ...]:
        """Logits `[labels] FP32`."""
        return (TensorSpec("logits", "FP32", (-1, len(self._labels))),)

    @property
    def fusion_version(self) -> str | None:
        """As the bundle's calibration says."""
        return None if self._fusion is None else self._fusion.cloud_version

    def decode_batch(self, outputs: Sequence[Array], batch: Sequence[Any]) -> list[Answer]:
        """Return intent, confidence and scores from logits `[rows, labels] FP32`."""
        (logits,) = outputs
        return [self._answer(logits[i]) for i in range(len(batch))]

    def _answer(self, logits: Array) -> Answer:
        best = int(logits.argmax())
        raw, scores = self._calibration.read(logits, best)
        confidence = self._calibration.chance(raw)
        return Answer((self._labels[best], np.float32(confidence)), confidence, (scores,), raw)

    def fuse(self, edge: Answer, cloud: Answer) -> Answer:
        """Pool both tiers' log-probabilities; see `Processor.fuse`."""
        assert self._fusion is not None, "fuse without fusion_version"
        (scores,) = cloud.extras
        if self._labels[int(scores.argmax())] != cloud.values[0]:
            raise InvalidRequest("The cloud's scores do not belong to its answer.")
        pooled, best, chance = join(edge.extras[0], scores, self._fusion.pooling)
        return Answer((self._labels[best], np.float32(chance)), chance, (pooled,))
