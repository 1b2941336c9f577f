"""One sandboxed load: a child with limits, an empty working folder and nothing inherited loads and runs a model.

A model file is parsed by a runner of a million lines, and running it may take all memory or never end. In a child
such a file costs an error message; in the daemon it would cost the device.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import BundleError
from edge_runtime.loading.sandbox_messages import READY, ProbeRequest, ProbeResult

_MAX_OUTPUT_BYTES = 64 * 1024
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; from edge_runtime.loading.sandbox_child import main; main()"
)
#: Systems differ in where libraries are found (Jetson, Nix); the child gets nothing else of the environment.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")
#: One memory arena and no idle threads: each would map 64 MiB that it never uses.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_OUT_OF_MEMORY = (b"bad_alloc", b"memory allocation of", b"MemoryError")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the child may use at most. `memory_bytes` is beyond the runner's own; None: by the size of the payloads."""

    cpu_s: int = 30
    wall_s: float = 60.0
    memory_bytes: int | None = None

    def memory_for(self, files: Mapping[str, bytes], threads: int, max_batch: int) -> int:
        """Bytes that may be mapped to load `files` and to run them.

        Int8 weights that a graph widens once are held six times: file, copy, four bytes for each. An encoder
        with rows of 64 tokens took 8.8 MB for each row of a batch, a small model next to nothing; the start of the
        runner takes 10 MB, and each thread a stack.
        """
        if self.memory_bytes is not None:
            return self.memory_bytes
        return 8 * sum(map(len, files.values())) + ((96 + 12 * max_batch + 16 * threads) << 20)


@dataclass(frozen=True, slots=True)
class Ended:
    """The child ended without a result; `reason` completes the sentence "the model ..."."""

    reason: str
    is_memory: bool = False


def is_possible() -> bool:
    """Whether this system can limit a child."""
    return sys.platform != "win32"


class SandboxedLoad:
    """One child. `run` from one thread, `kill` from any."""

    def __init__(
        self, manifest: Manifest, files: Mapping[str, bytes], *, threads: int, max_batch: int, limits: Limits
    ) -> None:
        self._manifest = manifest
        self._files = files
        self._threads = threads
        self._max_batch = max_batch
        self._limits = limits
        self.memory_bytes = limits.memory_for(files, threads, max_batch)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._is_late = False

    def run(self) -> ProbeResult | Ended:
        """Start the child, send it the bundle, wait for its result. The child has ended when this returns or raises.

        Raises BundleError where no child can be started.
        """
        with tempfile.TemporaryDirectory(prefix="edge-runtime-sandbox-") as folder:
            child = self._start(folder)
            clock = threading.Timer(self._limits.wall_s, self._be_late)
            feeder = threading.Thread(target=self._feed, args=(child.stdin,), daemon=True)
            clock.daemon = True
            try:
                clock.start()
                feeder.start()
                assert child.stdout is not None
                output = child.stdout.read(_MAX_OUTPUT_BYTES)
                if len(output) == _MAX_OUTPUT_BYTES:
                    child.kill()
                child.wait()
            finally:
                clock.cancel()
                child.kill()
                child.wait()
                feeder.join()
                assert child.stdout is not None
                child.stdout.close()
        return self._read(output, child.returncode)

    def kill(self) -> None:
        """Kill the child now, or as soon as it starts; `run` then returns Ended."""
        with self._lock:
            self._is_killed = True
            if self._child is not None:
                self._child.kill()

    def _start(self, folder: str) -> "subprocess.Popen[bytes]":
        # The same packages as here, and none from the working folder or the user's own site.
        paths = [
            str(Path(__file__).parent.parent.parent),
            *(path for path in sys.path if Path(path).is_absolute()),
        ]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with self._lock:
            try:
                self._child = subprocess.Popen(  # noqa: S603 - our own program
                    [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, *paths],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    cwd=folder, env=environment | _ENVIRONMENT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise BundleError(
                    f"bundle {self._manifest.name!r}: its first load could not be started ({error.strerror}); try again"
                ) from None
            if self._is_killed:
                self._child.kill()
            return self._child

    def _be_late(self) -> None:
        self._is_late = True
        self.kill()

    def _feed(self, pipe: IO[bytes]) -> None:
        sizes = {name: len(plain) for name, plain in self._files.items()}
        request = ProbeRequest(
            self._manifest, sizes, self._threads, self._max_batch, self.memory_bytes,
            self._limits.cpu_s, self._limits.wall_s, os.getpid(),
        )  # fmt: skip
        with suppress(OSError), pipe:  # the output of a child that ended early says why
            pipe.write(msgspec.json.encode(request) + b"\n")
            for plain in self._files.values():
                pipe.write(plain)

    def _read(self, output: bytes, code: int) -> ProbeResult | Ended:
        megabytes = f"{self.memory_bytes / 1e6:.0f} MB"
        if self._is_late:
            return Ended(f"did not answer within {self._limits.wall_s:g} s")
        if READY not in output and not self._is_killed:
            last = output.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {code}"]
            raise BundleError(
                f"bundle {self._manifest.name!r}: its first load could not be started ({last[0][:200]}); "
                "repair the installation"
            )
        if code == 0:
            try:
                result = msgspec.json.decode(
                    output.rpartition(b"ready\n")[2].splitlines()[-1], type=ProbeResult
                )
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, IndexError):
                return Ended("left without an answer")
            return (
                Ended(f"needed more than {megabytes} of memory", True) if result.is_out_of_memory else result
            )
        if code == -signal.SIGXCPU:
            return Ended(f"used more than {self._limits.cpu_s} s of processor time")
        if any(words in output for words in _OUT_OF_MEMORY):
            return Ended(f"needed more than {megabytes} of memory", True)
        return Ended(f"crashed the runner ({_name(code)})")


def _name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
