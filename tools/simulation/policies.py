"""The policies that are compared, by name, made new for each run."""

from collections.abc import Callable

from edge_runtime.core.scheduling.scheduler import Policy, QueueLimits, Scheduler
from tools.simulation.cases import MS, Case
from tools.simulation.replay import Rule
from tools.simulation.rules import Bento, Clipper, Natural

#: BentoML's limit where a case has no deadline: ten seconds, that nothing but a growing queue reaches.
_LONG_NS = 10_000 * MS

#: This project's scheduler with its learned window, and what it is compared with.
OURS, NONE, PLAIN = "ours", "no window", "plain natural"
POLICIES: dict[str, Policy] = {
    OURS: Policy(),
    NONE: Policy(window_ns=0),
    "fixed 1 ms": Policy(window_ns=1 * MS),
    "fixed 2 ms": Policy(window_ns=2 * MS),
    "fixed 5 ms": Policy(window_ns=5 * MS),
    "duty 0.3": Policy(duty_target=0.3),
}
#: Groups of cases for which some policies would only repeat others.
_APPLY = {
    "overload": (OURS, "fixed 2 ms", PLAIN, "bentoml", "clipper"),
    "goodput": (OURS, "fixed 2 ms", PLAIN, "bentoml", "clipper"),
    "tenants": (OURS, PLAIN, "bentoml", "clipper"),
    "priorities": (OURS, PLAIN),
}


def rules(case: Case) -> dict[str, Callable[[], Rule]]:
    """What makes each policy of a case. The scheduler knows what a warm-up sweep would have measured."""
    engine = case.engine
    # Otherwise a flood takes every place in the queue, and the quiet tenant is refused.
    per_tenant = 256 if case.group == "tenants" else None
    limits = QueueLimits(max_batch=engine.max_batch, tenant_max_waiting=per_tenant)

    def scheduler(policy: Policy) -> Callable[[], Rule]:
        return lambda: Scheduler(limits, policy, latency_profile=engine.latency_profile(), pads=engine.pads)

    made: dict[str, Callable[[], Rule]] = {name: scheduler(policy) for name, policy in POLICIES.items()}
    made[PLAIN] = lambda: Natural(engine.max_batch)
    made["bentoml"] = lambda: Bento(engine, case.deadline_ns or _LONG_NS)
    made["clipper"] = lambda: Clipper(engine, case.deadline_ns or 50 * engine.cost_ns(1))
    return {name: made[name] for name in _APPLY.get(case.group, made)}
