"""`manifest.json` of a bundle as types, and the checks that types cannot express.

It is parsed only after its signature was verified; this module opens no file.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from edge_runtime.core.errors import BundleError
from edge_runtime.core.protocol.ids import is_id

FORMAT = "edge-runtime-bundle/1"
MANIFEST = "manifest.json"
MAX_FILES = 64
MAX_PLAIN_BYTES = 256 * 1024 * 1024
MAX_KNOTS = 32
MAX_BINS = 32
MAX_BATCH = 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: A bundle holds data, not programs: the name of each file ends in one of these.
_SUFFIXES = (".onnx", ".tflite", ".json", ".txt", ".bin")


class TensorEntry(msgspec.Struct, frozen=True):
    """A named input or output as clients see it; the leading -1 of `shape` is the batch axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class SignatureEntry(msgspec.Struct, frozen=True):
    """Inputs and outputs of the task."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


class FileEntry(msgspec.Struct, frozen=True):
    """One payload, stored as `<name>.zst`. Sizes in bytes, digests in lower-case hex."""

    name: str
    size: int
    sha256: str
    stored_size: int
    stored_sha256: str
    compression: Literal["zstd"]


class ProcessingEntry(msgspec.Struct, frozen=True):
    """Which step of the closed list in `processing` turns inputs into tensors and outputs into answers."""

    kind: str
    version: str
    parameters: dict[str, Any] = {}


class BatchEntry(msgspec.Struct, frozen=True):
    """The batches that the maker of the bundle claims to be safe; the loader tests the claim."""

    max: int
    invariant: bool


class CertificateEntry(msgspec.Struct, frozen=True):
    """With confidence 1 - `delta`, at most `error` of the answers kept at or above `threshold` are wrong.

    `threshold` is a probability of being right, or None: not certifiable, and `missing_rows` says how many
    more rows could change that. `kept` of the `rows` lie above it, `wrong` of them are wrong.
    """

    error: float
    delta: float
    threshold: float | None
    rows: int
    kept: int = 0
    wrong: int = 0
    missing_rows: int = 0


class FusionEntry(msgspec.Struct, frozen=True):
    """How the scores of both tiers are fused: the sum of weighted log-probabilities, then the largest softmax
    value through `knots` (score, probability of being right).

    Fitted for one version of the cloud's model; replies of any other version are used without fusion.
    """

    cloud_version: str
    cloud_weight: float
    edge_weight: float
    knots: tuple[tuple[float, float], ...]


class CalibrationEntry(msgspec.Struct, frozen=True):
    """Logits -> temperature -> score -> knots (score, probability of being right).

    The score is the largest softmax value; "in_scope" multiplies it by 1 minus the softmax value of the label "oos".
    `bins` are counts (largest score, right, wrong), the prior of online learning. `data_sha256` is over the
    calibration rows, `date` is ISO 8601.
    """

    temperature: float
    knots: tuple[tuple[float, float], ...]
    score: Literal["max_softmax", "in_scope"] = "max_softmax"
    accept_threshold: float | None = None
    fitted_on: str = ""
    rows: int = 0
    date: str = ""
    data_sha256: str = ""
    bins: tuple[tuple[float, int, int], ...] = ()
    certificates: tuple[CertificateEntry, ...] = ()
    fusion: FusionEntry | None = None


class CreditEntry(msgspec.Struct, frozen=True):
    """Data or weights the model was made from."""

    name: str
    authors: str
    licence: str
    url: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """All of `manifest.json`. Unknown fields are ignored, an unknown `format` is refused."""

    format: str
    name: str
    version: str
    task: str
    signature: SignatureEntry
    engine: str
    model: str  # the payload the engine loads
    files: tuple[FileEntry, ...]
    processing: ProcessingEntry
    batch: BatchEntry
    licence: str
    labels: str | None = None  # the payload with a JSON list of label names
    trained_rows: str | None = None  # the payload that knows training rows again, see tools.calibrate
    calibration: CalibrationEntry | None = None
    credits: tuple[CreditEntry, ...] = ()
    metrics: dict[str, float | str] = {}


def is_payload(name: str) -> bool:
    """Whether a manifest may list a file of this name."""
    return is_id(name) and name.endswith(_SUFFIXES)


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Read and check a manifest whose signature held. Raises BundleError; `where` names the bundle in it."""
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format")
        if version is None or msgspec.json.decode(version) != FORMAT:
            raise BundleError(
                f"{where}: {MANIFEST} is not of format {FORMAT!r}; make it with this version's tools"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BundleError(
            f"{where}: {MANIFEST} cannot be read ({reason}); copy or make the bundle again"
        ) from None
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """Refuse what types cannot express, before any payload is opened."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise BundleError(f"{where}: {MANIFEST}: {what}; make the bundle again")

    require(is_id(manifest.name), "the name is not an id")
    digits = manifest.version
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= 18 and str(int(digits)) == digits
    require(is_number, "the version is not a whole number")
    require(0 < len(manifest.files) <= MAX_FILES, f"there are not 1 to {MAX_FILES} files")
    names = [entry.name for entry in manifest.files]
    require(len(set(names)) == len(names), "a file is listed twice")
    for entry in manifest.files:
        require(is_id(entry.name), "a file name is not an id")
        require(entry.name.endswith(_SUFFIXES), f"a file does not end in one of {', '.join(_SUFFIXES)}")
        require(0 < entry.size <= MAX_PLAIN_BYTES, "a file size is out of range")
        require(0 < entry.stored_size <= MAX_PLAIN_BYTES, "a stored size is out of range")
        for digest in (entry.sha256, entry.stored_sha256):
            require(_SHA256.fullmatch(digest) is not None, "a digest is not 64 hex digits")
    require(
        sum(entry.size for entry in manifest.files) <= MAX_PLAIN_BYTES, "the files are too large together"
    )
    require(manifest.model in names, "the model is not among the files")
    require(manifest.labels is None or manifest.labels in names, "the labels are not among the files")
    trained = manifest.trained_rows
    require(trained is None or trained in names, "the trained rows are not among the files")
    require(1 <= manifest.batch.max <= MAX_BATCH, f"batch.max is not in 1..{MAX_BATCH}")
    require(bool(manifest.signature.inputs and manifest.signature.outputs), "the signature is empty")
    tensors = (*manifest.signature.inputs, *manifest.signature.outputs)
    require(all(tensor.shape[:1] == (-1,) for tensor in tensors), "a shape does not begin with -1")
    if manifest.calibration is not None:
        _check_calibration(manifest.calibration, require)


def _check_calibration(calibration: CalibrationEntry, require: Callable[[bool, str], None]) -> None:
    require(0.01 <= calibration.temperature <= 100.0, "calibration.temperature is not in 0.01..100")
    _check_knots(calibration.knots, "calibration.knots", require)
    threshold = calibration.accept_threshold
    require(threshold is None or 0.0 <= threshold <= 1.0, "calibration.accept_threshold is not in 0..1")
    require(len(calibration.bins) <= MAX_BINS, f"there are more than {MAX_BINS} calibration.bins")
    require(
        all(min(right, wrong) >= 0 for _, right, wrong in calibration.bins), "calibration.bins count below 0"
    )
    for certificate in calibration.certificates:
        chosen = certificate.threshold
        require(
            chosen is None or 0.0 <= chosen <= 1.0, "a threshold of calibration.certificates is not in 0..1"
        )
    if calibration.fusion is not None:
        fusion = calibration.fusion
        weights = (fusion.cloud_weight, fusion.edge_weight)
        require(
            all(0.0 <= weight <= 100.0 for weight in weights),
            "a weight of calibration.fusion is not in 0..100",
        )
        _check_knots(fusion.knots, "calibration.fusion.knots", require)


def _check_knots(
    knots: tuple[tuple[float, float], ...], what: str, require: Callable[[bool, str], None]
) -> None:
    scores = [score for score, _ in knots]
    chances = [chance for _, chance in knots]
    require(2 <= len(scores) <= MAX_KNOTS, f"there are not 2 to {MAX_KNOTS} {what}")
    require(scores == sorted(set(scores)), f"the scores of {what} do not rise")
    require(chances == sorted(chances), f"the probabilities of {what} fall")
    require(min(scores) >= 0.0 and max(scores) <= 1.0, f"a score of {what} is not in 0..1")
    require(chances[0] >= 0.0 and chances[-1] <= 1.0, f"a probability of {what} is not in 0..1")
