"""A model ready to serve: a verified bundle with its processor and engine, proof that its rows may share batches,
and what it costs.
"""

import logging
import os
import time
from dataclasses import dataclass

from edge_runtime.bundles.folder import Bundle, Trust, find_bundle, load_bundle
from edge_runtime.bundles.manifest import Manifest
from edge_runtime.bundles.stoppable import Stop, Stopped, run_stoppable
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.core.messages import LatencyProfile, ModelInfo
from edge_runtime.engines import Engine
from edge_runtime.loading.prepare import prepare, unfit
from edge_runtime.loading.quarantine import Quarantine
from edge_runtime.loading.sandbox_messages import Report
from edge_runtime.loading.self_test import measure_latency_profile
from edge_runtime.processing import Processor

_log = logging.getLogger(__name__)
#: How long a model is warmed up and timed here; larger batches keep the timings of the trial.
_WARM_UP_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """What a lane serves. `accept_threshold` None means that no answer is ever escalated as unsure.

    `latency_profile` is what batches cost, by rising rows; `memory_bytes` the most it took in its trial, None where it
    had none; `batch_note` why it runs single rows although its bundle allows more.
    """

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
    latency_profile: LatencyProfile
    load_ns: int
    memory_bytes: int | None = None
    batch_note: str = ""

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
            batch_note=self.batch_note,
            load_ns=self.load_ns,
            memory_bytes=self.memory_bytes,
            latency_profile=self.latency_profile,
        )


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    threads: int = 1,
    trust: Trust | None = None,
    max_batch: int | None = None,
    quarantine: Quarantine | None = None,
) -> Model:
    """Find, verify, try and load a bundle.

    `threads` is what the engine uses inside one operator; `trust` says whose signature is asked for;
    `max_batch` bounds what the bundle allows. Without `quarantine` the bundle is loaded untried: for tools
    that have just made it. Raises BundleError.
    """
    bundle = load_bundle(find_bundle(name_or_path), trust)
    report = None
    if quarantine is not None:
        report = quarantine.admit(bundle, threads=threads, max_batch=batch_limit(bundle, max_batch))
    return build_model(bundle, threads=threads, max_batch=max_batch, report=report)


async def load_model_soon(
    name_or_path: str | os.PathLike[str],
    *,
    threads: int,
    trust: Trust,
    max_batch: int,
    quarantine: Quarantine,
) -> Model:
    """As `load_model`, without blocking the event loop: verifying, unpacking, probing and building take up to seconds.

    A cancelled caller ends the work and its children; an engine that was built by then is closed.
    """

    def load(stop: Stop) -> Model:
        bundle = load_bundle(find_bundle(name_or_path), trust, stop=stop)
        limit = batch_limit(bundle, max_batch)
        report = quarantine.admit(bundle, threads=threads, max_batch=limit, stop=stop)
        stop.check()
        model = build_model(bundle, threads=threads, max_batch=max_batch, report=report)
        try:
            stop.check()
        except Stopped:  # nobody takes the model
            model.engine.close()
            raise
        return model

    return await run_stoppable(load, "load-model")


def load_engine(
    name_or_path: str | os.PathLike[str], digest: str, *, threads: int, trust: Trust, max_batch: int
) -> Engine:
    """Another engine for a model that is loaded: in place of one that hung, or beside it. Raises BundleError."""
    bundle = load_bundle(find_bundle(name_or_path), trust)
    if bundle.digest != digest:
        raise BundleError(
            f"The bundle {name_or_path} was exchanged meanwhile; start again to use the new one."
        )
    prepared = prepare(
        bundle.manifest, bundle.files, threads=threads, max_batch=batch_limit(bundle, max_batch)
    )
    return prepared.engine


def batch_limit(bundle: Bundle, max_batch: int | None) -> int:
    """The most rows of a batch that both the bundle and the device allow."""
    return min(bundle.manifest.batch.max, max_batch or bundle.manifest.batch.max)


def build_model(
    bundle: Bundle, *, threads: int = 1, max_batch: int | None = None, report: Report | None = None
) -> Model:
    """Load a verified bundle into this process and warm it up; `report` is of its trial. Raises BundleError."""
    manifest = bundle.manifest
    started_ns = time.perf_counter_ns()
    prepared = prepare(manifest, bundle.files, threads=threads, max_batch=batch_limit(bundle, max_batch))
    load_ns = time.perf_counter_ns() - started_ns
    engine = prepared.engine
    try:
        latency_profile = measure_latency_profile(prepared, _WARM_UP_NS)
    except EngineFailed as error:
        engine.close()
        raise unfit(manifest, error) from None
    if report is not None:
        latency_profile += tuple(
            step for step in report.latency_profile if latency_profile[-1][0] < step[0] <= engine.max_batch
        )
    calibration = manifest.calibration
    model = Model(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        task=manifest.task,
        platform=f"{engine.name}_{manifest.engine}",
        processor=prepared.processor,
        engine=engine,
        max_batch=engine.max_batch,
        is_batch_invariant=engine.is_batch_invariant,
        accept_threshold=None if calibration is None else calibration.accept_threshold,
        manifest=manifest,
        stored_bytes=bundle.stored_bytes,
        signed_by=bundle.signed_by,
        latency_profile=latency_profile,
        load_ns=load_ns,
        memory_bytes=None if report is None else report.memory_bytes,
        batch_note=prepared.batch_note,
    )
    _tell(model)
    return model


def cost_of(info: ModelInfo) -> dict[str, object]:
    """What a loaded model costs and how it may be batched, as JSON values for people and status."""
    return {
        "max_batch": info.max_batch,
        "batch_invariant": info.is_batch_invariant,
        "batch_note": info.batch_note,
        "memory_mb": None if info.memory_bytes is None else round(info.memory_bytes / 1e6, 1),
        "load_ms": round(info.load_ns / 1e6, 1),
        "batch_latency_us": [[rows, round(ns / 1e3, 1)] for rows, ns in info.latency_profile],
    }


def _tell(model: Model) -> None:
    memory = "unknown" if model.memory_bytes is None else f"{model.memory_bytes / 1e6:.1f}"
    _log.info(
        "event=model_loaded model=%s version=%s digest=%.12s load_ms=%.1f memory_mb=%s max_batch=%d row_us=%.0f",
        model.name, model.version, model.digest, model.load_ns / 1e6, memory, model.max_batch,
        model.latency_profile[0][1] / 1e3,
    )  # fmt: skip
    if model.batch_note:
        _log.warning("event=batches_denied model=%s why=%r", model.name, model.batch_note)
