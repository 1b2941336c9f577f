"""How a model starts to serve, for both tiers: load it, admit its version, make its engines, run it."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from edge_runtime.bundles.folder import Trust
from edge_runtime.bundles.trust import VersionFloors, read_trust
from edge_runtime.core.errors import ConfigError
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.engines import Engine
from edge_runtime.loading.model import Model, load_engine, load_model_soon
from edge_runtime.loading.quarantine import Quarantine, quarantine_path
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.storage.files import record_path


@dataclass(frozen=True, slots=True)
class Admission:
    """What a bundle must pass before it serves: its signature, its first load in the sandbox, its version."""

    trust: Trust
    quarantine: Quarantine
    versions: VersionFloors


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """How each model of a process runs.

    `threads` are those inside one operator of an engine; `instances` the engines of a model; `depth` the batches that
    each engine is handed at a time. A model whose batch of one takes `inline_limit_ns` at most runs on the event loop.
    """

    threads: int
    limits: QueueLimits
    policy: Policy
    instances: int = 1
    depth: int = 1
    inline_limit_ns: int = 0


@dataclass(frozen=True, slots=True)
class StartedModel:
    """A loaded model and what runs it."""

    model: Model
    runner: ModelRunner


def read_admission(
    program: str,
    *,
    keys: Sequence[str],
    unsigned: bool,
    record: str,
    memory_mb: int | None,
    retry_command: str,
    again: bool = False,
) -> Admission:
    """Read keys and records for `program`, whose name is that of its state directory.

    `keys`, `unsigned` and `record` are those of [trust], `memory_mb` that of [limits]. `retry_command` is what the
    refusal of a model that failed its first load names; `again` forgets such failures. Raises ConfigError.
    """
    path = record_path(record, program)
    return Admission(
        read_trust(keys, allow_unsigned=unsigned),
        Quarantine(
            quarantine_path(path), memory_mb=memory_mb, release_command=retry_command, ignores_file=again
        ),
        VersionFloors(path),
    )


async def start_models(
    names: Sequence[str], settings: RunnerSettings, admission: Admission, stack: AsyncExitStack
) -> dict[str, StartedModel]:
    """Start each model, by its name; `stack` closes them. Raises ConfigError and BundleError."""
    started: dict[str, StartedModel] = {}
    for name in names:
        one = await start_model(name, settings, admission)
        stack.push_async_callback(one.runner.close)
        if one.model.name in started:
            raise ConfigError(f"models: {one.model.name} is listed twice; remove one of them.")
        started[one.model.name] = one
    return started


async def start_model(name_or_path: str, settings: RunnerSettings, admission: Admission) -> StartedModel:
    """Start one model; the caller closes its runner. Raises BundleError."""
    max_batch = settings.limits.max_batch
    model = await load_model_soon(
        name_or_path,
        threads=settings.threads,
        trust=admission.trust,
        max_batch=max_batch,
        quarantine=admission.quarantine,
    )
    restart = partial(
        load_engine,
        name_or_path,
        model.digest,
        threads=settings.threads,
        trust=admission.trust,
        max_batch=max_batch,
    )
    engines: list[Engine] = [model.engine]
    try:
        # After the load: a version that cannot be loaded must not bar the way back to the one before.
        admission.versions.admit(
            model.name, model.manifest.engine, model.version, model.digest, model.signed_by
        )
        while len(engines) < settings.instances:
            engines.append(restart())
        runner = ModelRunner(
            model.name,
            model.processor,
            engines,
            settings.limits,
            settings.policy,
            latency_profile=model.latency_profile,
            depth=settings.depth,
            is_inline=model.latency_profile[0][1] <= settings.inline_limit_ns,
            load_engine=restart,
        )
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return StartedModel(model, runner)
