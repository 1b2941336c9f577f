"""What callers got and what it cost: one row of the table for each case and policy."""

import sys
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tools.simulation.arrivals import Arrivals, only
from tools.simulation.cases import Case
from tools.simulation.policies import rules
from tools.simulation.replay import Outcome, Rule, replay


@dataclass(frozen=True, slots=True)
class Measured:
    """Times in milliseconds, shares from 0 to 1; None where a case has no such figure.

    `goodput` is answers in time per time, as a share of what full batches can serve; `refusal_p50_ms` and `refusal_p99_ms` are the
    time from arrival to refusal; `jain` is Jain's index of the engine time of
    tenants while all had work waiting; `quiet_alone_ms` is the p99 of the quiet tenant without the others;
    `bound_ms` is the rest of a running full batch plus a full batch of its own: the least that full batches allow.
    """

    case: str
    group: str
    policy: str
    p50_ms: float
    p99_ms: float
    mean_ms: float
    mean_batch: float
    duty: float
    goodput: float
    late: float
    refused: float
    refusal_p50_ms: float | None = None
    refusal_p99_ms: float | None = None
    jain: float | None = None
    quiet_p99_ms: float | None = None
    quiet_alone_ms: float | None = None
    quiet_refused: float | None = None
    bound_ms: float | None = None
    high_p99_ms: float | None = None
    low_p99_ms: float | None = None


def seed_of(case: Case, seed: int) -> list[int]:
    """Each case has its own stream, whatever others are run."""
    return [seed, zlib.crc32(case.name.encode())]


def arrivals_of(case: Case, count: int, seed: int) -> Arrivals:
    """The same requests for every policy."""
    return case.source(np.random.default_rng(seed_of(case, seed)), count)


def latencies_ms(outcome: Outcome, arrivals: Arrivals) -> NDArray[np.float64]:
    """Of each request, NaN where it was refused."""
    finished = np.array(outcome.finished_ns, np.float64)
    return np.where(finished > 0, finished - np.array(arrivals.times_ns), np.nan) / 1e6


def measured(case: Case, policy: str, arrivals: Arrivals, outcome: Outcome) -> Measured:
    latency = latencies_ms(outcome, arrivals)
    answered = latency[~np.isnan(latency)]
    times = np.array(arrivals.times_ns)
    span_ns = outcome.end_ns - times[0]
    in_time = answered
    if arrivals.slack_ns:
        in_time = latency[latency <= np.array(arrivals.slack_ns) / 1e6]
    refused_ns = np.array(outcome.refused_ns)
    refusals = (refused_ns - times)[refused_ns > 0] / 1e6
    tenants = np.array(arrivals.tenants)
    levels = np.array(arrivals.priorities)
    quiet = tenants == case.quiet if case.quiet else np.zeros(0, bool)
    is_ranked = case.group == "priorities"
    return Measured(
        case.name,
        case.group,
        policy,
        *[float(np.percentile(answered, q)) for q in (50, 99)],
        float(answered.mean()),
        float(np.mean(outcome.sizes)),
        float(outcome.busy_ns / span_ns),
        float(len(in_time) / _could_serve(case, int(times[0]), outcome.end_ns)),
        1 - len(in_time) / len(answered),
        len(refusals) / len(times),
        *([float(np.percentile(refusals, q)) for q in (50, 99)] if len(refusals) else (None, None)),
        jain=_jain(tenants, outcome, int(times[-1])) if len(tenants) else None,
        quiet_p99_ms=float(np.nanpercentile(latency[quiet], 99)) if case.quiet else None,
        quiet_refused=float((refused_ns[quiet] > 0).mean()) if case.quiet else None,
        bound_ms=1.99 * case.engine.cost_ns(case.engine.max_batch) / 1e6 if case.quiet else None,
        high_p99_ms=float(np.nanpercentile(latency[levels == 0], 99)) if is_ranked else None,
        low_p99_ms=float(np.nanpercentile(latency[levels == 2], 99)) if is_ranked else None,
    )


def _could_serve(case: Case, from_ns: int, to_ns: int) -> float:
    """Requests that full batches could have served, with the engine as fast as it was."""
    engine = case.engine
    slow_ns = 0 if engine.throttled_at_ns is None else max(to_ns - engine.throttled_at_ns, 0)
    return (to_ns - from_ns - slow_ns * (1 - 1 / engine.throttle)) * engine.capacity


def _jain(tenants: NDArray[np.str_], outcome: Outcome, until_ns: int) -> float:
    """(sum x)^2 / (n * sum x^2) of engine times up to the last arrival; 1 is even (Jain, Chiu and Hawe 1984)."""
    counted = np.array(outcome.finished_ns) <= until_ns
    spent = np.array(outcome.engine_ns) * counted
    each = np.array([spent[tenants == name].sum() for name in np.unique(tenants)])
    return float(each.sum() ** 2 / (len(each) * max((each**2).sum(), 1.0)))


def _alone_ms(tenant: str, case: Case, arrivals: Arrivals, rule: Rule, seed: int) -> float:
    alone = only(arrivals, tenant)
    return float(np.nanpercentile(latencies_ms(replay(rule, case.engine, alone, seed), alone), 99))


def measure(
    cases: Iterable[Case], count: int, seed: int, policies: Collection[str] | None = None
) -> list[Measured]:
    """Run every case under each of its policies, or those of them that are named; progress on stderr."""
    found = []
    for case in cases:
        arrivals = arrivals_of(case, count, seed)
        for policy, make in rules(case).items():
            if policies is not None and policy not in policies:
                continue
            if sys.stderr.isatty():
                print(f"\r\x1b[K{case.name}: {policy}", end="", file=sys.stderr)
            row = measured(case, policy, arrivals, replay(make(), case.engine, arrivals, seed))
            if case.quiet is not None:
                row = replace(row, quiet_alone_ms=_alone_ms(case.quiet, case, arrivals, make(), seed))
            found.append(row)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return found
