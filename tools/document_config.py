"""Writes docs/configuration.md from the types of both configurations, so that no key is described in two places.

python -m tools.document_config            # write it
python -m tools.document_config --check    # exit code 1 if the file is stale
"""

import ast
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from cloud_fallback.config import RENAMED as CLOUD_RENAMED
from cloud_fallback.config import CloudConfig
from edge_runtime.config import RENAMED as EDGE_RENAMED
from edge_runtime.config import Config
from edge_runtime.typed_toml import Renamed

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Every key of `edge.toml` (the daemon on the device) and of `cloud.toml` (the worker in the cloud), generated from the
types in `edge_runtime/config.py`, `edge_runtime/settings.py` and `cloud_fallback/config.py` by
`python -m tools.document_config`. Every key is optional unless its default says *required*. An unknown key is an
error that names the near one. `edge-runtime config check FILE` checks a file, `edge-runtime config show` prints what
takes effect; `cloud-fallback config check` and `config show` do so for the worker.

Three words have the same meaning everywhere: `"auto"` lets the program choose, `"off"` turns a thing off, and a key
that is *unset* has no value until the file gives one. `[trust]`, `[limits]`, `[batch]`, `[requests]` and the keys that
admit to the broker have the same names and meanings in both files; only some defaults differ.

The state directory is `$STATE_DIRECTORY` (set by systemd), else `$XDG_STATE_HOME/PROGRAM`, else
`~/.local/state/PROGRAM`. The runtime directory is `$RUNTIME_DIRECTORY` (set by systemd), else
`$XDG_RUNTIME_DIR/edge-runtime`, else a folder of this user in `/tmp`.
"""
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def page() -> str:
    """The whole document."""
    edge = _file("edge.toml", "The daemon on the device.", Config, EDGE_RENAMED)
    cloud = _file("cloud.toml", "The worker in the cloud.", CloudConfig, CLOUD_RENAMED)
    return f"{INTRODUCTION}\n{edge}\n{cloud}"


def _file(name: str, text: str, kind: type[msgspec.Struct], renamed: Renamed) -> str:
    top = [field for field in msgspec.structs.fields(kind) if section_of(field.type) is None]
    parts = [f"## `{name}`\n", f"{text}\n", "### Top level\n", _table(kind, [field.name for field in top])]
    for field in msgspec.structs.fields(kind):
        section = section_of(field.type)
        if section is not None:
            names = [inner.name for inner in msgspec.structs.fields(section)]
            parts += [f"### `[{field.name}]`\n", f"{inspect.getdoc(section)}\n", _table(section, names)]
    return "\n".join([*parts, _renamed(renamed)])


def _table(kind: type[msgspec.Struct], names: list[str]) -> str:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    types = get_type_hints(kind, include_extras=True)
    texts = descriptions(kind)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {_type(types[name])} | {_default(fields[name])} | {texts[name]} |" for name in names
    ]
    return "\n".join(lines) + "\n"


def _renamed(renamed: Renamed) -> str:
    lines = [f"- `{_title(old)}` is now `{_title(new)}`." for old, new in renamed.keys.items()]
    for place, words in renamed.words.items():
        lines += [f'- `{_title(place)} = "{old}"` is now `"{new}"`.' for old, new in words.items()]
    return "\n".join(
        ["Former names, read with a warning until the next release:\n", *lines, ""],
    )


def _title(place: str) -> str:
    *sections, key = place.split(".")
    return f"[{'.'.join(sections)}] {key}" if sections else key


def section_of(kind: Any) -> type[msgspec.Struct] | None:
    """The type of a section, also of one that may be absent; None for a plain value."""
    for option in (kind, *get_args(kind)):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return option
    return None


def _type(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *notes = get_args(kind)
        bounds = [bound for note in notes if isinstance(note, msgspec.Meta) for bound in _bounds(note)]
        return " ".join([_type(base), *bounds])
    if origin in (Union, UnionType):
        return " or ".join(_type(option) for option in get_args(kind) if option is not type(None))
    if origin is tuple:
        return f"list of {_type(get_args(kind)[0])}"
    return _WORDS[kind]


def _bounds(note: msgspec.Meta) -> list[str]:
    named = (("from", note.ge), ("above", note.gt), ("to", note.le), ("below", note.lt))
    return [
        f"{word} {bound:g}" if bound < 1e6 else f"{word} {bound:,}"
        for word, bound in named
        if bound is not None
    ]


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is msgspec.NODEFAULT:
        return "*required*"
    if field.default is None:
        return "unset"
    return f"`{json.dumps(field.default)}`"


def descriptions(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The string below each field of a type and of its bases: what documentation tools call attribute docstrings."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not issubclass(base, msgspec.Struct) or base is msgspec.Struct:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def main() -> None:
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE.name} is stale; run: python -m tools.document_config")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
