"""TOML file -> typed value, or one sentence that names file, key, what was expected and how to correct it."""

import difflib
import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_runtime.core.errors import ConfigError

Typed = TypeVar("Typed", bound=msgspec.Struct)
_log = logging.getLogger(__name__)

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "bool": "true or false",
    "array": "a list in [ ]",
    "object": "a [section]",
    "null": "nothing",
}


@dataclass(frozen=True, slots=True)
class Renamed:
    """Former spellings that are still read, with a warning. Keys are written `section.key`.

    `keys`: former key -> key of today. `words`: key of today -> (former value -> value of today).
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def load_toml(path: Path, kind: type[Typed], renamed: Renamed | None = None) -> Typed:
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
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    if renamed is not None:
        _modernise(tree, renamed, str(path))
    return convert_tree(tree, kind, str(path))


def _modernise(tree: dict[str, Any], renamed: Renamed, where: str) -> None:
    """Move values from former keys to those of today, and put the words of today; log each. Raises ConfigError."""
    for old, new in renamed.keys.items():
        section, key = _section_of(tree, old)
        if section is None or key not in section:
            continue
        if _look_up(tree, new) is not None:
            raise ConfigError(
                f"{where}: {_title(old)} is the former name of {_title(new)}, and the file has both. "
                f"Remove {_title(old)}."
            )
        value = section.pop(key)
        target, new_key = _section_of(tree, new, create=True)
        if (
            target is not None
        ):  # else a plain value stands where the section should, and `convert_tree` says so
            target[new_key] = value
        _log.warning(
            "%s: %s is now %s; write it there, because the next release does not read the former name.",
            where, _title(old), _title(new),
        )  # fmt: skip
    for place, words in renamed.words.items():
        value = _look_up(tree, place)
        if isinstance(value, str) and value in words:
            section, key = _section_of(tree, place)
            assert section is not None
            section[key] = words[value]
            _log.warning(
                '%s: %s = "%s" is now "%s"; write that, because the next release does not read the former word.',
                where, _title(place), value, words[value],
            )  # fmt: skip


def _section_of(
    tree: dict[str, Any], place: str, *, create: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """The table that holds `place`, None where there is none, and the last part of `place`."""
    *sections, key = place.split(".")
    table: Any = tree
    for section in sections:
        table = table.setdefault(section, {}) if create else table.get(section)
        if not isinstance(table, dict):
            return None, key
    return table, key


def _look_up(tree: dict[str, Any], place: str) -> Any:
    section, key = _section_of(tree, place)
    return None if section is None else section.get(key)


def _title(place: str) -> str:
    *sections, key = place.split(".")
    return f"{_section(sections)}{key}"


def convert_tree(tree: dict[str, Any], kind: type[Typed], where: str) -> Typed:
    """Check a decoded tree against `kind`. Raises ConfigError naming `where` and the key."""
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(str(error), kind)}") from None


def check_types(value: msgspec.Struct, where: str) -> None:
    """Check a value that a program made against its own type. Raises ConfigError naming `where` and the key.

    The constructor of a Struct checks nothing: only what is converted is checked.
    """
    convert_tree(_tree(value), type(value), where)


def _tree(value: msgspec.Struct) -> dict[str, Any]:
    return {
        name: _tree(inner) if isinstance(inner, msgspec.Struct) else inner
        for name, inner in msgspec.structs.asdict(value).items()
    }


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
    in_words = re.sub(r"`(\w+)`", lambda word: _WORDS.get(word[1], word[1]), text)
    return f"{key}: {in_words[:1].lower()}{in_words[1:]}. Change the value."


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
