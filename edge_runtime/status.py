"""What `edge-runtime status` shows: the state of the daemon as JSON values, read from the running totals."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from edge_runtime import __version__
from edge_runtime.core.messages import ModelInfo, Reason
from edge_runtime.loading.model import cost_of
from edge_runtime.serving.service import Service


class CloudStatus(Protocol):
    """What is read of the way to the cloud."""

    def status(self) -> dict[str, object]: ...


@dataclass(slots=True)
class _Problem:
    why: str
    since_ns: int
    since: datetime


class Problems:
    """What is wrong now, by part, and since when; times are arguments. A part that is well again is forgotten."""

    def __init__(self) -> None:
        self._known: dict[str, _Problem] = {}

    def update(self, found: Mapping[str, str], *, now_ns: int, now: datetime) -> None:
        """Note what is wrong at this moment: part -> reason. `now_ns` is monotonic, `now` the time of the day.

        A reason that changes does not begin a new problem: the part has not been well in between.
        """
        for part in self._known.keys() - found.keys():
            del self._known[part]
        for part, why in found.items():
            known = self._known.setdefault(part, _Problem(why, now_ns, now))
            known.why = why

    def listed(self, now_ns: int) -> list[dict[str, object]]:
        """Every problem as JSON values, the longest lasting first."""
        ordered = sorted(self._known.items(), key=lambda item: item[1].since_ns)
        return [
            {
                "part": part,
                "why": problem.why,
                "since": problem.since.astimezone(UTC).isoformat(timespec="seconds"),
                "for_s": round((now_ns - problem.since_ns) / 1e9, 1),
            }
            for part, problem in ordered
        ]


def problems_of(service: Service, cloud: CloudStatus | None) -> dict[str, str]:
    """What is wrong now: part -> reason."""
    found = {}
    if service.is_draining:
        found["daemon"] = "It is draining: it answers the requests that it has, and takes no new ones."
    found |= {f"model {name}": why for name, why in service.registry.not_ready().items()}
    if cloud is not None:
        state = cloud.status()
        if not state["connected"]:
            found["cloud"] = (
                f"No connection to {state['broker']}: {state['why_not'] or 'it is being opened'}."
            )
        elif state["why_not"]:
            why = str(state["why_not"])
            found["cloud"] = f"{why[:1].upper()}{why[1:]}."
        elif state["breaker"] != "closed":
            found["cloud"] = f"It failed repeatedly; the circuit breaker is {state['breaker']}."
    disk = None if service.cache is None else service.cache.disk
    if disk is not None and not disk.is_on:
        found["cache on disk"] = f"It is off: {disk.status()['why_off']}."
    return found


def status_of(
    service: Service,
    cloud: CloudStatus | None,
    *,
    uptime_ns: int,
    addresses: Sequence[str] = (),
    problems: Sequence[Mapping[str, object]] = (),
) -> dict[str, object]:
    """The whole state. `cloud` is None on a device without one; `addresses` is empty inside a program."""
    return {
        "version": __version__,
        "state": "draining" if service.is_draining else "ready" if service.is_ready else "not ready",
        "ready": service.is_ready,
        "addresses": list(addresses),
        "problems": list(problems),
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
