"""Whose bundles are loaded, and which versions of them; both tiers use it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_runtime.bundles.folder import Trust, development_key
from edge_runtime.bundles.rollback import Seen, admit
from edge_runtime.core.errors import ConfigError
from edge_runtime.storage.files import write_durably

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


class VersionRecord:
    """The newest versions that ran, in a small file of its own that survives power cuts."""

    def __init__(self, path: Path | None) -> None:
        """Read `path`; None remembers nothing. A file that cannot be read is said aloud and begun anew."""
        self._path = path
        self._seen: dict[str, Seen] = {}
        if path is None:
            return
        try:
            self._seen = msgspec.json.decode(path.read_bytes(), type=dict[str, Seen])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("event=version_record_reset path=%s error=%s", path, error)

    def admit(self, name: str, engine: str, version: str, digest: str, signed_by: str | None) -> None:
        """Refuse an older version with BundleError; remember a newer one. Unsigned bundles have no history.

        `engine` is the manifest's word: both formats of one version may run by turns.
        """
        if signed_by is None:
            return
        now = admit(self._seen, name, engine, Seen(signed_by, int(version), digest))
        if now == self._seen:
            return
        self._seen = now
        if self._path is not None:
            try:
                write_durably(self._path, msgspec.json.encode(now))
            except OSError as error:
                _log.warning("event=version_record_not_kept path=%s error=%s", self._path, error.strerror)


def trials_path(record: Path | None) -> Path | None:
    """Where what came of trials is kept: beside the record of versions, and like it not at all for None."""
    return None if record is None else record.with_suffix(".trials.json")
