"""What the command line prints for people; the only module that imports rich."""

import json
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

_LABEL = 10  # columns of the labels that stand left of a line


def _console() -> Console:
    return Console(highlight=False)


def _print(console: Console, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        # Numbers are never broken over lines: where the screen is narrow, names are.
        if all(isinstance(row[i], int | float | None) for row in rows):
            table.add_column(column, justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[_text(cell) for cell in row])
    console.print(table, markup=False)


def _text(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fields(console: Console, title: str, fields: dict[str, Any]) -> None:
    """One line `title  name value, name value, ...`, wrapped below its first value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=_LABEL)
    grid.add_column(overflow="fold")
    words = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in fields.items()]
    grid.add_row(title, ", ".join(words) or "-")
    console.print(grid, markup=False)


def _lines(console: Console, title: str, lines: list[str]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=_LABEL)
    grid.add_column(overflow="fold")
    for i, line in enumerate(lines):
        grid.add_row("" if i else title, line)
    console.print(grid, markup=False)


def age(seconds: float) -> str:
    """A duration as people read it: the two largest units."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
        left %= size
    return " ".join(parts[:2])


def print_status(tree: dict[str, Any], console: Console | None = None) -> None:
    """The daemon's state, readable at 80 columns: what is wrong comes first."""
    console = console or _console()
    memory = "" if tree["memory_mb"] is None else f", {tree['memory_mb']} MB"
    console.print(
        f"edge-runtime {tree['version']}: {tree['state']}, up {age(tree['uptime_s'])}{memory}", markup=False
    )
    _lines(console, "listens on", tree["addresses"] or ["nothing: it runs inside a program"])
    for problem in tree["problems"]:
        since = datetime.fromisoformat(problem["since"]).astimezone()
        when = f"for {age(problem['for_s'])}, since {since:%Y-%m-%d %H:%M:%S}"
        _lines(console, "problem", [f"{problem['part']}, {when}:", problem["why"]])
    console.print()
    _print_served_models(console, tree["models"])
    if tree["answers"]:
        console.print()
        columns = ["model", "origin", "reason", "rows"]
        _print(
            console, "answers", columns, [[answer[name] for name in columns] for answer in tree["answers"]]
        )
    console.print()
    cache = dict(tree["cache"] or {})
    disk = cache.pop("disk", None)
    cloud = {name: value for name, value in (tree["cloud"] or {}).items() if name != "why_not"}
    for title, fields in (("cache", cache), ("on disk", disk), ("cloud", cloud)):
        if fields:
            # Most counters stay 0 for ever. What never happened is in --json.
            _fields(
                console,
                title,
                {name: value for name, value in fields.items() if value is False or value not in (0, None)},
            )
        else:
            _lines(console, title, ["off"])


def _print_served_models(console: Console, models: list[dict[str, Any]]) -> None:
    columns = ["name", "version", "rows", "batches", "mean_batch", "waiting", "memory_mb"]
    heads = ["name", "version", "rows", "batches", "rows/batch", "waiting", "MB"]
    _print(console, "models", heads, [[model[column] for column in columns] for model in models])
    for model in models:
        if model["batch_note"]:
            console.print(f"  {model['name']} runs single rows: {model['batch_note']}", markup=False)
        troubles = {
            "refused rows": model["refused"],
            "failed batches": model["failed_batches"],
            "engine restarts": model["engines_replaced"],
        }
        told = [
            f"{name}: {', '.join(f'{kind} {count:,}' for kind, count in value.items())}"
            if isinstance(value, dict)
            else f"{name}: {value:,}"
            for name, value in troubles.items()
            if value
        ]
        if told:
            console.print(f"  {model['name']}: {'; '.join(told)}", markup=False)


def print_models(rows: list[dict[str, Any]]) -> None:
    """Configured models, one line each."""
    columns = ["name", "version", "task", "engine", "bytes", "memory_mb"]
    _print(_console(), "models", columns, [[row[column] for column in columns] for row in rows])


def print_manifest(tree: dict[str, Any]) -> None:
    """A bundle's manifest, the long lists shortened."""
    rows = []
    loaded = tree.pop("loaded")
    for key, value in tree.items():
        text = str(value)
        rows.append(
            [key, text if len(text) <= 160 else f"{text[:150]}... ({len(text)} characters; see --json)"]
        )
    _print(_console(), "bundle", ["field", "value"], rows)
    steps = ", ".join(f"{count} in {us:g} us" for count, us in loaded.pop("batch_latency_us"))
    _print(_console(), "loaded", ["field", "value"], [*map(list, loaded.items()), ["batches", steps]])


def print_config(tree: dict[str, Any]) -> None:
    """The configuration as TOML that can be saved."""
    console = Console(highlight=False, soft_wrap=True)
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    for key, value in tree.items():
        if key not in sections:
            _print_key(console, key, value)
    for name, section in sections.items():
        console.print(f"\n\\[{name}]")
        for key, value in section.items():
            _print_key(console, key, value)


def _print_key(console: Console, key: str, value: Any) -> None:
    if value is None:
        console.print(f"# {key} is not set")
    else:
        console.print(f"{key} = {json.dumps(value)}", markup=False)
