"""Builds the service from a configuration, without any network listener: the runtime inside a program."""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import __version__
from edge_runtime.bundles.trust import VersionRecord, read_trust, record_path, state_path, trials_path
from edge_runtime.config import Config, device_id, load_config
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.errors import ConfigError
from edge_runtime.core.messages import InferReply, InferRequest, ModelInfo, Reason
from edge_runtime.core.outcome import Outcome
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.core.scheduling.windows import policy_of
from edge_runtime.engines import Engine
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.model import Model, cost_of, load_engine, load_model_soon
from edge_runtime.loading.trial_record import FirstLoads
from edge_runtime.serving.model_runner import INLINE_LIMIT_NS, ModelRunner
from edge_runtime.serving.service import ServedModel, Service

if TYPE_CHECKING:
    from edge_runtime.caching.answer_store import AnswerStore
    from edge_runtime.uplink.uplink import Uplink


class Runtime:
    """The service and what it needs, alive inside `async with Runtime.open(...)`."""

    def __init__(self, service: Service, config: Config, uplink: "Uplink | None") -> None:
        """Use `Runtime.open`."""
        self.service = service
        self.config = config
        self.uplink = uplink
        self._started_ns = time.monotonic_ns()

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config | Path | None = None) -> AsyncIterator["Runtime"]:
        """Load the models, start the uplink if one is configured, and close all of it at the end.

        `config`: a Config, the path of a TOML file, or None for the defaults. Raises ConfigError,
        BundleError.
        """
        if not isinstance(config, Config):
            config = load_config(config)
        async with AsyncExitStack() as stack:
            models: dict[str, ServedModel] = {}
            record = VersionRecord(record_path(config.trust.record, "edge-runtime"))
            first_loads = first_loads_of(config)
            trust = read_trust(config.trust.keys, allow_unsigned=config.trust.unsigned)
            for name in config.models:
                model = await load_model_soon(
                    name,
                    threads=config.threads,
                    trust=trust,
                    max_batch=config.batch.max,
                    first_loads=first_loads,
                )
                renew = partial(
                    load_engine,
                    name,
                    model.digest,
                    threads=config.threads,
                    trust=trust,
                    max_batch=config.batch.max,
                )
                served = _serve(model, config, renew)
                stack.push_async_callback(served.lane.close)
                record.admit(model.name, model.manifest.engine, model.version, model.digest, model.signed_by)
                if served.info.name in models:
                    raise ConfigError(f"models: {served.info.name} is listed twice; remove one of them.")
                models[served.info.name] = served
            uplink = None
            if config.cloud is not None:
                # A device without a cloud pays nothing for it: 4 MB of memory, a tenth of a second.
                from edge_runtime.uplink.uplink import Uplink  # noqa: PLC0415

                uplink = Uplink(config.cloud, device=device_id(config.cloud))
                stack.push_async_callback(uplink.close)
                await uplink.start()
            store = await _open_store(models, config, stack)
            yield cls(_service(models, config, uplink, store), config, uplink)

    async def ask(self, text: str, *, model: str = "commands", is_private: bool = False) -> Outcome:
        """Answer one text. Raises InvalidRequest and its kin, Refused, EngineFailed."""
        return await self.service.ask(text, model=model, is_private=is_private)

    async def infer(self, model: str, request: InferRequest, *, deadline_ns: int | None = None) -> InferReply:
        """Answer a request of the Open Inference Protocol; see `Service.infer`."""
        return await self.service.infer(model, None, request, deadline_ns=deadline_ns)

    def metrics(self) -> bytes:
        """Prometheus text."""
        # Without a scrape its 4 MB are never paid.
        from edge_runtime.metrics import render  # noqa: PLC0415

        return render(self.service, self.uplink)

    def status(self) -> dict[str, object]:
        """What `edge-runtime status` shows, as JSON values."""
        return {
            "version": __version__,
            "ready": self.service.is_ready,
            "uptime_s": round((time.monotonic_ns() - self._started_ns) / 1e9, 1),
            "memory_mb": _resident_mb(),
            "models": [self._model_status(info) for info in self.service.models()],
            "answers": [
                {"model": model, "origin": origin, "reason": reason, "rows": rows}
                for (model, origin, reason), rows in sorted(self.service.counters.outcomes.items())
            ],
            "cache": cache_status(self.service),
            "cloud": None if self.uplink is None else self.uplink.status(),
        }

    def _model_status(self, info: ModelInfo) -> dict[str, object]:
        statistics = self.service.statistics(info.name)
        infer = statistics.compute_infer
        return {
            "name": info.name,
            "version": info.version,
            "platform": info.platform,
            **cost_of(info),
            "accept_threshold": info.accept_threshold,
            "rows": statistics.requests.count,
            "batches": statistics.executions,
            "mean_batch": round(infer.count / statistics.executions, 2) if statistics.executions else None,
            "waiting": self.service.waiting(info.name),
            "refused": statistics.refused,
            "failed_batches": statistics.faults,
            "engines_replaced": statistics.replaced,
        }


