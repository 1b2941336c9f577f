"""Ids: the names of tenants, devices, workers, groups, models and the files of a bundle. One rule for all of them.

An id is a level of a topic, a file name and a part of a path of the HTTP API, so it holds no separator of any of them
and is never "..".
"""

import re

from edge_runtime.core.errors import InvalidRequest

#: The rule as people read it, for messages.
RULE = (
    "lower-case letters, digits, '.', '_' and '-', at most 64, beginning with a letter or digit, without '..'"
)
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_id(name: str) -> bool:
    """Whether a name is an id."""
    return _ID.fullmatch(name) is not None and ".." not in name


def checked_id(what: str, name: str) -> str:
    """Return `name`. Raises InvalidRequest naming `what`, but never the name, unless it is an id."""
    if not is_id(name):
        raise InvalidRequest(f"The {what} is not an id; use {RULE}.")
    return name


def id_from(text: str, otherwise: str) -> str:
    """An id made of any text, such as a host name; `otherwise` where no character of it may stand in an id."""
    made = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]", "-", text.lower()))
    return made.lstrip("._-")[:64].rstrip("._-") or otherwise
