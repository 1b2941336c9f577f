"""Which signing keys are trusted, and the version floors of bundles that ran; both tiers use it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_runtime.bundles.folder import Trust, development_key
from edge_runtime.bundles.rollback import VersionFloor, raise_floor
from edge_runtime.core.errors import ConfigError
from edge_runtime.storage.files import write_durably

_log = logging.getLogger(__name__)
_MAX_KEY_BYTES = 4096


def read_trust(key_files: Sequence[str], *, allow_unsigned: bool) -> Trust:
    """Read public keys; if `key_files` is empty, only the project's development key is trusted. Raises ConfigError."""
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


class VersionFloors:
    """The newest versions that ran, in a small file of their own that survives power cuts."""

    def __init__(self, path: Path | None) -> None:
        """Read `path`; with None the floors live as long as this object. A damaged file is logged and replaced."""
        self._path = path
        self._floors: dict[str, VersionFloor] = {}
        if path is None:
            return
        try:
            self._floors = msgspec.json.decode(path.read_bytes(), type=dict[str, VersionFloor])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("event=version_floors_reset path=%s error=%s", path, error)

    def admit(self, name: str, engine: str, version: str, digest: str, signed_by: str | None) -> None:
        """Refuse an older version with BundleError; raise the floor for a newer one. Unsigned bundles have no floor.

        `engine` is the manifest's word: both formats of one version may run in turn.
        """
        if signed_by is None:
            return
        floors = raise_floor(self._floors, name, engine, VersionFloor(signed_by, int(version), digest))
        if floors == self._floors:
            return
        self._floors = floors
        if self._path is not None:
            try:
                write_durably(self._path, msgspec.json.encode(floors))
            except OSError as error:
                _log.warning("event=version_floors_not_saved path=%s error=%s", self._path, error.strerror)
