"""A full queue is shared out: which waiting requests make room for new ones.

Requests of a lower priority yield first. In the priority of the new request only the greediest flow yields: first the
tenant that holds most of the queue is found, then its flow that does. It yields only as long as it holds no less than the
new request's flow would, so two flows never displace each other in turns; to the rows of a whole request only if it still
holds twice as much, because a displaced row often makes the other rows of its request useless. The newest requests
yield, because the older ones of a flow may be done soon, and never a member of a sequence between two steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from edge_runtime.core.scheduling.queueing import Entry, Flow, PriorityClass

#: A new row displaces at most this many, so that the work of a submission is bounded.
_MOST_DISPLACED = 16
#: To the rows of a whole request only a flow yields that holds so many times as much.
_TIMES_GREEDIER = 2
#: So many members of sequences are passed over for each that is displaced.
_PASSED_OVER = 4


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A row, or the rows of one request, for which the queue has no room.

    `flow` need not be attached. `excess` and `excess_bytes` are what must be freed.
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
        present = priority_class.flow(tenant, new.flow.name)
        theirs, own = held[greediest], 0 if present is None else held[present]
    else:
        theirs, own = of_tenant[tenant], of_tenant.get(new.flow.tenant, 0)
    freed, more = (freed_bytes, new.size_bytes) if by_bytes else (len(chosen), new.rows)
    times = 1 if new.rows == 1 else _TIMES_GREEDIER
    return chosen if theirs - freed >= times * (own + more) else []


def _newest(flow: Flow, new: Newcomer) -> tuple[list[Entry], int]:
    """The newest requests of a flow that free enough, with their bytes; none if it takes too many."""
    chosen: list[Entry] = []
    freed_bytes = 0
    most = max(_MOST_DISPLACED, new.rows)
    for entry in islice(flow.newest_first(), _PASSED_OVER * most):
        if entry.id in entry.queue.lane.staying:
            continue
        chosen.append(entry)
        freed_bytes += entry.size_bytes
        if len(chosen) >= new.excess and freed_bytes >= new.excess_bytes:
            return chosen, freed_bytes
        if len(chosen) == most:
            break
    return [], 0
