"""One sandboxed load: a child with limits, an empty working folder and nothing inherited loads and runs a model.

A model file is parsed by a runner of a million lines, and running it may take all memory or never end. In a child
such a file costs an error message; in the daemon it would cost the device.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import msgspec

from edge_runtime.bundles.isolated_child import Finished, IsolatedChild
from edge_runtime.bundles.manifest import Manifest
from edge_runtime.bundles.stoppable import Stop
from edge_runtime.core.errors import BundleError
from edge_runtime.loading.sandbox_messages import READY, ProbeRequest, ProbeResult

_CHILD = "edge_runtime.loading.sandbox_child"
_MAX_OUTPUT_BYTES = 64 * 1024
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
    """One probe of a bundle in one child."""

    def __init__(
        self, manifest: Manifest, files: Mapping[str, bytes], *, threads: int, max_batch: int, limits: Limits
    ) -> None:
        self._manifest = manifest
        self._files = files
        self._threads = threads
        self._max_batch = max_batch
        self._limits = limits
        self.memory_bytes = limits.memory_for(files, threads, max_batch)

    def run(self, stop: Stop | None = None) -> ProbeResult | Ended:
        """Start the child, send it the bundle, wait for its result. The child has ended when this returns or raises.

        `stop` kills the child. Raises BundleError where no child can be started.
        """
        child = IsolatedChild(_CHILD, limit_s=self._limits.wall_s, max_output_bytes=_MAX_OUTPUT_BYTES)
        try:
            with (stop or Stop()).calls(child.kill):
                done = child.run(self._feed)
        except OSError as error:
            raise self._not_started(error.strerror or str(error), "try again") from None
        return self._read(done)

    def _feed(self, pipe: IO[bytes]) -> None:
        sizes = {name: len(plain) for name, plain in self._files.items()}
        request = ProbeRequest(
            self._manifest, sizes, self._threads, self._max_batch, self.memory_bytes,
            self._limits.cpu_s, self._limits.wall_s, os.getpid(),
        )  # fmt: skip
        pipe.write(msgspec.json.encode(request) + b"\n")
        for plain in self._files.values():
            pipe.write(plain)

    def _read(self, done: Finished) -> ProbeResult | Ended:
        megabytes = f"{self.memory_bytes / 1e6:.0f} MB"
        output, code = done.output, done.code
        if done.is_late:
            return Ended(f"did not answer within {self._limits.wall_s:g} s")
        if READY not in output:
            last = output.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {code}"]
            raise self._not_started(last[0][:200], "repair the installation")
        if code == 0:
            try:
                result = msgspec.json.decode(output.rpartition(READY)[2].splitlines()[-1], type=ProbeResult)
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

    def _not_started(self, why: str, advice: str) -> BundleError:
        return BundleError(
            f"bundle {self._manifest.name!r}: its first load could not be started ({why}); {advice}"
        )


def _name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
