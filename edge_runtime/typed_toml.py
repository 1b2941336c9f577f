"""TOML file -> typed value, or one sentence that names file, key, what was expected and how to mend it."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_runtime.core.errors import ConfigError

Typed = TypeVar("Typed", bound=msgspec.Struct)

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "bool": "true or false",
    "array": "a list in [ ]",
    "object": "a [section]",
    "null": "nothing",
}


def load_toml(path: Path, kind: type[Typed]) -> Typed:
    """Read `path` as `kind`. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check the name and its permissions."
        ) from None
    try:
        tree = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8.") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from None
    return convert_tree(tree, kind, str(path))


def convert_tree(tree: dict[str, Any], kind: type[Typed], where: str) -> Typed:
    """Check a decoded tree against `kind`. Raises ConfigError naming `where` and the key."""
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(str(error), kind)}") from None


def _sentence(message: str, kind: type[msgspec.Struct]) -> str:
    text, _, place = message.partition(" - at `$")
    path = [part for part in place.rstrip("`").split(".") if part]
    unknown = re.search(r"unknown field `(.*?)`", text)
    if unknown:
        known = _keys(kind, path)
        near = difflib.get_close_matches(unknown[1], known, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
        return f"{_section(path)}{unknown[1]}: unknown key. {advice}"
    missing = re.search(r"missing required field `(.*?)`", text)
    if missing:
        return f"{_section(path)}{missing[1]}: missing. Add {missing[1]} = ... there."
    key = f"{_section(path[:-1])}{path[-1]}" if path else "top level"
    wrong = re.match(r"Expected `(.*?)`, got `(.*?)`$", text)
    if wrong:
        expected = " or ".join(_WORDS.get(word, word) for word in wrong[1].split(" | ") if word != "null")
        return f"{key}: expected {expected}, got {_WORDS.get(wrong[2], wrong[2])}. Write it as {expected}."
    return f"{key}: {text[:1].lower()}{text[1:]}. Change the value."


def _section(path: list[str]) -> str:
    return f"[{'.'.join(path)}] " if path else ""


def _keys(kind: type[msgspec.Struct], path: list[str]) -> list[str]:
    """The keys a section knows, found by walking the types along `path`."""
    for part in path:
        types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        options = [types[part], *getattr(types[part], "__args__", ())]
        kind = next(
            option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct)
        )
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def read_secret(path: str) -> str:
    """The password in a file, or "" without one. Raises ConfigError."""
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"password_file: {path} cannot be read; check the name and its permissions."
        ) from None
