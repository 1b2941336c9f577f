"""What a model shows when it runs: whether rows may share a batch, and what batches cost.

The self-test runs rows of its own, the probes: in the sandbox before a model is let into the daemon, and in the daemon at
each load. It knows a processor and an engine, and nothing of bundles.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import DTYPES, LatencyProfile, Row, Shapes, Tensor
from edge_runtime.engines import Engine, run_rows
from edge_runtime.processing import PreparedRow, Processor, Question, encode_rows

#: Kernels for other batch sizes round differently, near 1e-7 of a value; scales that are shared by a batch show at
#: 1e-2. A difference in between is not expected, and counts as dependence.
_TOLERANCE = 1e-5
#: A prepared size is timed up to nine times, but for no longer than this; and at least three times where that takes
#: little, because another process may interrupt one run for ten times as long as it takes.
_STEP_NS = 5_000_000
_LEAST_RUNS = 3
_LEAST_RUNS_NS = 50_000_000
#: The first ones are typical of what people say, and are what batches are timed with.
_TYPICAL = 2
_PROBE_TEXTS = (
    "turn the lights off",
    "what is the weather like in berlin tomorrow morning, and do i need an umbrella",
    "",
    "zzzz " * 200,
    "\U0001f600 \u00e4\u00f6\u00fc \u6771\u4eac",
)


class Probe(NamedTuple):
    """A row to try a model with: as the scheduler gets it, and as the model's input arrays without the batch axis."""

    prepared: PreparedRow
    row: Row


@dataclass(frozen=True, slots=True)
class Prepared:
    """A processor, the engine that fits it, rows to try them with, and why batches have one row ("": they need not)."""

    processor: Processor
    engine: Engine
    probes: list[Probe]
    batch_note: str = ""


def make_probes(processor: Processor) -> list[Probe]:
    """Rows as different as they can be: for texts long and odd ones, for numbers small and ever larger ones."""
    questions = _questions(processor)
    rows = encode_rows(processor, questions)
    return [Probe(processor.prepare(question), row) for question, row in zip(questions, rows, strict=True)]


def are_alike(processor: Processor, probes: Sequence[Probe]) -> bool:
    """Whether all rows have the same shapes, as far as the signature and the probes tell."""
    has_open_length = any(length < 0 for spec in processor.signature.inputs for length in spec.shape[1:])
    return not has_open_length and len({probe.prepared.shapes for probe in probes}) == 1


def check_output(processor: Processor, output: Row) -> None:
    """Refuse a model whose outputs are not what the processor reads or the signature promises. Raises EngineFailed."""
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


def difference_in_company(engine: Engine, rows: Sequence[Row]) -> float:
    """By how much an answer differs at most alone and among the other rows, relative to its largest value.

    Rows of other shapes than the first are left out, since they never share its batch; 0 where all agree to
    1e-5. Source: the batch-safety gate for per-tensor dynamic quantisation, whose scale follows the largest
    neighbour.
    """
    alike = [row for row in rows if _shapes(row) == _shapes(rows[0])][: engine.max_batch]
    worst = 0.0
    for row, among in zip(alike, run_rows(engine, alike), strict=True):
        (alone,) = run_rows(engine, [row])
        for one, other in zip(alone, among, strict=True):
            worst = max(worst, _difference(one, other))
    return worst if worst > _TOLERANCE else 0.0


def measure_latency_profile(prepared: Prepared, budget_ns: int | None = None) -> LatencyProfile:
    """Run 1, 2, 4, ... rows up to the largest batch, which warms each size up, and time each: (rows, median ns).

    The time is that of the whole batch as the daemon runs it, which is what the scheduler learns from batches too: rows
    are encoded, run and decoded. A size that the budget has no room for, judged by the one before it, is left out with
    those above it. Raises EngineFailed.
    """
    started_ns = time.perf_counter_ns()
    shapes = prepared.probes[0].prepared.shapes
    typical = [probe.prepared for probe in prepared.probes[:_TYPICAL] if probe.prepared.shapes == shapes]
    latency_profile: list[tuple[int, int]] = []
    for count in _sizes(prepared.engine.max_batch):
        spent_ns = time.perf_counter_ns() - started_ns
        # A size costs its first run, which binds buffers, and one to time it: of up to twice as many rows.
        if budget_ns is not None and latency_profile and spent_ns + 4 * latency_profile[-1][1] > budget_ns:
            break
        batch = list(islice(cycle(typical), count))
        latency_profile.append((count, _median_ns(prepared, batch)))
    return tuple(latency_profile)


def run_every_shape(prepared: Prepared) -> None:
    """Run the largest batch of each further shape that probes have: the most memory and time a call may cost."""
    engine = prepared.engine
    by_shape: dict[Shapes, list[Row]] = {}
    for probe in prepared.probes:
        by_shape.setdefault(probe.prepared.shapes, []).append(probe.row)
    for rows in list(by_shape.values())[1:]:  # the first shape was run by `measure_latency_profile`
        run_rows(engine, list(islice(cycle(rows), engine.max_batch)))


def _difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    if np.allclose(one, other, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True):
        return 0.0
    apart = float(np.abs(one.astype(np.float64) - other).max(initial=0.0)) / scale
    return apart if apart > _TOLERANCE else float("inf")  # not a number on one side only


def _sizes(max_batch: int) -> list[int]:
    return [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]


def _median_ns(prepared: Prepared, batch: Sequence[PreparedRow]) -> int:
    _run(prepared, batch)  # binds buffers
    times: list[int] = []
    while len(times) < 9 and sum(times) < (_LEAST_RUNS_NS if len(times) < _LEAST_RUNS else _STEP_NS):
        started_ns = time.perf_counter_ns()
        _run(prepared, batch)
        times.append(time.perf_counter_ns() - started_ns)
    return sorted(times)[len(times) // 2]


def _run(prepared: Prepared, batch: Sequence[PreparedRow]) -> None:
    """Run a batch as `serving.batch_run` does, without its care for single rows."""
    engine, processor = prepared.engine, prepared.processor
    data = [row.data for row in batch]
    bound = engine.bind(batch[0].shapes, len(batch))
    processor.encode_batch(data, bound.inputs)
    outputs = engine.run(bound)
    try:
        processor.decode_batch(outputs, data)
    except Exception as error:
        raise EngineFailed(f"its output cannot be read ({type(error).__name__}: {error})") from error


def _shapes(row: Row) -> Shapes:
    return tuple(array.shape for array in row)


def _questions(processor: Processor) -> list[Question]:
    specs = processor.signature.inputs
    if specs[0].datatype == "BYTES":
        return [text.encode()[:1000] for text in _PROBE_TEXTS]
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
    return processor.split(inputs)
