"""The discrete-event loop: one engine, one policy, one stream of requests, a clock that jumps from event to event."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edge_runtime.core.scheduling.scheduler import NORMAL, Action, Dispatch, Refuse
from tools.simulation.arrivals import Arrivals
from tools.simulation.engine import Engine

_NEVER = 1 << 62


class Rule(Protocol):
    """A policy; `edge_runtime.core.scheduling.scheduler.Scheduler` is one."""

    def submit(
        self,
        now_ns: int,
        request_id: int,
        lane: Hashable,
        *,
        deadline_ns: int | None = None,
        tenant: str = "",
        priority: int = NORMAL,
    ) -> Refuse | None: ...

    def poll(self, now_ns: int) -> list[Action]: ...

    def batch_done(self, now_ns: int, batch_id: int, duration_ns: int | None = None) -> None: ...

    def next_wakeup_ns(self) -> int | None: ...


@dataclass(slots=True)
class Outcome:
    """The fate of each request, by its number; nanoseconds, 0 for events that did not happen."""

    finished_ns: list[int]
    refused_ns: list[int]
    engine_ns: list[float]  # its part of its batch's time
    sizes: list[int] = field(default_factory=list)  # of batches, in order
    busy_ns: int = 0
    end_ns: int = 0


def replay(rule: Rule, engine: Engine, arrivals: Arrivals, seed: int) -> Outcome:
    """Let `rule` serve all arrivals. At equal times, the end of a batch comes before an arrival."""
    rng = np.random.default_rng(seed)
    times, slack = arrivals.times_ns, arrivals.slack_ns
    tenants, priorities = arrivals.tenants, arrivals.priorities
    count = len(times)
    outcome = Outcome([0] * count, [0] * count, [0.0] * count)
    running: Dispatch | None = None
    began = end = wake = _NEVER
    at = 0
    while True:
        arrival = times[at] if at < count else _NEVER
        now = min(arrival, end, wake)
        if now == _NEVER:
            break
        if end == now and running is not None:
            for number in running.ids:
                outcome.finished_ns[number] = now
            rule.batch_done(now, running.batch_id, now - began)
            running, end = None, _NEVER
        while at < count and times[at] == now:
            refused = rule.submit(
                now,
                at,
                "lane",
                deadline_ns=now + slack[at] if slack else None,
                tenant=tenants[at] if tenants else "",
                priority=priorities[at] if priorities else NORMAL,
            )
            if refused is not None:
                outcome.refused_ns[at] = now
            at += 1
        for action in rule.poll(now):
            if isinstance(action, Refuse):
                outcome.refused_ns[action.id] = now
                continue
            assert running is None, "the only engine got a second batch"
            running, began = action, now
            rows = len(action.ids)
            took = engine.duration_ns(now, rows, rng)
            end = now + took
            outcome.sizes.append(rows)
            outcome.busy_ns += took
            for number in action.ids:
                outcome.engine_ns[number] = took / rows
        wanted = rule.next_wakeup_ns()
        wake = _NEVER if wanted is None else max(wanted, now + 1)
    outcome.end_ns = max(outcome.finished_ns)
    return outcome
