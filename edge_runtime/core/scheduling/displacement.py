"""A full queue is shared out: which waiting requests make room for a new one.

A request of a lower priority yields first. In the priority of the new request only the greediest caller yields: first
the tenant that holds most of the queue is found, then its caller that does. It yields only if it still holds as much as
the new request's caller would, with all rows of its request, so two callers never displace each other in turns. The
newest requests yield, since the caller's older ones may be done soon, and never a member between two steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from edge_runtime.core.scheduling.queueing import Entry, Flow, PriorityClass

#: One new request displaces at most this many, and this many are looked at, so that the work of a submission is bounded.
_MOST_DISPLACED = 16
_MOST_SEEN = 64


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that does not fit into the queue. `flow` is its caller's, or a new one that is not attached.

    `rows`: submissions of its caller that belong together. `excess` and `excess_bytes`: what must be freed for it.
    """

    flow: Flow
    size_bytes: int
    rows: int
    excess: int
    excess_bytes: int


def victims(classes: Sequence[PriorityClass], new: Newcomer) -> list[Entry]:
    """The requests that must leave so that `new` fits; none if it has to be refused."""
    own = new.flow.priority_class
    for priority_class in reversed(classes[own.rank :]):
        if priority_class.waiting and (
            chosen := _victims_of(priority_class, new, is_own=priority_class is own)
        ):
            return chosen
    return []


def _victims_of(priority_class: PriorityClass, new: Newcomer, *, is_own: bool) -> list[Entry]:
    by_bytes = new.excess_bytes > 0
    held: dict[Flow, int] = {}
    of_tenant: dict[str, int] = {}
    for flow in priority_class.flows():
        held[flow] = flow.waiting_bytes if by_bytes else flow.waiting
        of_tenant[flow.tenant] = of_tenant.get(flow.tenant, 0) + held[flow]
    tenant = max(of_tenant, key=of_tenant.__getitem__)
    greediest = max([flow for flow in held if flow.tenant == tenant], key=held.__getitem__)
    chosen, freed_bytes = _newest(greediest, new)
    if not chosen or not is_own:
        return chosen
    if tenant == new.flow.tenant:
        present = priority_class.flow(tenant, new.flow.caller)
        theirs, own = held[greediest], 0 if present is None else held[present]
    else:
        theirs, own = of_tenant[tenant], of_tenant.get(new.flow.tenant, 0)
    freed, each = (freed_bytes, new.size_bytes) if by_bytes else (len(chosen), 1)
    return chosen if theirs - freed >= max(own + each, new.rows * each) else []


def _newest(flow: Flow, new: Newcomer) -> tuple[list[Entry], int]:
    """The newest requests of a flow that free enough, with their bytes; none if it takes too many."""
    chosen: list[Entry] = []
    freed_bytes = 0
    for entry in islice(flow.newest_first(), _MOST_SEEN):
        if entry.id in entry.queue.lane.staying:
            continue
        chosen.append(entry)
        freed_bytes += entry.size_bytes
        if len(chosen) >= new.excess and freed_bytes >= new.excess_bytes:
            return chosen, freed_bytes
        if len(chosen) == _MOST_DISPLACED:
            break
    return [], 0
