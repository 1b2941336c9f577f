"""The child in which a model is loaded and run for the first time: it limits itself, tries, and reports.

Started by `sandbox` with the bundle on standard input; imported by nothing else at run time. Linux and macOS only.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.prepare import measure_latency_profile, prepare, run_every_shape, unfit
from edge_runtime.loading.sandbox_messages import READY, Question, Report, Verdict

_PDEATHSIG = 1  # of prctl(2)
#: How runners say that memory was refused: C++, ONNX Runtime's allocators, Rust.
_NO_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "Failed to allocate memory",
    "memory allocation of",
    "out of memory",
)


def main() -> None:
    """Answer the question on standard input."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    limit_process(question)
    with suppress(OSError):
        Path.cwd().rmdir()  # nothing can be made in it now, nor is it left behind by a parent that was killed
    engine_version(question.manifest.engine)  # imports the runner, which is not the model's cost
    before_bytes = resident_bytes()
    limit_memory(question.memory_bytes)
    os.write(1, READY)
    files = {name: sys.stdin.buffer.read(size) for name, size in question.sizes.items()}
    sys.stdin.close()
    verdict = attempt(
        question.manifest,
        files,
        threads=question.threads,
        max_batch=question.max_batch,
        before_bytes=before_bytes,
    )
    os.write(1, msgspec.json.encode(verdict) + b"\n")
    os._exit(0)  # whatever the model left behind must not run at exit


def attempt(
    manifest: Manifest, files: Mapping[str, bytes], *, threads: int, max_batch: int, before_bytes: int
) -> Verdict:
    """Load and run a model in this process, as the daemon would and in every shape and batch it may."""
    try:
        started_ns = time.perf_counter_ns()
        prepared = prepare(manifest, files, threads=threads, max_batch=max_batch)
        load_ns = time.perf_counter_ns() - started_ns
        try:
            latency_profile = measure_latency_profile(prepared)
            run_every_shape(prepared)
        except EngineFailed as error:
            raise unfit(manifest, error) from error
    except (BundleError, MemoryError) as error:
        return Verdict(is_out_of_memory=True) if _is_out_of_memory(error) else Verdict(refusal=str(error))
    engine = prepared.engine
    return Verdict(
        Report(
            load_ns=load_ns,
            memory_bytes=max(0, peak_bytes() - before_bytes),
            latency_profile=latency_profile,
            max_batch=engine.max_batch,
            is_batch_invariant=engine.is_batch_invariant,
            batch_note=prepared.batch_note,
        )
    )


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was refused somewhere below: our own sentences shorten the runners'."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def limit_process(question: Question) -> None:
    """Bound processor and wall time, files and descriptors, and end with the parent."""
    _limit(resource.RLIMIT_CPU, question.cpu_s, question.cpu_s + 1)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, 64, 64)
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGXCPU))
    # The parent's own clock comes first; this one is for a child whose parent was killed.
    signal.setitimer(signal.ITIMER_REAL, question.wall_s + 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != question.parent:
        os._exit(1)


def limit_memory(more_bytes: int) -> None:
    """Let this process map `more_bytes` beyond what it has mapped; macOS has no such limit."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + more_bytes
    _limit(resource.RLIMIT_AS, limit, limit)


def resident_bytes() -> int:
    """Memory this process has now, or where the system does not tell, the most it had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most memory this process had. getrusage counts the parent's too on Linux, from before exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _limit(which: int, soft: int, hard: int) -> None:
    """Lower a limit; never above what whoever started us allows."""
    _, allowed = resource.getrlimit(which)
    if allowed != resource.RLIM_INFINITY:
        soft, hard = min(soft, allowed), min(hard, allowed)
    try:
        resource.setrlimit(which, (soft, hard))
    except (ValueError, OSError):  # macOS refuses some; the parent's clock remains
        return
