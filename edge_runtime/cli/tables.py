"""What the command line prints for people; the only module that imports rich."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def _print(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*["-" if cell is None else str(cell) for cell in row])
    Console(highlight=False).print(table)


def print_status(tree: dict[str, Any]) -> None:
    """The daemon's state."""
    ready = "ready" if tree["ready"] else "draining"
    Console(highlight=False).print(
        f"edge-runtime {tree['version']}: {ready}, up {tree['uptime_s']:.0f} s, {tree['memory_mb']} MB"
    )
    columns = ["name", "version", "rows", "batches", "mean_batch", "waiting", "max_batch", "accept_threshold"]
    columns += ["memory_mb", "load_ms"]
    _print("models", columns, [[model[column] for column in columns] for model in tree["models"]])
    for model in tree["models"]:
        if model["batch_note"]:
            Console(highlight=False).print(
                f"{model['name']} runs single rows: {model['batch_note']}", markup=False
            )
    columns = ["model", "origin", "reason", "rows"]
    if tree["answers"]:
        _print("answers", columns, [[answer[column] for column in columns] for answer in tree["answers"]])
    memory = dict(tree["cache"] or {})
    disk = memory.pop("disk", None)
    for name, fields in (("cache", memory or None), ("cache on disk", disk), ("cloud", tree["cloud"])):
        rows = [["off", ""]] if fields is None else [[key, value] for key, value in fields.items()]
        _print(name, ["", ""], rows)


def print_models(rows: list[dict[str, Any]]) -> None:
    """Configured models, one line each."""
    columns = ["name", "version", "task", "engine", "bytes", "memory_mb"]
    _print("models", columns, [[row[column] for column in columns] for row in rows])


def print_manifest(tree: dict[str, Any]) -> None:
    """A bundle's manifest, the long lists shortened."""
    rows = []
    loaded = tree.pop("loaded")
    for key, value in tree.items():
        text = str(value)
        rows.append(
            [key, text if len(text) <= 160 else f"{text[:150]}... ({len(text)} characters; see --json)"]
        )
    _print("bundle", ["field", "value"], rows)
    steps = ", ".join(f"{count} in {us:g} us" for count, us in loaded.pop("batch_latency_us"))
    _print("loaded", ["field", "value"], [*loaded.items(), ["batches", steps]])


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
