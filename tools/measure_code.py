"""Prints how folders of Python code are built: sizes of files and functions, comments and docstrings.

    python -m tools.measure_code edge_runtime cloud_fallback
    python -m tools.measure_code --apart --without tests legacy -- ../h11/h11 ../websockets/src/websockets

A row is all folders together, or each for itself with `--apart`. Lines are all lines of a file. A function's lines run from
`def` to its last line, docstring included. Comments and docstrings are lines that hold one, per 100 lines.
"""

import argparse
import ast
import io
import json
import statistics
import sys
import tokenize
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Measured:
    """The figures of one row. Comments and docstrings are per 100 lines."""

    name: str
    files: int
    lines: int
    median_file: float
    longest_file: int
    longest_function: int
    longest_name: str
    median_function: float
    comments: float
    docstrings: float


def functions_of(path: Path, tree: ast.AST) -> list[tuple[int, str]]:
    """Lines and name of each function of a file, inner ones too."""
    return [
        (node.end_lineno - node.lineno + 1, f"{path.stem}.{node.name}")
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and node.end_lineno is not None
    ]


def comment_lines(source: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def docstring_lines(tree: ast.AST) -> int:
    return sum(
        text.end_lineno - text.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None
        for text in node.body[:1]
        if text.end_lineno is not None
    )


def measure(name: str, folders: Iterable[Path], without: Collection[str] = ()) -> Measured:
    """Measure all Python files below `folders`, those in a folder of a name in `without` left out.

    Raises ValueError where there is none.
    """
    paths = sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not set(path.relative_to(folder).parts).intersection(without)
    )
    if not paths:
        raise ValueError(f"{name}: there is no Python file below it.")
    sources = [path.read_text(encoding="utf-8") for path in paths]
    trees = [ast.parse(source) for source in sources]
    sizes = [len(source.splitlines()) for source in sources]
    functions = [found for path, tree in zip(paths, trees, strict=True) for found in functions_of(path, tree)]
    longest, longest_name = max(functions, default=(0, ""))
    lines = sum(sizes)
    return Measured(
        name,
        len(paths),
        lines,
        statistics.median(sizes),
        max(sizes),
        longest,
        longest_name,
        statistics.median([size for size, _ in functions] or [0]),
        round(100 * sum(map(comment_lines, sources)) / lines, 1),
        round(100 * sum(map(docstring_lines, trees)) / lines, 1),
    )


def table(rows: Iterable[Measured]) -> str:
    """The rows as a table in Markdown."""
    head = (
        "| | files | lines | median file (longest) | longest function (median) | comments /100 lines | docstrings /100 lines |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join(
        [
            head,
            *(
                f"| {row.name} | {row.files} | {row.lines:,} | {row.median_file:.0f} ({row.longest_file}) "
                f"| {row.longest_function} `{row.longest_name}` ({row.median_function:.0f}) "
                f"| {row.comments} | {row.docstrings} |"
                for row in rows
            ),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.measure_code", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--apart", action="store_true", help="a row for each folder")
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="NAME", help="leave out folders of this name"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        if given.apart:
            rows = [measure(str(folder), [folder], given.without) for folder in given.folders]
        else:
            rows = [measure(" + ".join(map(str, given.folders)), given.folders, given.without)]
    except (ValueError, OSError, SyntaxError) as error:
        print(f"measure_code: {error}", file=sys.stderr)
        return 1
    print(json.dumps([asdict(row) for row in rows], indent=2) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
