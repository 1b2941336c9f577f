"""The commands that check and show the configuration."""

import json
from pathlib import Path

import click

from edge_runtime.cli.options import SuggestingGroup, config_option, json_option, reports_errors


@click.group(cls=SuggestingGroup)
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@reports_errors
def config_check(path: Path, as_json: bool) -> None:
    """Check a configuration file.

    Where it cannot be used, the exit code is 2 and the message names file, key and correction. The files it names are
    looked for on this machine.

    \b
    Examples:
      edge-runtime config check edge.toml
    """
    from edge_runtime.config import check_listens, load_config
    from edge_runtime.settings import check_files

    config = load_config(path)
    check_listens(config, str(path))
    password_file = "" if config.cloud is None else config.cloud.password_file
    check_files(config.models, config.trust, password_file, str(path))
    click.echo(json.dumps({"path": str(path), "ok": True}) if as_json else f"ok: {path}")


@config.command("show")
@config_option
@json_option
@reports_errors
def config_show(config_path: Path | None, as_json: bool) -> None:
    """Show the configuration in effect.

    Defaults are included. The output is TOML that can be saved.

    \b
    Examples:
      edge-runtime config show --config edge.toml
    """
    import msgspec

    from edge_runtime.config import load_config, socket_path

    effective = load_config(config_path)
    tree = msgspec.to_builtins(effective)
    tree["server"]["socket"] = str(socket_path(effective) or "off")
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_config

    print_config(tree)
