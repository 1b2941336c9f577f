"""A model ready to serve: a verified bundle with its processor and engine, and proof that its rows may share batches."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.bundle import Trust, find_bundle, load_bundle
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import DTYPES, ModelInfo, Row, Tensor
from edge_runtime.engines import Engine
from edge_runtime.engines.build import build_engine
from edge_runtime.manifest import Manifest
from edge_runtime.processing import Processor
from edge_runtime.processing.build import build_processor
from edge_runtime.processing.text_classification import TextClassification

#: Other kernels for other batch sizes round differently, near 1e-7 of a value; scales shared by a batch
#: show at 1e-2. Anything between is not expected, and counts as dependence.
_TOLERANCE = 1e-5
_PROBE_TEXTS = (
    "turn the lights off",
    "what is the weather like in berlin tomorrow morning, and do i need an umbrella",
    "",
    "zzzz " * 200,
    "\U0001f600 \u00e4\u00f6\u00fc \u6771\u4eac",
)


@dataclass(frozen=True, slots=True)
class Model:
    """What a lane serves. `accept_threshold` None means that no answer is ever escalated as unsure."""

    name: str
    version: str
    digest: str
    task: str
    platform: str
    processor: Processor
    engine: Engine
    max_batch: int
    is_batch_invariant: bool
    accept_threshold: float | None
    manifest: Manifest
    stored_bytes: int
    signed_by: str | None

    @property
    def info(self) -> ModelInfo:
        """What clients may know of it."""
        return ModelInfo(
            name=self.name,
            version=self.version,
            platform=self.platform,
            signature=self.processor.signature,
            max_batch=self.max_batch,
            is_batch_invariant=self.is_batch_invariant,
            digest=self.digest,
            accept_threshold=self.accept_threshold,
        )


def load_model(
    name_or_path: str | os.PathLike[str], *, threads: int = 1, trust: Trust | None = None
) -> Model:
    """Find, verify and load a bundle, and test whether its rows depend on their neighbours.

    `threads` is what the engine uses inside one operator; `trust` says whose signature is asked for.
    Raises BundleError.
    """
    bundle = load_bundle(find_bundle(name_or_path), trust)
    manifest = bundle.manifest
    processor = build_processor(manifest, bundle.files)
    probes = _probes(processor)
    engine = build_engine(
        manifest.engine,
        bundle.files[manifest.model],
        max_batch=manifest.batch.max,
        threads=threads,
        is_batch_invariant=manifest.batch.invariant,
        are_rows_alike=_are_alike(processor, probes),
    )
    try:
        (output,) = engine.run(probes[:1])
        _check_output(processor, output)
        if engine.max_batch > 1 and not rows_are_independent(engine, probes):
            engine.deny_batches()
    except EngineFailed as error:
        raise BundleError(f"bundle {manifest.name!r} does not fit its model: {error}") from None
    calibration = manifest.calibration
    return Model(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        task=manifest.task,
        platform=f"{engine.name}_{manifest.engine}",
        processor=processor,
        engine=engine,
        max_batch=engine.max_batch,
        is_batch_invariant=engine.is_batch_invariant,
        accept_threshold=None if calibration is None else calibration.accept_threshold,
        manifest=manifest,
        stored_bytes=bundle.stored_bytes,
        signed_by=bundle.signed_by,
    )


def sample_row(processor: Processor) -> Row:
    """One plausible row, to warm up and to time an engine with."""
    return _probes(processor)[0]


def labels_of(processor: Processor) -> frozenset[bytes] | None:
    """The labels a task can answer with; None where it has none."""
    return frozenset(processor.labels) if isinstance(processor, TextClassification) else None


def rows_are_independent(engine: Engine, probes: list[Row]) -> bool:
    """Whether each probe gets the same answer alone as among the others, to 1e-5 of its largest value.

    Rows of other shapes than the first are left out, since they never share its batch. Source: the
    batch-safety gate for per-tensor dynamic quantisation, whose scale follows the largest neighbour.
    """
    shapes = [array.shape for array in probes[0]]
    alike = [row for row in probes if [array.shape for array in row] == shapes][: engine.max_batch]
    together = engine.run(alike)
    for row, among in zip(alike, together, strict=True):
        (alone,) = engine.run([row])
        for one, other in zip(alone, among, strict=True):
            limit = _TOLERANCE * max(1.0, float(np.abs(one).max(initial=0.0)))
            if not np.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True):
                return False
    return True


def _are_alike(processor: Processor, probes: list[Row]) -> bool:
    """Whether all rows have the same shapes, as far as the signature and the probes tell."""
    has_open_length = any(length < 0 for spec in processor.signature.inputs for length in spec.shape[1:])
    return not has_open_length and len({tuple(array.shape for array in row) for row in probes}) == 1


def _check_output(processor: Processor, output: Row) -> None:
    """Refuse a model whose outputs are not what the processor reads or the signature promises."""
    wanted: list[tuple[np.dtype[Any], tuple[int, ...]]]
    if isinstance(processor, TextClassification):
        wanted = [(np.dtype(np.float32), (len(processor.labels),))]
    else:
        specs = processor.signature.outputs
        wanted = [(DTYPES[spec.datatype], spec.shape[1:]) for spec in specs]
    fits = len(wanted) == len(output) and all(
        array.dtype == dtype
        and len(array.shape) == len(shape)
        and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=True))
        for array, (dtype, shape) in zip(output, wanted, strict=True)
    )
    if not fits:
        got = ", ".join(f"{array.dtype} {list(array.shape)}" for array in output)
        raise EngineFailed(f"it returns {got} per row, which is not what the labels or the signature ask for")


def _probes(processor: Processor) -> list[Row]:
    """Rows as different as they can be: for texts long and odd ones, for numbers small and ever larger ones."""
    specs = processor.signature.inputs
    if specs[0].datatype == "BYTES":
        return [processor.encode(text.encode()[:1000]) for text in _PROBE_TEXTS]
    rng = np.random.default_rng(0)
    inputs = []
    for spec in specs:
        # Open lengths are tried as 4; whole numbers stay at 0 and 1, which any table of a model has.
        shape = (3, *(4 if length < 0 else length for length in spec.shape[1:]))
        if spec.datatype.startswith("FP"):
            data = rng.standard_normal(shape) * np.array([1.0, 50.0, 0.02]).reshape(
                3, *[1] * (len(shape) - 1)
            )
        else:
            data = rng.integers(0, 2, shape)
        array = data.astype(DTYPES[spec.datatype])
        inputs.append(Tensor(spec.name, spec.datatype, array.shape, array))
    return [processor.encode(row) for row in processor.split(inputs)]
