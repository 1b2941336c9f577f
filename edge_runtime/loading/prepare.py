"""From verified bytes to a processor and an engine that is proven fit: what the trial's child and the daemon both do.

Nothing here knows of bundles on disk, of trust or of processes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import DTYPES, LatencyProfile, Row, Tensor
from edge_runtime.engines import Engine, run_rows
from edge_runtime.engines.build import build_engine
from edge_runtime.processing import Processor, encode_rows
from edge_runtime.processing.build import build_processor

#: Other kernels for other batch sizes round differently, near 1e-7 of a value; scales shared by a batch
#: show at 1e-2. Anything between is not expected, and counts as dependence.
_TOLERANCE = 1e-5
#: A prepared size is timed up to nine times, but for no longer than this.
_STEP_NS = 5_000_000
_PROBE_TEXTS = (
    "turn the lights off",
    "what is the weather like in berlin tomorrow morning, and do i need an umbrella",
    "",
    "zzzz " * 200,
    "\U0001f600 \u00e4\u00f6\u00fc \u6771\u4eac",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A processor, the engine that fits it, rows to try it with, and why it takes single rows ("": it need not)."""

    processor: Processor
    engine: Engine
    probes: list[Row]
    batch_note: str


def prepare(
    manifest: Manifest, files: Mapping[str, bytes], *, threads: int = 1, max_batch: int | None = None
) -> Prepared:
    """Build processor and engine, and test whether rows depend on their neighbours.

    `threads` is what the engine uses inside one operator; `max_batch` bounds what the bundle allows. Raises
    BundleError.
    """
    processor = build_processor(manifest, files)
    probes = _probes(processor)
    engine = build_engine(
        manifest.engine,
        files[manifest.model],
        max_batch=min(manifest.batch.max, max_batch or manifest.batch.max),
        threads=threads,
        is_batch_invariant=manifest.batch.invariant,
        are_rows_alike=_are_alike(processor, probes),
    )
    try:
        (output,) = run_rows(engine, probes[:1])
        _check_output(processor, output)
        note = _batch_note(manifest, engine, probes)
    except EngineFailed as error:
        engine.close()
        raise unfit(manifest, error) from None
    return Prepared(processor, engine, probes, note)


def unfit(manifest: Manifest, error: EngineFailed) -> BundleError:
    """The sentence for a model that fails on rows its own manifest asks for."""
    return BundleError(f"bundle {manifest.name!r} does not fit its model: {error}")


def measure_latency_profile(prepared: Prepared, budget_ns: int | None = None) -> LatencyProfile:
    """Run 1, 2, 4, ... rows up to the largest batch, which warms each step up, and time each: (rows, median ns).

    A step that the budget has no room for, judged by the one before it, is left out with those above it.
    Raises EngineFailed.
    """
    engine = prepared.engine
    alike = _of_first_shape(prepared.probes)
    started_ns = time.perf_counter_ns()
    latency_profile: list[tuple[int, int]] = []
    for count in _steps(engine.max_batch):
        spent_ns = time.perf_counter_ns() - started_ns
        # A step costs its first run, which binds buffers, and one to time it: of up to twice as many rows.
        if budget_ns is not None and latency_profile and spent_ns + 4 * latency_profile[-1][1] > budget_ns:
            break
        batch = list(islice(cycle(alike), count))
        run_rows(engine, batch)
        latency_profile.append((count, _median_ns(engine, batch)))
    return tuple(latency_profile)


def run_every_shape(prepared: Prepared) -> None:
    """Run the largest batch of each further shape the probes have: the most memory and time a call may cost."""
    engine = prepared.engine
    by_shape: dict[tuple[tuple[int, ...], ...], list[Row]] = {}
    for row in prepared.probes:
        by_shape.setdefault(_shapes(row), []).append(row)
    for rows in list(by_shape.values())[1:]:  # the first shape was run by `measure_latency_profile`
        run_rows(engine, list(islice(cycle(rows), engine.max_batch)))


def difference_in_company(engine: Engine, probes: Sequence[Row]) -> float:
    """By how much an answer differs at most alone and among the other probes, relative to its largest value.

    Rows of other shapes than the first are left out, since they never share its batch; 0 where all agree to
    1e-5. Source: the batch-safety gate for per-tensor dynamic quantisation, whose scale follows the largest
    neighbour.
    """
    alike = _of_first_shape(probes)[: engine.max_batch]
    worst = 0.0
    for row, among in zip(alike, run_rows(engine, alike), strict=True):
        (alone,) = run_rows(engine, [row])
        for one, other in zip(alone, among, strict=True):
            worst = max(worst, _difference(one, other))
    return worst if worst > _TOLERANCE else 0.0


def _difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    if np.allclose(one, other, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True):
        return 0.0
    apart = float(np.abs(one.astype(np.float64) - other).max(initial=0.0)) / scale
    return apart if apart > _TOLERANCE else float("inf")  # not a number on one side only


def _batch_note(manifest: Manifest, engine: Engine, probes: Sequence[Row]) -> str:
    """Why the engine must run single rows; "" if nothing was found. Tells it so where only the test could know."""
    if engine.batch_unsafe:
        return f"{', '.join(sorted(engine.batch_unsafe))} computes over all rows of a batch"
    if not manifest.batch.invariant:
        return "its maker says that rows depend on their neighbours"
    if engine.max_batch == 1:
        return ""
    difference = difference_in_company(engine, probes)
    if not difference:
        return ""
    engine.deny_batches()
    return f"neighbours changed an answer by {difference:.2g} of its largest value in the self-test"


def _steps(max_batch: int) -> list[int]:
    return [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]


def _median_ns(engine: Engine, batch: Sequence[Row]) -> int:
    buffers = engine.bind(_shapes(batch[0]), len(batch))  # filled by the run before
    times: list[int] = []
    while len(times) < 9 and sum(times) < _STEP_NS:
        started_ns = time.perf_counter_ns()
        engine.run(buffers)
        times.append(time.perf_counter_ns() - started_ns)
    return sorted(times)[len(times) // 2]


def _shapes(row: Row) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in row)


def _of_first_shape(probes: Sequence[Row]) -> list[Row]:
    return [row for row in probes if _shapes(row) == _shapes(probes[0])]


def _are_alike(processor: Processor, probes: Sequence[Row]) -> bool:
    """Whether all rows have the same shapes, as far as the signature and the probes tell."""
    has_open_length = any(length < 0 for spec in processor.signature.inputs for length in spec.shape[1:])
    return not has_open_length and len({_shapes(row) for row in probes}) == 1


def _check_output(processor: Processor, output: Row) -> None:
    """Refuse a model whose outputs are not what the processor reads or the signature promises."""
    wanted = [(DTYPES[spec.datatype], spec.shape[1:]) for spec in processor.model_outputs]
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
        return encode_rows(processor, [text.encode()[:1000] for text in _PROBE_TEXTS])
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
    return encode_rows(processor, processor.split(inputs))
