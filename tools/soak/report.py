"""The result of a soak: figures, broken promises, and both in words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.soak.account import Account, growth

#: Memory at rest may grow by this part between the first and the last cycles after the warm-up.
MAX_GROWTH = 0.05


@dataclass
class Report:
    """What a soak measured. `memory_mb` has the memory at rest after each cycle, for each program."""

    seed: int
    account: Account
    seconds: float = 0.0
    capacity_rows_s: float = 0.0
    rows_asked: int = 0  # in cycles, as are the seconds
    rows_answered: int = 0
    held_back: int = 0
    single_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    cloud_back_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    memory_mb: dict[str, list[float]] = field(default_factory=dict)
    warm: int = 1

    def conclude(self) -> None:
        """Judge what can only be judged at the end."""
        for name, series in self.memory_mb.items():
            grown = growth(series, self.warm)
            if grown > MAX_GROWTH:
                self.account.breach(
                    "memory is flat",
                    f"{name} grew by {grown:.1%}: {', '.join(f'{mb:.1f}' for mb in series)} MB",
                )

    def in_capacities(self, rows: int) -> float:
        """Rows per second of traffic, in multiples of the measured capacity."""
        return rows / self.seconds / self.capacity_rows_s if self.seconds and self.capacity_rows_s else 0.0

    @property
    def holds(self) -> bool:
        return not self.account.breaches

    def as_json(self) -> dict[str, Any]:
        account = self.account
        return {
            "holds": self.holds,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "capacity_rows_s": round(self.capacity_rows_s),
            "offered": round(self.in_capacities(self.rows_asked), 2),
            "answered": round(self.in_capacities(self.rows_answered), 2),
            "callers": sum(account.endings.values()),
            "held_back": self.held_back,
            "endings": {f"{kind}: {how}": count for (kind, how), count in sorted(account.endings.items())},
            "rows": {"asked": account.rows_asked, "answered": account.rows_answered, **account.origins},
            "single_ms": quantiles_ms(self.single_s),
            "health_ms": quantiles_ms(self.health_s),
            "own_lag_ms": quantiles_ms(self.lag_s),
            "cloud_back_s": [round(seconds, 1) for seconds in self.cloud_back_s],
            "faults": dict(self.faults),
            "memory_mb": {name: [round(mb, 1) for mb in series] for name, series in self.memory_mb.items()},
            "growth": {name: round(growth(series, self.warm), 4) for name, series in self.memory_mb.items()},
            "breaches": dict(account.breaches),
            "examples": account.examples,
        }


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    places = {"p50": len(ordered) // 2, "p99": min(len(ordered) - 1, len(ordered) * 99 // 100), "max": -1}
    return {name: round(1000 * ordered[place], 1) for name, place in places.items()}


def in_words(report: Report) -> str:
    """The summary for people."""
    account = report.account
    ways: Counter[str] = Counter()
    for (_, how), count in account.endings.items():
        ways[how] += count
    asked, answered = report.in_capacities(report.rows_asked), report.in_capacities(report.rows_answered)
    origins = ", ".join(f"{origin} {rows}" for origin, rows in account.origins.most_common())
    back_s = max(report.cloud_back_s, default=float("nan"))
    figures = {
        "load": f"{report.seconds:.0f} s, seed {report.seed}, {sum(ways.values())} callers",
        "capacity": f"{report.capacity_rows_s:.0f} rows/s; asked {asked:.1f}, answered {answered:.2f} times as many",
        "callers": ", ".join(f"{how} {count}" for how, count in ways.most_common()),
        "held back": f"{report.held_back} callers, for want of connections",
        "rows": f"asked {account.rows_asked}, answered {account.rows_answered}: {origins}",
        "single": _milliseconds(report.single_s),
        "liveness": _milliseconds(report.health_s),
        "own lag": _milliseconds(report.lag_s),
        "faults": ", ".join(f"{kind} {count}" for kind, count in sorted(report.faults.items())),
        "cloud": f"answered again within {back_s:.1f} s after each cycle",
    }
    for name, series in report.memory_mb.items():
        if len(series) > report.warm:
            grown = growth(series, report.warm)
            figures[name] = (
                f"{series[report.warm]:.1f} MB after the warm-up, {series[-1]:.1f} at the end ({grown:+.1%})"
            )
    lines = [f"{name:10}{figure}" for name, figure in figures.items()]
    for promise, count in account.breaches.most_common():
        lines += [
            f"BROKEN    {promise}: {count} times",
            *(f"          {e}" for e in account.examples[promise]),
        ]
    lines.append("every promise was kept" if report.holds else "promises were broken")
    return "\n".join(lines)


def _milliseconds(seconds: Sequence[float]) -> str:
    return ", ".join(f"{name} {ms} ms" for name, ms in quantiles_ms(seconds).items()) or "none"
