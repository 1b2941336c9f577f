"""From verified bytes to a processor and an engine that fit each other: what the sandbox and the daemon both do.

Nothing here knows of bundles on disk, of trust or of processes.
"""

from collections.abc import Mapping, Sequence

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.engines import Engine, run_rows
from edge_runtime.engines.build import build_engine
from edge_runtime.loading.self_test import (
    Prepared,
    Probe,
    are_alike,
    check_output,
    difference_in_company,
    make_probes,
)
from edge_runtime.processing.build import build_processor


def prepare(
    manifest: Manifest, files: Mapping[str, bytes], *, threads: int = 1, max_batch: int | None = None
) -> Prepared:
    """Build processor and engine, and test whether rows depend on their neighbours.

    `threads` is what the engine uses inside one operator; `max_batch` bounds what the bundle allows. Raises
    BundleError.
    """
    processor = build_processor(manifest, files)
    probes = make_probes(processor)
    engine = build_engine(
        manifest.engine,
        files[manifest.model],
        max_batch=min(manifest.batch.max, max_batch or manifest.batch.max),
        threads=threads,
        is_batch_invariant=manifest.batch.invariant,
        are_rows_alike=are_alike(processor, probes),
    )
    try:
        (output,) = run_rows(engine, [probes[0].row])
        check_output(processor, output)
        note = _deny_unsafe_batches(manifest, engine, probes)
    except EngineFailed as error:
        engine.close()
        raise unfit(manifest, error) from None
    except BaseException:
        engine.close()
        raise
    return Prepared(processor, engine, probes, note)


def unfit(manifest: Manifest, error: EngineFailed) -> BundleError:
    """The error of a model that fails on rows that its own manifest asks for."""
    return BundleError(f"bundle {manifest.name!r} does not fit its model: {error}")


def _deny_unsafe_batches(manifest: Manifest, engine: Engine, probes: Sequence[Probe]) -> str:
    """Say why the engine must run single rows, "" if nothing was found; deny batches where only the test showed it."""
    if engine.batch_unsafe:
        return f"{', '.join(sorted(engine.batch_unsafe))} computes over all rows of a batch"
    if not manifest.batch.invariant:
        return "its maker says that rows depend on their neighbours"
    if engine.max_batch == 1:
        return ""
    difference = difference_in_company(engine, [probe.row for probe in probes])
    if not difference:
        return ""
    engine.deny_batches()
    return f"neighbours changed an answer by {difference:.2g} of its largest value in the self-test"