def first_loads_of(config: Config) -> FirstLoads:
    """What decides which models may be loaded under `config`."""
    return FirstLoads(
        trials_path(record_path(config.trust.record, "edge-runtime")),
        memory_mb=config.limits.model_memory_mb,
        lift="edge-runtime models verify --again",
    )


def cache_status(service: Service) -> dict[str, object] | None:
    """What both levels of the cache hold and did; None where it is off."""
    if service.recall is None:
        return None
    memory, disk = service.recall.memory, service.recall.disk
    statistics = [service.statistics(info.name) for info in service.models()]
    outcomes = service.counters.outcomes.items()
    return {
        "entries": len(memory),
        "bytes": memory.size_bytes,
        "hits": sum(counted.cache_hit.count for counted in statistics),
        "misses": sum(counted.cache_miss.count for counted in statistics),
        "coalesced": service.counters.coalesced,
        "stale": sum(rows for (_, _, reason), rows in outcomes if reason == Reason.STALE),
        "evictions": memory.evictions,
        "disk": None if disk is None else disk.status(),
    }


async def _open_store(
    models: dict[str, ServedModel], config: Config, stack: AsyncExitStack
) -> "AnswerStore | None":
    """The second level of the cache, where it is wanted; it forgets the models that are not loaded any more."""
    path = state_path(config.cache.path, "edge-runtime", "answers.db")
    if path is None or not config.cache.enabled:
        return None
    from edge_runtime.caching.answer_store import AnswerStore  # noqa: PLC0415 - off, it costs nothing

    store = AnswerStore(path, config.cache.disk_max_bytes)
    stack.push_async_callback(store.close)
    store.retain_models([served.info.digest for served in models.values()])
    await store.start()
    return store


def _service(
    models: dict[str, ServedModel], config: Config, uplink: "Uplink | None", store: "AnswerStore | None"
) -> Service:
    cache: Cache[Outcome] | None = None
    if config.cache.enabled:
        cache = Cache(config.cache.max_bytes, int(config.cache.ttl_s * 1e9), int(config.cache.stale_s * 1e9))
    return Service(
        models,
        cache=cache,
        cloud=uplink,
        device_secret=secrets.token_bytes(32) if store is None else store.secret,
        store=store,
        timeout_s=config.requests.timeout_s,
        cloud_timeout_s=config.cloud.timeout_s if config.cloud is not None else 0.0,
    )


def _serve(model: Model, config: Config, renew: Callable[[], Engine]) -> ServedModel:
    batch = config.batch
    lane = ModelRunner(
        model.name,
        model.processor,
        model.engine,
        QueueLimits(batch.max, batch.queue, batch.queue_bytes, batch.tenant_queue, batch.tenant_engine_share),
        replace(
            policy_of(batch.window),
            duty_target=batch.duty_target,
            duty_wait_ns=int(batch.duty_wait_ms * 1e6),
        ),
        latency_profile=model.latency_profile,
        is_inline=model.latency_profile[0][1] <= INLINE_LIMIT_NS,
        load_engine=renew,
    )
    info = model.info
    if config.escalation.accept is not None and info.accept_threshold is not None:
        info = replace(info, accept_threshold=config.escalation.accept)
    return ServedModel(
        info,
        model.processor,
        lane,
        engine_version(model.manifest.engine),
    )


def _resident_mb() -> float | None:
    """Resident memory of this process in MB; None where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * 4096 / 1e6, 1)
