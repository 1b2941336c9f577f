"""The child of the sandbox: it limits itself, loads and runs a model, and reports the result.

`sandbox` starts it with the bundle on standard input; nothing else imports it at run time. Linux and macOS only.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_runtime.bundles.isolated_child import leave_folder
from edge_runtime.bundles.manifest import Manifest
from edge_runtime.core.errors import BundleError, EngineFailed
from edge_runtime.engines.build import engine_version
from edge_runtime.loading.prepare import prepare, unfit
from edge_runtime.loading.sandbox_messages import READY, ProbeRequest, ProbeResult, Report
from edge_runtime.loading.self_test import measure_latency_profile, run_every_shape

_PDEATHSIG = 1  # of prctl(2)
#: The words with which runners report that memory was refused: C++, the allocators of ONNX Runtime, Rust.
_NO_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "Failed to allocate memory",
    "memory allocation of",
    "out of memory",
)


def main() -> None:
    """Serve the one request on standard input."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=ProbeRequest)
    limit_process(request)
    leave_folder()
    engine_version(request.manifest.engine)  # imports the runner, whose memory is no cost of the model
    before_bytes = resident_bytes()
    limit_memory(request.memory_bytes)
    os.write(1, READY)
    files = {name: sys.stdin.buffer.read(size) for name, size in request.sizes.items()}
    sys.stdin.close()
    result = probe(
        request.manifest,
        files,
        threads=request.threads,
        max_batch=request.max_batch,
        before_bytes=before_bytes,
    )
    os.write(1, msgspec.json.encode(result) + b"\n")
    os._exit(0)  # no exit handler or thread that the model left behind may run


def probe(
    manifest: Manifest, files: Mapping[str, bytes], *, threads: int, max_batch: int, before_bytes: int
) -> ProbeResult:
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
        return (
            ProbeResult(is_out_of_memory=True)
            if _is_out_of_memory(error)
            else ProbeResult(refusal=str(error))
        )
    engine = prepared.engine
    return ProbeResult(
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
    """Whether any cause of `error` is refused memory: our own sentences cut the runner's words."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def limit_process(request: ProbeRequest) -> None:
    """Bound processor and wall time, files and descriptors; the kernel ends this process with its parent."""
    _limit(resource.RLIMIT_CPU, request.cpu_s, request.cpu_s + 1)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, 64, 64)
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGXCPU))
    # The clock of the parent is earlier; this one is for a child whose parent was killed.
    signal.setitimer(signal.ITIMER_REAL, request.wall_s + 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.parent:
        os._exit(1)


def limit_memory(more_bytes: int) -> None:
    """Let this process map `more_bytes` beyond what it has mapped already; macOS has no such limit."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + more_bytes
    _limit(resource.RLIMIT_AS, limit, limit)


def resident_bytes() -> int:
    """Resident memory of this process, or its peak where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Peak resident memory of this process. On Linux getrusage includes that of the parent, from before exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _limit(which: int, soft: int, hard: int) -> None:
    """Lower a limit, never above the hard limit that this process inherited."""
    _, allowed = resource.getrlimit(which)
    if allowed != resource.RLIM_INFINITY:
        soft, hard = min(soft, allowed), min(hard, allowed)
    try:
        resource.setrlimit(which, (soft, hard))
    except (ValueError, OSError):  # macOS refuses some limits; the clock of the parent remains
        return
