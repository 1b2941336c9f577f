"""`cloud-fallback`: the cloud tier's command line. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration."""

import json
import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import click

from edge_runtime import __version__
from edge_runtime.core.errors import ConfigError, EdgeRuntimeError

P = ParamSpec("P")


def _reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print the errors of this project as one sentence, with the exit code that they deserve."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except EdgeRuntimeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)

    return run


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
@_reports_errors
def serve(path: Path | None, broker: str | None, again: bool) -> None:
    """Serve until SIGTERM; a second SIGTERM ends at once.

    \b
    Examples:
      cloud-fallback serve --config cloud.toml
      cloud-fallback serve --broker mqtts://broker.example:8883
    """
    from msgspec.structs import replace

    from cloud_fallback.config import load_config
    from cloud_fallback.daemon import run
    from edge_runtime.settings import check_broker

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    config = load_config(path)
    if broker:
        check_broker(broker, "--broker")
        config = replace(config, broker=broker)
    run(config, lambda line: click.echo(line, err=True), again=again)


@main.group()
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@click.argument("path", type=click.Path(path_type=Path))
@_reports_errors
def config_check(path: Path) -> None:
    """Check a configuration file.

    Where it cannot be used, the exit code is 2 and the message names file, key and correction. The files it names are
    looked for on this machine.
    """
    from cloud_fallback.config import load_config
    from edge_runtime.settings import check_files

    config = load_config(path)
    check_files(config.models, config.trust, config.password_file, str(path))
    click.echo(f"ok: {path}")


@config.command("show")
@click.option("--config", "path", type=click.Path(path_type=Path))
@_reports_errors
def config_show(path: Path | None) -> None:
    """Show the configuration as it takes effect, as JSON."""
    import msgspec

    from cloud_fallback.config import load_config

    click.echo(json.dumps(msgspec.to_builtins(load_config(path)), indent=2))
