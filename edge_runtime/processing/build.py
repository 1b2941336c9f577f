"""Builds the processor that a bundle's manifest describes: a closed list of kinds, with typed parameters."""

from collections.abc import Mapping, Sequence
from typing import assert_never

import msgspec

from edge_runtime.bundles.manifest import Manifest, SignatureEntry
from edge_runtime.core.errors import BundleError, Unsupported
from edge_runtime.core.escalation.score_fusion import Pooling
from edge_runtime.core.messages import Signature, TensorSpec
from edge_runtime.processing import Encoder, Processor
from edge_runtime.processing.ngrams import NgramFeaturiser
from edge_runtime.processing.tensors import Tensors
from edge_runtime.processing.text_classification import (
    SIGNATURE,
    Calibration,
    Fusion,
    TextClassification,
)
from edge_runtime.processing.text_slots import SIGNATURE as SLOTS_SIGNATURE
from edge_runtime.processing.text_slots import TextSlots
from edge_runtime.processing.words import WordFeaturiser

MAX_LABELS = 65_536
#: The label of texts that belong to no other label.
OUT_OF_SCOPE = "oos"


class TextNgrams(msgspec.Struct, frozen=True, tag_field="kind", tag="text_ngrams"):
    """Parameters of kind `text_ngrams`."""

    slots: int
    buckets: int
    grams: tuple[int, ...]
    skips: bool = False
    max_text_bytes: int = 4096


class TextWordpiece(msgspec.Struct, frozen=True, tag_field="kind", tag="text_wordpiece"):
    """Parameters of kind `text_wordpiece`; `tokenizer` names a payload."""

    tokenizer: str
    lengths: tuple[int, ...]
    pad: int = 0
    max_text_bytes: int = 4096


class WordSlots(msgspec.Struct, frozen=True, tag_field="kind", tag="text_slots"):
    """Parameters of kind `text_slots`: `slots` are the names of the values it finds, the rest is of `words`."""

    slots: tuple[str, ...]
    features: int
    buckets: int
    grams: tuple[int, ...]
    lengths: tuple[int, ...]
    max_text_bytes: int = 4096


class PlainTensors(msgspec.Struct, frozen=True, tag_field="kind", tag="tensors"):
    """Kind `tensors` has no parameters."""


Parameters = TextNgrams | TextWordpiece | WordSlots | PlainTensors
#: A version stands for one way to compute; a bundle that was made for another one would give wrong answers.
_VERSIONS = {"text_ngrams": "1", "text_wordpiece": "1", "text_slots": "1", "tensors": "1"}


def build_processor(manifest: Manifest, files: Mapping[str, bytes]) -> Processor:
    """Build the processor a verified bundle asks for.

    Raises BundleError for an unknown kind or version, parameters that do not fit it, or missing payloads.
    """
    entry = manifest.processing
    if _VERSIONS.get(entry.kind) != entry.version:
        raise BundleError(
            f"bundle {manifest.name!r} needs processing {entry.kind!r} version {entry.version!r}, which this "
            "release does not have; update the runtime or make the bundle with its tools"
        )
    try:
        parameters = msgspec.convert({**entry.parameters, "kind": entry.kind}, type=Parameters)
        return _build(parameters, manifest, files, version=f"{entry.kind}/{entry.version}")
    except (msgspec.ValidationError, ValueError, Unsupported) as error:
        raise BundleError(
            f"bundle {manifest.name!r}: processing cannot be set up ({error}); make it again"
        ) from None


