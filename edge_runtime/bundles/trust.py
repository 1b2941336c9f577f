"""Which signing keys are trusted, and the version floors of bundles that ran; both tiers use it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime.bundles.folder import Trust, development_key
from edge_runtime.bundles.rollback import VersionFloor, raise_floor
from edge_runtime.core.errors import ConfigError, StorageError
from edge_runtime.storage.files import check_owner
from edge_runtime.storage.record_file import RecordFile

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
            check_owner(Path(name))  # a user who can write a trusted key decides which bundles run
            with Path(name).open("rb") as file:
                keys.append(file.read(_MAX_KEY_BYTES))
        except StorageError as error:
            raise ConfigError(f"[trust] keys: {error}.") from None
        except OSError as error:
            raise ConfigError(
                f"[trust] keys: {name} cannot be read ({error.strerror}); give the .pub file that keygen wrote."
            ) from None
    return Trust(tuple(keys), allow_unsigned)


class VersionFloors:
    """The newest versions that ran, in a small file of their own that survives power cuts."""

    def __init__(self, path: Path | None) -> None:
        """Read `path`; with None the floors live as long as this object. A damaged file is logged and replaced.

        Raises ConfigError for a file or folder that another user could change.
        """
        self._file = RecordFile(path, VersionFloor, event="version_floors", setting="[trust] record")
        self._floors = self._file.read()

    def admit(self, name: str, engine: str, version: str, digest: str, signed_by: str | None) -> None:
        """Refuse an older version with BundleError; raise the floor for a newer one. Unsigned bundles have no floor.

        `engine` is the manifest's word: both formats of one version may run in turn. The new floor is on disk when
        this returns, together with those that other processes have raised meanwhile.
        """
        if signed_by is None:
            return
        candidate = VersionFloor(signed_by, int(version), digest)
        self._floors = self._file.update(
            lambda saved: raise_floor(_highest(self._floors, saved), name, engine, candidate)
        )


def _highest(known: Mapping[str, VersionFloor], saved: Mapping[str, VersionFloor]) -> dict[str, VersionFloor]:
    """What this process knows and the file holds: a file that was removed or put back lowers no floor here."""
    floors = dict(known)
    for entry, floor in saved.items():
        mine = floors.get(entry)
        if mine is None or mine.key != floor.key or mine.version <= floor.version:
            floors[entry] = floor
    return floors
