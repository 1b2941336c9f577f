"""Puts the parts together as a configuration says, without any network listener: the runtime inside a program."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.config import Config, check_config, device_id, load_config
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.messages import InferReply, InferRequest
from edge_runtime.core.outcome import Outcome
from edge_runtime.engines.build import engine_version
from edge_runtime.serving.model_runner import INLINE_LIMIT_NS
from edge_runtime.serving.service import ServedModel, Service
from edge_runtime.serving.start_model import (
    Admission,
    RunnerSettings,
    StartedModel,
    read_admission,
    start_models,
)
from edge_runtime.settings import policy_of, queue_limits_of
from edge_runtime.status import Problems, problems_of, status_of
from edge_runtime.storage.files import state_path

if TYPE_CHECKING:
    from edge_runtime.caching.answer_store import AnswerStore
    from edge_runtime.uplink.uplink import Uplink


class Runtime:
    """The service and what it needs, alive inside `async with Runtime.open(...)`."""

    def __init__(
        self,
        service: Service,
        config: Config,
        uplink: "Uplink | None",
    ) -> None:
        """Use `Runtime.open`."""
        self.service = service
        self.config = config
        self.uplink = uplink
        #: Where a daemon listens for requests; empty inside a program.
        self.addresses: tuple[str, ...] = ()
        self._problems = Problems()
        self._started_ns = time.monotonic_ns()

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config | Path | None = None) -> AsyncIterator["Runtime"]:
        """Load the models, start the uplink if one is configured, and close all of it at the end.

        `config`: a Config, the path of a TOML file, or None for the defaults. Raises ConfigError,
        BundleError.
        """
        if isinstance(config, Config):
            check_config(config, "Config")
        else:
            config = load_config(config)
        async with AsyncExitStack() as stack:
            started = await start_models(config.models, _runner_settings(config), admission_of(config), stack)
            models = {name: _served(one, config) for name, one in started.items()}
            uplink = await _open_uplink(config, stack)
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
        self.note_problems()
        now_ns = time.monotonic_ns()
        return status_of(
            self.service,
            self.uplink,
            uptime_ns=now_ns - self._started_ns,
            addresses=self.addresses,
            problems=self._problems.listed(now_ns),
        )

    def note_problems(self) -> None:
        """Note what is wrong now; `status` tells since when, as exactly as this is called often."""
        found = problems_of(self.service, self.uplink)
        self._problems.update(found, now_ns=time.monotonic_ns(), now=datetime.now(UTC))


def admission_of(config: Config) -> Admission:
    """What a bundle must pass under `config`. Raises ConfigError."""
    return read_admission(
        "edge-runtime",
        keys=config.trust.keys,
        unsigned=config.trust.unsigned,
        record=config.trust.record,
        memory_mb=config.limits.model_memory_mb,
        retry_command="edge-runtime models verify --again",
    )


def _runner_settings(config: Config) -> RunnerSettings:
    return RunnerSettings(
        threads=config.threads,
        limits=queue_limits_of(config.batch),
        policy=policy_of(config.batch),
        inline_limit_ns=INLINE_LIMIT_NS,
    )


def _served(started: StartedModel, config: Config) -> ServedModel:
    model = started.model
    info = model.info
    if config.escalation.accept is not None and info.accept_threshold is not None:
        info = replace(info, accept_threshold=config.escalation.accept)
    return ServedModel(
        info,
        model.processor,
        started.runner,
        engine_version(model.manifest.engine),
    )


async def _open_uplink(config: Config, stack: AsyncExitStack) -> "Uplink | None":
    """The way to the cloud, where the configuration has one; it begins to connect and is not waited for."""
    if config.cloud is None:
        return None
    # Late: a device without a cloud pays nothing for it, neither 4 MB of memory nor a tenth of a second.
    from edge_runtime.uplink.uplink import Uplink  # noqa: PLC0415

    uplink = Uplink(config.cloud, device=device_id(config.cloud))
    stack.push_async_callback(uplink.close)
    await uplink.start()
    return uplink


async def _open_store(
    models: Mapping[str, ServedModel], config: Config, stack: AsyncExitStack
) -> "AnswerStore | None":
    """The second level of the cache, where it is wanted; answers of models that are no longer loaded are dropped."""
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
    models: Mapping[str, ServedModel],
    config: Config,
    uplink: "Uplink | None",
    store: "AnswerStore | None",
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