def _build(
    parameters: Parameters, manifest: Manifest, files: Mapping[str, bytes], *, version: str
) -> Processor:
    featuriser: Encoder
    match parameters:
        case TextNgrams():
            featuriser = NgramFeaturiser(
                slots=parameters.slots,
                buckets=parameters.buckets,
                grams=parameters.grams,
                skips=parameters.skips,
            )
        case TextWordpiece():
            featuriser = _wordpiece(parameters, files)
        case WordSlots():
            return _slots(parameters, manifest, files, version=version)
        case PlainTensors():
            return Tensors(_signature(manifest.signature), version=version)
        case _:
            assert_never(parameters)
    if _signature(manifest.signature) != SIGNATURE:
        raise ValueError("the signature is not that of text classification")
    labels = _labels(manifest, files)
    return TextClassification(
        featuriser,
        labels,
        _calibration(manifest, labels),
        version=version,
        max_text_bytes=parameters.max_text_bytes,
        fusion=_fusion(manifest),
    )


def _slots(
    parameters: WordSlots, manifest: Manifest, files: Mapping[str, bytes], *, version: str
) -> Processor:
    if _signature(manifest.signature) != SLOTS_SIGNATURE:
        raise ValueError("the signature is not that of text slots")
    slots = parameters.slots
    if not 1 <= len(slots) <= MAX_LABELS or len(set(slots)) != len(slots):
        raise ValueError(f"the slots are not 1 to {MAX_LABELS} different names")
    featuriser = WordFeaturiser(
        features=parameters.features,
        buckets=parameters.buckets,
        grams=parameters.grams,
        lengths=parameters.lengths,
    )
    return TextSlots(
        featuriser,
        _labels(manifest, files),
        slots,
        _calibration(manifest),
        version=version,
        max_text_bytes=parameters.max_text_bytes,
    )


def _wordpiece(parameters: TextWordpiece, files: Mapping[str, bytes]) -> Encoder:
    if parameters.tokenizer not in files:
        raise ValueError(f"the tokeniser {parameters.tokenizer!r} is not among the files")
    if not parameters.lengths or not all(2 <= length <= 512 for length in parameters.lengths):
        raise ValueError("lengths must lie in 2..512")
    try:
        # Imported only here: a device does not pay for a tokeniser that its bundles do not need.
        from edge_runtime.processing.wordpiece import WordpieceFeaturiser  # noqa: PLC0415
    except ImportError:
        raise ValueError("the tokenizers package is missing: pip install 'edge-runtime[cloud]'") from None
    return WordpieceFeaturiser(files[parameters.tokenizer], lengths=parameters.lengths, pad=parameters.pad)


def _labels(manifest: Manifest, files: Mapping[str, bytes]) -> list[str]:
    if manifest.labels is None:
        raise ValueError("text classification needs labels")
    try:
        labels = msgspec.json.decode(files[manifest.labels], type=list[str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("the labels are not a JSON list of names") from None
    if not 2 <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
        raise ValueError(f"the labels are not 2 to {MAX_LABELS} different names")
    return labels


def _calibration(manifest: Manifest, labels: Sequence[str] = ()) -> Calibration:
    """As the manifest says; with "in_scope" the label `oos` must be among `labels`."""
    entry = manifest.calibration
    if entry is None:
        raise ValueError("text classification needs a calibration")
    if entry.score == "in_scope" and OUT_OF_SCOPE not in labels:
        raise ValueError(f"the score in_scope needs a label {OUT_OF_SCOPE!r}")
    out_of_scope = labels.index(OUT_OF_SCOPE) if entry.score == "in_scope" else None
    scores, chances = zip(*entry.knots, strict=True)
    return Calibration(entry.temperature, scores, chances, out_of_scope)


def _fusion(manifest: Manifest) -> Fusion | None:
    entry = manifest.calibration.fusion if manifest.calibration is not None else None
    if entry is None:
        return None
    scores, chances = zip(*entry.knots, strict=True)
    return Fusion(entry.cloud_version, Pooling(entry.edge_weight, entry.cloud_weight, scores, chances))


def _signature(entry: SignatureEntry) -> Signature:
    return Signature(
        tuple(TensorSpec(t.name, t.datatype, t.shape) for t in entry.inputs),
        tuple(TensorSpec(t.name, t.datatype, t.shape) for t in entry.outputs),
    )
