"""Start a Python child that inherits nothing: the one launcher for the signature check and the sandbox.

What a child could inherit decides which code it runs: a `json.py` in the working directory, PYTHONPATH, a user's
site-packages, LD_PRELOAD. Therefore it starts with `-I -S -B` in a new empty folder, with library paths as its only
environment and no descriptor but its three pipes. The standard library comes first on its path, from where the
interpreter itself finds it; after that this package and the absolute paths of the parent, without the parent's working
directory, so that no file can take the place of a module.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PACKAGES = Path(__file__).resolve().parent.parent.parent
#: Systems differ in where libraries are found (Jetson, Nix); the child gets nothing else of the environment.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")
#: One memory arena and no idle threads: each would map 64 MiB that it never uses.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Finished:
    """How a child ended. `output` is what it wrote to both its pipes; `code` is negative for a signal."""

    output: bytes
    code: int
    is_late: bool
    is_killed: bool


class IsolatedChild:
    """One child. Call `run` once, from one thread; `kill` from any."""

    def __init__(self, module: str, *, limit_s: float, max_output_bytes: int) -> None:
        """`module` is the child's program: its function `main` is called. `limit_s` bounds its wall time."""
        self._program = program_of(module)
        self._limit_s = limit_s
        self._max_output_bytes = max_output_bytes
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._is_late = False

    def run(self, feed: Callable[[IO[bytes]], None]) -> Finished:
        """Start the child, let `feed` write to its input in a thread, wait for its end.

        The child has ended when this returns or raises. One that writes more than `max_output_bytes` is killed.
        Raises OSError where no child can be started.
        """
        with tempfile.TemporaryDirectory(prefix="edge-runtime-child-") as folder:
            child = self._start(folder)
            clock = threading.Timer(self._limit_s, self._be_late)
            feeder = threading.Thread(target=_feed, args=(feed, child.stdin), daemon=True)
            clock.daemon = True
            try:
                clock.start()
                feeder.start()
                assert child.stdout is not None
                output = child.stdout.read(self._max_output_bytes)
                if len(output) == self._max_output_bytes:
                    child.kill()
                child.wait()
            finally:
                clock.cancel()
                child.kill()
                child.wait()
                feeder.join()
                assert child.stdout is not None
                child.stdout.close()
        return Finished(output, child.returncode, self._is_late, self._is_killed)

    def kill(self) -> None:
        """Kill the child now, or as soon as it starts; `run` then returns."""
        with self._lock:
            self._is_killed = True
            if self._child is not None:
                self._child.kill()

    def _start(self, folder: str) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with self._lock:
            self._child = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-I", "-S", "-B", "-c", self._program, *import_paths()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                cwd=folder, env=environment | _ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
            if self._is_killed:
                self._child.kill()
            return self._child

    def _be_late(self) -> None:
        self._is_late = True
        self.kill()


def program_of(module: str) -> str:
    """The text of the child's program: extend the path, never replace the standard library, call `main`."""
    return f"import sys; sys.path += sys.argv[1:]; from {module} import main; main()"


def import_paths() -> list[str]:
    """Where a child finds packages after the standard library.

    A relative path would be read from the child's folder, and the working directory may be a download: both are left
    out, unless this very package runs from there (a source checkout).
    """
    try:
        here = os.path.realpath(Path.cwd())
    except OSError:  # it was removed: nothing can be read from it
        here = ""
    paths = [str(_PACKAGES)]
    paths += [path for path in sys.path if Path(path).is_absolute() and os.path.realpath(path) != here]
    return list(dict.fromkeys(paths))


def leave_folder() -> None:
    """Called by a child: remove the folder it was started in.

    Nothing can be made in it from then on, and a parent that is killed leaves nothing behind.
    """
    with suppress(OSError):
        Path.cwd().rmdir()


def _feed(feed: Callable[[IO[bytes]], None], pipe: IO[bytes]) -> None:
    with suppress(OSError), pipe:  # the output of a child that ended early says why
        feed(pipe)
