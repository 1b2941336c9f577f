"""The worker's process: build, run, drain."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

from cloud_fallback.config import CloudConfig, check_config
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.serving.start_model import RunnerSettings, read_admission, start_models
from edge_runtime.settings import policy_of, queue_limits_of
from edge_runtime.signals import stop_signals, unless_stopped
from edge_runtime.typed_toml import read_secret

_log = logging.getLogger(__name__)


async def serve(config: CloudConfig, announce: Callable[[str], None], *, again: bool = False) -> None:
    """Load the models, serve until SIGTERM or SIGINT, then drain; `announce` gets one line once requests may come.

    A second signal ends the process at once with exit code 1; one that comes while models are loaded ends the load.
    `again` forgets failed first loads. Raises ConfigError, BundleError.
    """
    check_config(config, "CloudConfig")
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        models = await unless_stopped(stop, load_models(config, stack, again=again))
        if models is None:
            return
        worker = Worker(config, read_secret(config.password_file), models)
        worker.connection.start()
        # The stack unwinds backwards: the worker drains before its models are closed.
        stack.push_async_callback(worker.drain)
        while not stop.is_set() and not await worker.wait_ready(1.0):
            pass  # the worker logs why, once per cause
        if not worker.problem:
            announce(f"ready: {', '.join(models)} at {config.broker}")
        await stop.wait()
        _log.info("event=draining")
    _log.info("event=stopped")


async def load_models(
    config: CloudConfig, stack: AsyncExitStack, *, again: bool = False
) -> dict[str, Loaded]:
    """Start the configured models; `stack` closes them. Raises ConfigError, BundleError."""
    settings = RunnerSettings(
        threads=config.threads,
        limits=queue_limits_of(config.batch),
        policy=policy_of(config.batch),
        instances=config.instances,
        depth=config.depth,
    )
    admission = read_admission(
        "cloud-fallback",
        keys=config.trust.keys,
        unsigned=config.trust.unsigned,
        record=config.trust.record,
        memory_mb=config.limits.model_memory_mb,
        retry_command="cloud-fallback serve --again",
        again=again,
    )
    started = await start_models(config.models, settings, admission, stack)
    return {name: Loaded(one.model, one.runner) for name, one in started.items()}


def run(config: CloudConfig, announce: Callable[[str], None], *, again: bool = False) -> None:
    """Run `serve` in an event loop of its own."""
    asyncio.run(serve(config, announce, again=again))
