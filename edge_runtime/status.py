"""What `edge-runtime status` shows: the state of the daemon as JSON values, read from the running totals."""

import os
from pathlib import Path
from typing import Protocol

from edge_runtime import __version__
from edge_runtime.core.messages import ModelInfo, Reason
from edge_runtime.loading.model import cost_of
from edge_runtime.serving.service import Service


class CloudStatus(Protocol):
    """What is read of the way to the cloud."""

    def status(self) -> dict[str, object]: ...


def status_of(service: Service, cloud: CloudStatus | None, *, uptime_ns: int) -> dict[str, object]:
    """The whole state. `cloud` is None on a device without one."""
    return {
        "version": __version__,
        "ready": service.is_ready,
        "uptime_s": round(uptime_ns / 1e9, 1),
        "memory_mb": resident_mb(),
        "models": [_model_status(service, info) for info in service.models()],
        "answers": [
            {"model": model, "origin": origin, "reason": reason, "rows": rows}
            for (model, origin, reason), rows in sorted(service.counters.outcomes.items())
        ],
        "cache": cache_status(service),
        "cloud": None if cloud is None else cloud.status(),
    }


def _model_status(service: Service, info: ModelInfo) -> dict[str, object]:
    statistics, requests = service.statistics(info.name), service.requests(info.name)
    infer = statistics.compute_infer
    return {
        "name": info.name,
        "version": info.version,
        "platform": info.platform,
        **cost_of(info),
        "accept_threshold": info.accept_threshold,
        "requests": requests.success.count,
        "rows": requests.rows,
        "endings": dict(sorted(requests.endings.items())),
        "batches": statistics.executions,
        "mean_batch": round(infer.count / statistics.executions, 2) if statistics.executions else None,
        "waiting": service.waiting(info.name),
        "refused": statistics.refused,
        "failed_batches": statistics.faults,
        "engines_replaced": statistics.replaced,
    }


def cache_status(service: Service) -> dict[str, object] | None:
    """What both levels of the cache hold and did; None where the cache is off."""
    if service.cache is None:
        return None
    memory, disk = service.cache.memory, service.cache.disk
    statistics = [service.statistics(info.name) for info in service.models()]
    outcomes = service.counters.outcomes.items()
    return {
        "entries": len(memory),
        "bytes": memory.size_bytes,
        "hits": sum(counted.cache_hit.count for counted in statistics),
        "misses": sum(counted.cache_miss.count for counted in statistics),
        "coalesced": service.counters.coalesced,
        "stale": sum(rows for (_, _, reason), rows in outcomes if reason == Reason.STALE),
        "evictions": memory.evictions,
        "disk": None if disk is None else disk.status(),
    }


def resident_mb() -> float | None:
    """Resident memory of this process in MB; None where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
