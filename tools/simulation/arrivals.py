"""The arrivals of a case: times, tenants, priorities and deadlines. Rates are requests per nanosecond."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests in order of time; nanoseconds. `slack_ns`, `tenants` and `priorities` are empty if the case has none."""

    times_ns: list[int]
    slack_ns: list[int] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)


def poisson(rng: np.random.Generator, count: int, rate: float) -> NDArray[np.float64]:
    """Independent requests."""
    return np.cumsum(rng.exponential(1 / rate, count))


def bursts(
    rng: np.random.Generator, count: int, rate: float, mean_size: float = 8, spread_ns: float = 200_000
) -> NDArray[np.float64]:
    """Bursts that begin independently, of geometric size, each spread evenly over `spread_ns`."""
    sizes = rng.geometric(1 / mean_size, count)  # more than needed
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), count)) + 1]
    begins = poisson(rng, len(sizes), rate / mean_size)
    times = np.repeat(begins, sizes) + rng.uniform(0, spread_ns, int(sizes.sum()))
    return np.sort(times)[:count]


def diurnal(
    rng: np.random.Generator, count: int, quiet_rate: float, busy_rate: float, days: int = 4
) -> NDArray[np.float64]:
    """A rate that swings as a sine between two values, `days` times; thinned from the busy rate (Lewis and Shedler)."""
    span = count / ((quiet_rate + busy_rate) / 2)
    times = poisson(rng, int(busy_rate * span * 1.05), busy_rate)
    rate = quiet_rate + (busy_rate - quiet_rate) * (1 - np.cos(2 * np.pi * days * times / span)) / 2
    return times[rng.uniform(0, busy_rate, len(times)) < rate][:count]


def merged(streams: Sequence[tuple[str, NDArray[np.float64]]]) -> Arrivals:
    """Several tenants' `(name, times)` as one, up to the end of the shortest."""
    end = min(times[-1] for _, times in streams)
    times = np.concatenate([times for _, times in streams])
    source = np.repeat(np.arange(len(streams)), [len(times) for _, times in streams])
    order = np.argsort(times, kind="stable")
    order = order[times[order] <= end]
    return Arrivals(
        [int(ns) for ns in times[order]],
        tenants=[streams[k][0] for k in source[order]],
    )


def only(arrivals: Arrivals, tenant: str) -> Arrivals:
    """The requests of one tenant, at their times."""
    kept = [i for i, name in enumerate(arrivals.tenants) if name == tenant]
    return Arrivals([arrivals.times_ns[i] for i in kept], tenants=[tenant] * len(kept))
