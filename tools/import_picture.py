"""Reads the table of layers of docs/architecture.md and every import of the project; draws what imports what.

    python -m tools.import_picture            write the picture into docs/architecture.md, between its two markers
    python -m tools.import_picture --check    exit with 1 if the picture there is not what the imports say

`tests/test_imports.py` holds the imports to the table, with the functions of this file.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"
PACKAGES = ("edge_runtime", "cloud_fallback")
#: The public names of the package; they are no module of the runtime's own.
PUBLIC = "edge_runtime"
_ROW = re.compile(r"^\| *(\w+) *\|([^|]*)\|([^|]*)\|", re.MULTILINE)
_UP_TO = re.compile(r"(?:1 to )?(\d+)")


@dataclass(frozen=True)
class Layer:
    """One row of the table. `reach`: the highest layer that its modules may import, beside their own row."""

    name: str
    reach: int
    units: tuple[str, ...]


def read_layers(text: str) -> dict[str, Layer]:
    """The row of each folder or module that the table under the heading "Layers" names."""
    table = text.partition("\n## Layers\n")[2].partition("\n## ")[0]
    layers = {}
    for name, modules, may_import in _ROW.findall(table):
        units = tuple(re.findall(r"`([\w/]+)`", modules))
        up_to = _UP_TO.search(may_import)
        layer = Layer(name, int(up_to[1]) if up_to else 0, units)
        layers |= dict.fromkeys(units, layer)
    return layers


def modules() -> dict[str, str]:
    """Name and source of every module of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """What `module` imports, wherever in it: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`.

    Relative imports, and imports by a function that is given a literal name, are found too.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parents = module.split(".")[: len(module.split(".")) - level + is_package]
                    base = ".".join([*parents, base] if base else parents)
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def unit_of(module: str, layers: Mapping[str, Layer]) -> str | None:
    """The folder or module of the table that `module`, or a name in it, belongs to: the longest that fits."""
    if module == PUBLIC:
        return PUBLIC
    path = module.removeprefix(f"{PUBLIC}.").split(".")
    units = ("/".join(path[:length]) for length in range(len(path), 0, -1))
    return next((unit for unit in units if unit in layers), None)


def imported_unit(name: str, layers: Mapping[str, Layer]) -> str | None:
    """The unit that an import of `name` reaches; the public names of the package are one, and its version is none."""
    unit = unit_of(name, layers)
    if unit is None and name.rpartition(".")[0] == PUBLIC and not is_module(name):
        return None if name == f"{PUBLIC}.__version__" else PUBLIC
    return unit


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def unit_graph(found: Mapping[str, str], layers: Mapping[str, Layer]) -> dict[str, set[str]]:
    """Which units each unit of the table imports, itself left out."""
    graph: dict[str, set[str]] = {unit: set() for unit in layers}
    for module, source in found.items():
        unit = unit_of(module, layers)
        if unit is not None:
            named = {
                imported_unit(name, layers)
                for name in imports(module, source, is_package=is_package(module))
                if name.split(".")[0] in PACKAGES
            }
            graph[unit] |= {name for name in named if name is not None and name != unit}
    return graph


def is_package(module: str) -> bool:
    return ROOT.joinpath(*module.split("."), "__init__.py").exists()


def module_graph(found: Mapping[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports."""
    graph = {}
    for module, source in found.items():
        named = set()
        for name in imports(module, source, is_package=is_package(module)):
            known = name
            while known and known not in found:
                known = known.rpartition(".")[0]
            if known and known not in {module, PUBLIC}:
                named.add(known)
        graph[module] = named
    return graph


def way_back(graph: Mapping[str, Iterable[str]], start: str) -> list[str]:
    """A way from `start` along the imports back to it; empty if there is none."""
    came_from: dict[str, str] = {}
    todo = [start]
    while todo:
        here = todo.pop()
        for there in sorted(graph.get(here, ())):
            if there == start:
                way = [here]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return [*way[::-1], start]
            if there not in came_from:
                came_from[there] = here
                todo.append(there)
    return []


def picture(found: Mapping[str, str], layers: Mapping[str, Layer]) -> str:
    """Rows from the command line down to the core; beside each unit, what it imports."""
    graph = unit_graph(found, layers)
    rows = list(dict.fromkeys(layers.values()))
    place = {unit: number for number, layer in enumerate(rows) for unit in layer.units}
    there = {unit_of(module, layers) for module in found}
    width = max(map(len, layers))
    lines = []
    for layer in rows[::-1]:
        units = sorted(there.intersection(layer.units), key=lambda unit: (-len(graph[unit]), unit))
        for label, unit in zip_longest((layer.name,), units, fillvalue=""):
            below = sorted(
                graph.get(unit, set()).difference(rows[0].units), key=lambda name: (-place[name], name)
            )
            lines.append(f"{label:>5}  {unit:{width}}  {' '.join(below)}".rstrip())
    return "\n".join(lines)


def with_picture(page: str, drawn: str) -> str:
    """The page with `drawn` between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n```\n{drawn}\n```\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.import_picture", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the picture is stale"
    )
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    drawn = with_picture(page, picture(modules(), read_layers(page)))
    if check and drawn != page:
        print(
            "docs/architecture.md: the picture of imports is stale. Run: python -m tools.import_picture",
            file=sys.stderr,
        )
        return 1
    if not check:
        PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
