"""A small JSON file of named entries that outlives the process: version floors, results of the sandbox.

Several processes may change one file at the same time (a daemon that starts beside `models verify --again`): each
change reads the file again under a lock, so that no change undoes another. A change is on disk before `update` returns.
A file that is damaged counts as empty and is reported in the log; one that another user could have written is refused,
since what it says decides which bundles run.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from edge_runtime.core.errors import ConfigError, StorageError
from edge_runtime.storage.files import check_owner, locked_folder, write_durably

_log = logging.getLogger(__name__)
T = TypeVar("T")


class RecordFile(Generic[T]):
    """Entries of type `kind` by name."""

    def __init__(self, path: Path | None, kind: type[T], *, event: str, setting: str) -> None:
        """`path` None keeps nothing. `event` begins the log's event names; errors name the key `setting`."""
        self._path = path
        self._event = event
        self._setting = setting
        self._decoder = msgspec.json.Decoder(dict[str, kind])  # type: ignore[valid-type] # a type at run time

    def read(self) -> dict[str, T]:
        """The entries; none where the file is absent or damaged. Raises ConfigError for a file of another user."""
        path = self._path
        if path is None:
            return {}
        try:
            self._check(path)
            entries: dict[str, T] = self._decoder.decode(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("event=%s_reset path=%s error=%s", self._event, path, error)
            return {}
        return entries

    def update(self, change: Callable[[dict[str, T]], dict[str, T]]) -> dict[str, T]:
        """Write what `change` makes of the entries, and return it; where it cannot be written, the log says so.

        Raises what `change` raises, and ConfigError for a file of another user.
        """
        path = self._path
        if path is None:
            return change({})
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked_folder(path.parent):
                before = self.read()
                after = change(before)
                if after != before:
                    write_durably(path, msgspec.json.encode(after))
        except OSError as error:
            _log.warning("event=%s_not_saved path=%s error=%s", self._event, path, error.strerror or error)
            return change(self.read())
        return after

    def _check(self, path: Path) -> None:
        try:
            check_owner(path.parent)
            check_owner(path)
        except StorageError as error:
            raise ConfigError(f"{self._setting}: {error}.") from None
