"""What all commands share: options, exit codes, and the near word for a mistyped one."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import click

from edge_runtime.core.errors import ConfigError, EdgeRuntimeError, Refused

P = ParamSpec("P")

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="TOML file; without it the defaults hold.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def reports_errors(command: Callable[P, int | None]) -> Callable[P, None]:
    """Print the errors of this project as one sentence, and exit with the code that they deserve.

    A command returns its exit code; None is 0.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except ConfigError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Refused as error:
            click.echo(f"refused: {error}", err=True)
            sys.exit(3)
        except EdgeRuntimeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        sys.exit(code or 0)

    return run


class SuggestingGroup(click.Group):
    """A group that answers a mistyped command with the near one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near or "Did you mean" in error.format_message():  # click 8.5 suggests by itself
                raise
            raise click.UsageError(f"{error.format_message()} Did you mean {near[0]!r}?", ctx) from None
