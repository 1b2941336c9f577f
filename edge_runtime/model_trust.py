"""From a configuration's key files to the trust that loading a bundle asks for; both tiers use it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.bundle import Trust, development_key
from edge_runtime.core.errors import ConfigError

_log = logging.getLogger(__name__)
_MAX_KEY_BYTES = 4096


def read_trust(key_files: Sequence[str], *, allow_unsigned: bool) -> Trust:
    """Read the keys; without any, the project's development key is the one trusted. Raises ConfigError."""
    if allow_unsigned:
        _log.warning("event=unsigned_bundles_allowed")
    if not key_files:
        return Trust((development_key(),), allow_unsigned)
    keys = []
    for name in key_files:
        try:
            with Path(name).open("rb") as file:
                keys.append(file.read(_MAX_KEY_BYTES))
        except OSError as error:
            raise ConfigError(
                f"[trust] keys: {name} cannot be read ({error.strerror}); give the .pub file that keygen wrote."
            ) from None
    return Trust(tuple(keys), allow_unsigned)
