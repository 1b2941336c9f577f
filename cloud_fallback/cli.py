"""`cloud-fallback`: the cloud tier's command line. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration."""

import asyncio
import json
import logging
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from cloud_fallback.config import CloudConfig, load_config
from edge_runtime import __version__
from edge_runtime.core.errors import ConfigError, EdgeRuntimeError

if TYPE_CHECKING:
    from cloud_fallback.worker import Loaded


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cloud-fallback")
def main() -> None:
    """Answer what edge devices escalate over MQTT.

    \b
    Examples:
      cloud-fallback serve --broker mqtt://127.0.0.1:1883
      cloud-fallback config check cloud.toml
    """


@main.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; without it the defaults hold."
)
@click.option("--broker", help="mqtt://HOST[:PORT], in place of the file's.")
@click.option("--again", is_flag=True, help="Try models again that failed their first load.")
def serve(path: Path | None, broker: str | None, again: bool) -> None:
    """Serve until SIGTERM; a second SIGTERM ends at once."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    try:
        config = load_config(path)
        if broker:
            config = msgspec.structs.replace(config, broker=broker)
        asyncio.run(run(config, again=again))
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except EdgeRuntimeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


@main.group()
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@click.argument("path", type=click.Path(path_type=Path))
def config_check(path: Path) -> None:
    """Check a configuration file; exit code 2 with file, key and fix where it cannot be used."""
    _show(path, only_check=True)


@config.command("show")
@click.option("--config", "path", type=click.Path(path_type=Path))
def config_show(path: Path | None) -> None:
    """Show the configuration as it takes effect, as JSON."""
    _show(path, only_check=False)


def _show(path: Path | None, *, only_check: bool) -> None:
    try:
        found = load_config(path)
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"ok: {path}" if only_check else json.dumps(msgspec.to_builtins(found), indent=2))


async def run(config: CloudConfig, *, again: bool = False) -> None:
    """Load, serve, drain; `again` tries models anew whatever came of earlier trials. Raises ConfigError, BundleError."""
    from cloud_fallback.worker import Worker
    from edge_runtime.signals import stop_signals, unless_stopped
    from edge_runtime.typed_toml import read_secret

    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        models = await unless_stopped(stop, _load(config, stack, again=again))
        if models is None:
            return
        worker = Worker(config, read_secret(config.password_file), models)
        worker.connection.start()
        stack.push_async_callback(worker.drain)
        while not stop.is_set() and not await worker.connection.wait_connected(1.0):
            pass  # the connection itself says why, once per cause
        if worker.connection.is_connected:
            click.echo(f"ready: {', '.join(models)} at {config.broker}", err=True)
        await stop.wait()


async def _load(config: CloudConfig, stack: AsyncExitStack, *, again: bool) -> "dict[str, Loaded]":
    from functools import partial

    from cloud_fallback.worker import Loaded
    from edge_runtime.bundles.trust import VersionRecord, read_trust, record_path, trials_path
    from edge_runtime.core.scheduling.scheduler import QueueLimits
    from edge_runtime.core.scheduling.windows import policy_of
    from edge_runtime.loading.model import load_engine, load_model_soon
    from edge_runtime.loading.trial_record import FirstLoads
    from edge_runtime.serving.model_runner import ModelRunner

    models: dict[str, Loaded] = {}
    path = record_path(config.record, "cloud-fallback")
    record = VersionRecord(path)
    first_loads = FirstLoads(
        trials_path(path),
        memory_mb=config.limits.model_memory_mb,
        lift="cloud-fallback serve --again",
        again=again,
    )
    trust = read_trust(config.trusted_keys, allow_unsigned=config.allow_unsigned)
    for name in config.models:
        model = await load_model_soon(
            name, threads=config.threads, trust=trust, max_batch=config.max_batch, first_loads=first_loads
        )
        record.admit(model.name, model.manifest.engine, model.version, model.digest, model.signed_by)
        renew = partial(
            load_engine, name, model.digest, threads=config.threads, trust=trust, max_batch=config.max_batch
        )
        lane = ModelRunner(
            model.name,
            model.processor,
            [model.engine, *[renew() for _ in range(config.instances - 1)]],
            QueueLimits(
                config.max_batch,
                config.queue,
                tenant_max_waiting=config.tenant_queue,
                tenant_engine_share=config.tenant_engine_share,
            ),
            policy_of(config.window),
            latency_profile=model.latency_profile,
            depth=config.depth,
            load_engine=renew,
        )
        stack.push_async_callback(lane.close)
        models[model.name] = Loaded(model, lane)
    return models
