"""The cases: engines, loads and callers, as values. Load is relative to what full batches can serve."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tools.simulation.arrivals import Arrivals, bursts, diurnal, merged, poisson
from tools.simulation.engine import Engine

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000

ENGINES = {
    "tiny 30 us + 2 us": Engine(30 * US, 2 * US),
    "edge 4 ms + 1 ms": Engine(4 * MS, 1 * MS),
    "edge 1 ms + 0.2 ms": Engine(1 * MS, 200 * US),
    "gpu 2 ms + 0.05 ms": Engine(2 * MS, 50 * US),
}
Source = Callable[[np.random.Generator, int], Arrivals]


@dataclass(frozen=True, slots=True)
class Case:
    """An engine and its callers. `load` is the mean offered load as a share of the engine's capacity."""

    name: str
    group: str
    engine: Engine
    load: float
    source: Source
    quiet: str | None = None
    deadline_ns: int | None = None


def _ints(times: np.ndarray) -> list[int]:
    return [int(ns) for ns in times]


def _poisson(rate: float) -> Source:
    return lambda rng, count: Arrivals(_ints(poisson(rng, count, rate)))


def _bursts(rate: float) -> Source:
    return lambda rng, count: Arrivals(_ints(bursts(rng, count, rate)))


def loads() -> list[Case]:
    """Poisson and burst arrivals on each engine."""
    found = []
    for name, engine in ENGINES.items():
        for load in (0.02, 0.1, 0.3, 0.8):
            source = _poisson(load * engine.capacity)
            found.append(Case(f"{name}, Poisson {load:.0%}", "steady", engine, load, source))
        found += [
            Case(f"{name}, bursts {load:.0%}", "bursts", engine, load, _bursts(load * engine.capacity))
            for load in (0.02, 0.1)
        ]
    return found


def changing() -> list[Case]:
    """A day's swing, an engine of uneven pace, one that slows down for good, one that pads."""
    engine = ENGINES["edge 1 ms + 0.2 ms"]
    rate = engine.capacity
    swing = Case(
        "edge 1 ms + 0.2 ms, day and night 1-70 %",
        "changing",
        engine,
        0.355,
        lambda rng, count: Arrivals(_ints(diurnal(rng, count, 0.01 * rate, 0.7 * rate))),
    )
    noisy = replace(engine, noise=0.3)
    padding = replace(ENGINES["edge 4 ms + 1 ms"], pads=True)
    return [
        swing,
        Case("the same, bursts 10 %, noise 30 %", "changing", noisy, 0.1, _bursts(0.1 * rate)),
        Case(
            "edge 4 ms + 1 ms that pads, Poisson 80 %",
            "changing",
            padding,
            0.8,
            _poisson(0.8 * padding.capacity),
        ),
    ]


def _with_slack(rate: float, choices: tuple[int, ...]) -> Source:
    def source(rng: np.random.Generator, count: int) -> Arrivals:
        slack = rng.choice(choices, count)
        return Arrivals(_ints(poisson(rng, count, rate)), slack_ns=[int(ns) for ns in slack])

    return source


def overloads() -> list[Case]:
    """Twice as many requests as can be served, with deadlines from their arrival."""
    found = []
    for name in ("edge 4 ms + 1 ms", "edge 1 ms + 0.2 ms", "gpu 2 ms + 0.05 ms"):
        engine = ENGINES[name]
        single = engine.cost_ns(1)
        rate = 2 * engine.capacity
        full = engine.cost_ns(engine.max_batch)
        found.append(
            Case(
                f"{name}, 50 t(1)",
                "overload",
                engine,
                2,
                _with_slack(rate, (50 * single,)),
                deadline_ns=50 * single,
            )
        )
        mixed = _with_slack(rate, (2 * full, 10 * full))
        found.append(
            Case(f"{name}, half 2, half 10 t(64)", "overload", engine, 2, mixed, deadline_ns=2 * full)
        )
    slowing = replace(ENGINES["edge 4 ms + 1 ms"], throttled_at_ns=5 * SECOND, throttle=2.0)
    slack = _with_slack(slowing.capacity, (250 * MS,))
    found.append(
        Case(
            "edge 4 ms + 1 ms, 100 %, half as fast after 5 s",
            "overload",
            slowing,
            1,
            slack,
            deadline_ns=250 * MS,
        )
    )
    return found


def goodput_cases() -> list[Case]:
    """One engine and one deadline over rising load, for the plot."""
    engine = ENGINES["edge 4 ms + 1 ms"]
    slack = 50 * engine.cost_ns(1)
    return [
        Case(
            f"{load:g}",
            "goodput",
            engine,
            load,
            _with_slack(load * engine.capacity, (slack,)),
            deadline_ns=slack,
        )
        for load in (0.5, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)
    ]


def _tenants(rates: dict[str, float]) -> Source:
    """Independent tenants; `count` is of all."""

    def source(rng: np.random.Generator, count: int) -> Arrivals:
        span = count / sum(rates.values())
        streams = [
            (name, poisson(rng, max(int(rate * span), 2), rate)) for name, rate in sorted(rates.items())
        ]
        return merged(streams)

    return source


def tenancy() -> list[Case]:
    """A flooding tenant (twice the capacity) beside a quiet one, and four that always have work waiting."""
    found = []
    for name, quiet_load in (("edge 4 ms + 1 ms", 0.1), ("gpu 2 ms + 0.05 ms", 0.1)):
        for most in (64, 8, 1):
            engine = replace(ENGINES[name], max_batch=most)
            quiet = quiet_load * engine.capacity
            rates = {"flood": 2 * engine.capacity, "quiet": quiet}
            found.append(
                Case(
                    f"{name}, batches of {most}, one floods",
                    "tenants",
                    engine,
                    2 + quiet_load,
                    _tenants(rates),
                    quiet="quiet",
                )
            )
    engine = ENGINES["edge 4 ms + 1 ms"]
    rates = {
        name: share * engine.capacity for name, share in (("a", 2.0), ("b", 1.0), ("c", 0.5), ("d", 0.3))
    }
    found.append(Case("edge 4 ms + 1 ms, four flood 20:10:5:3", "tenants", engine, 3.8, _tenants(rates)))
    return found


def priorities() -> list[Case]:
    """A tenth of the requests first in rank, the others last, at 90 % and at twice the capacity."""
    engine = ENGINES["edge 4 ms + 1 ms"]

    def source(load: float) -> Source:
        def made(rng: np.random.Generator, count: int) -> Arrivals:
            times = poisson(rng, count, load * engine.capacity)
            return Arrivals(_ints(times), priorities=[0 if x < 0.1 else 2 for x in rng.uniform(size=count)])

        return made

    return [
        Case(f"edge 4 ms + 1 ms, a tenth high, {load:.0%}", "priorities", engine, load, source(load))
        for load in (0.9, 2.0)
    ]
