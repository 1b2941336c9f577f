"""The command line: thin over the library. Data goes to stdout, notes to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused, or answered degraded.
"""

import json
from pathlib import Path

import click

from edge_runtime import __version__
from edge_runtime.cli.ask import absence, ask, connect, infer
from edge_runtime.cli.config_commands import config
from edge_runtime.cli.models import models
from edge_runtime.cli.options import SuggestingGroup, config_option, json_option, reports_errors
from edge_runtime.core.errors import EdgeRuntimeError


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-runtime")
def main() -> None:
    """Run small models on this device; ask the cloud only when unsure and allowed.

    \b
    Examples:
      edge-runtime ask "turn the lights off"
      edge-runtime serve --config edge.toml
    """


@main.command()
@config_option
@reports_errors
def serve(config_path: Path | None) -> None:
    """Run the daemon until SIGTERM.

    \b
    Examples:
      edge-runtime serve
      edge-runtime serve --config edge.toml
    """
    from edge_runtime.config import load_config

    config = load_config(config_path)
    from edge_runtime.daemon import run

    run(config)


@main.command()
@config_option
@json_option
@reports_errors
def status(config_path: Path | None, as_json: bool) -> None:
    """Show what the running daemon does.

    \b
    Examples:
      edge-runtime status
      edge-runtime status --json | jq .cloud
    """
    client = connect(config_path)
    if client is None:
        raise EdgeRuntimeError(absence(config_path))
    tree = client.get("/status")
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_status

    print_status(tree)


main.add_command(ask)
main.add_command(infer)
main.add_command(models)
main.add_command(config)

if __name__ == "__main__":
    main()
