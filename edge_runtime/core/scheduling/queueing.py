"""The requests that wait, in the order in which they are served: priority classes, flows in turns, deadlines.

    PriorityClass (strict, with ageing) -> Flow (takes turns) -> Queue (one lane, earliest deadline first)

The named flows of a tenant (its connections) share the tenant's part: tenants share engine time equally, so a tenant gains
nothing by more connections. Requests that name no flow are one flow, which has the turns of a tenant.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterator
from heapq import merge

from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.virtual_time import VirtualTime


class Entry:
    """A waiting request. `key_ns` orders it in its queue; it is never later than the deadline."""

    __slots__ = ("deadline_ns", "id", "key_ns", "queue", "size_bytes")

    def __init__(
        self, request_id: int, queue: "Queue", size_bytes: int, key_ns: int, deadline_ns: int | None
    ) -> None:
        self.id = request_id
        self.queue = queue
        self.size_bytes = size_bytes
        self.key_ns = key_ns
        self.deadline_ns = deadline_ns


class Queue:
    """Requests of one flow for one lane, earliest deadline first; equal deadlines in order of arrival.

    Two parallel sorted lists instead of a heap: most arrivals go to the end, a batch is cut off as a slice, a cancelled
    request leaves nothing behind, and an index in the list is the number of rows that are served before.
    """

    __slots__ = ("entries", "flow", "keys", "lane")

    def __init__(self, flow: "Flow", lane: Lane) -> None:
        self.flow = flow
        self.lane = lane
        self.keys: list[int] = []
        self.entries: list[Entry] = []

    def insert(self, at: int, entry: Entry) -> None:
        """Insert `entry` at index `at`, which keeps the keys sorted. The queue may be new or have been empty."""
        keys, priority_class = self.keys, self.flow.priority_class
        if not keys:
            priority_class.attach(self)
        keys.insert(at, entry.key_ns)
        self.entries.insert(at, entry)
        self.lane.waiting += 1
        priority_class.waiting += 1

    def remove(self, entry: Entry) -> None:
        """Remove an entry, which must be in this queue."""
        at = bisect_left(self.keys, entry.key_ns)
        while self.entries[at] is not entry:
            at += 1
        del self.keys[at], self.entries[at]
        self._shrunk(1)

    def cut(self, count: int) -> list[Entry]:
        """Remove and return the first `count` entries, or all if there are fewer."""
        taken = self.entries[:count]
        del self.entries[:count], self.keys[:count]
        self._shrunk(len(taken))
        return taken

    def _shrunk(self, count: int) -> None:
        self.lane.waiting -= count
        self.flow.priority_class.waiting -= count
        if not self.keys:
            self.flow.priority_class.detach(self)


class Flow:
    """Requests of one tenant in one priority class that take turns as one: their queues, and their virtual time.

    `name` is None for the requests of a tenant that name no flow. `group` is the tenant of a named flow, from its first
    request on.
    """

    __slots__ = ("group", "name", "priority_class", "queues", "tenant", "virtual_ns")

    def __init__(self, priority_class: "PriorityClass", tenant: str, name: Hashable) -> None:
        self.priority_class = priority_class
        self.tenant = tenant
        self.name = name
        self.group: Tenant | None = None
        self.queues: dict[Lane, Queue] = {}  # none of them empty
        self.virtual_ns = 0.0

    @property
    def waiting(self) -> int:
        """How many requests of this flow wait."""
        return sum([len(queue.keys) for queue in self.queues.values()])

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the requests of this flow that wait."""
        return sum([entry.size_bytes for queue in self.queues.values() for entry in queue.entries])

    def newest_first(self) -> Iterator[Entry]:
        """The waiting requests, the latest deadline and of equal ones the last arrival first."""
        return merge(*[reversed(queue.entries) for queue in self.queues.values()], key=_negative_key)

    def most_urgent(self) -> Queue:
        """The queue whose head has the earliest deadline."""
        queues = self.queues.values()
        return next(iter(queues)) if len(queues) == 1 else min(queues, key=_head_key)


class Tenant:
    """The named flows of one tenant in one priority class, and the virtual time that they have together."""

    __slots__ = ("flows", "key", "time", "virtual_ns")

    def __init__(self, tenant: str) -> None:
        self.key = (tenant,)  # apart from the tenant's requests that name no flow
        self.flows: dict[Hashable, Flow] = {}
        self.time = VirtualTime()
        self.virtual_ns = 0.0


class PriorityClass:
    """One priority (`rank`) and the flows that wait in it. `since_ns`: when it last had a turn, or began to wait.

    `unnamed` has the requests that name no flow, by tenant; `tenants` has the named flows.
    """

    __slots__ = ("by_lane", "rank", "since_ns", "tenants", "time", "unnamed", "waiting")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.unnamed: dict[str, Flow] = {}
        self.tenants: dict[str, Tenant] = {}
        self.time = VirtualTime()
        self.by_lane: dict[Lane, dict[Queue, None]] = {}
        self.waiting = 0
        self.since_ns = 0

    def flow(self, tenant: str, name: Hashable) -> Flow | None:
        """A flow, if something of it waits."""
        if name is None:
            return self.unnamed.get(tenant)
        group = self.tenants.get(tenant)
        return None if group is None else group.flows.get(name)

    def queue(self, tenant: str, name: Hashable, lane: Lane) -> Queue:
        """The queue of a flow's requests for a lane. A new queue is attached by its first `insert`."""
        flow = self.flow(tenant, name) or Flow(self, tenant, name)
        return flow.queues.get(lane) or Queue(flow, lane)

    def flows(self) -> Iterator[Flow]:
        """All flows with something waiting."""
        yield from self.unnamed.values()
        for group in self.tenants.values():
            yield from group.flows.values()

    def queues(self) -> Iterator[Queue]:
        """All queues; none is empty."""
        for of_lane in self.by_lane.values():
            yield from of_lane

    def turn(self) -> Flow:
        """The flow whose turn it is: first the tenant, then its flow. Of equal ones, the one that waits longer."""
        if not self.tenants:
            flows = self.unnamed.values()
            flow = next(iter(flows)) if len(flows) == 1 else min(flows, key=_virtual_ns)
            if flow.virtual_ns > self.time.clock_ns:
                self.time.clock_ns = flow.virtual_ns
            return flow
        members: list[Flow | Tenant] = [*self.unnamed.values(), *self.tenants.values()]
        member = min(members, key=_virtual_ns)
        self.time.clock_ns = max(self.time.clock_ns, member.virtual_ns)
        if isinstance(member, Flow):
            return member
        flow = min(member.flows.values(), key=_virtual_ns)
        member.time.clock_ns = max(member.time.clock_ns, flow.virtual_ns)
        return flow

    def take(self, lane: Lane, rows: int) -> list[Entry]:
        """Remove and return at most `rows` entries of a lane, in equal parts of its tenants, and of their flows."""
        taken: list[Entry] = []
        while len(taken) < rows and (queues := self.by_lane.get(lane, ())):
            in_turn = sorted(queues, key=_virtual_ns_of_queue) if len(queues) > 1 else list(queues)
            if self.tenants:
                taken += _take_by_tenant(in_turn, rows - len(taken))
                continue
            each = -(-(rows - len(taken)) // len(in_turn))
            for queue in in_turn[: rows - len(taken)]:
                taken += queue.cut(min(each, rows - len(taken)))
        return taken

    def waiting_of(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        unnamed, group = self.unnamed.get(tenant), self.tenants.get(tenant)
        named = () if group is None else group.flows.values()
        return sum([flow.waiting for flow in named]) + (0 if unnamed is None else unnamed.waiting)

    def rivals(self, queue: Queue) -> int:
        """How many rows of other flows are served for each row of a queue, at most."""
        is_new, flow = not queue.keys, queue.flow
        members = len(self.unnamed) + len(self.tenants)
        if flow.name is None:
            return max(members - (not is_new), 0)
        group = self.tenants.get(flow.tenant)
        flows = is_new + (0 if group is None else len(group.flows))
        return (members - (group is not None)) * flows + flows - 1

    def charge(self, flow: Flow, ns: float) -> None:
        """Add engine time to a flow's virtual time, also if nothing of the flow waits any more."""
        if flow.group is not None:
            self._charge_named(flow, flow.group, ns)
            return
        present = self.unnamed.get(flow.tenant)
        if present is not None:
            present.virtual_ns += ns
        else:
            self.time.charge_absent(flow.tenant, flow.virtual_ns, ns)

    def attach(self, queue: Queue) -> None:
        """Include a queue in the turns, just before its first entry is inserted."""
        flow = queue.flow
        if flow.name is not None:
            self._attach_named(flow)
        elif flow.tenant not in self.unnamed:
            flow.virtual_ns = self.time.enter(flow.tenant)
            self.unnamed[flow.tenant] = flow
        flow.queues[queue.lane] = queue
        self.by_lane.setdefault(queue.lane, {})[queue] = None

    def detach(self, queue: Queue) -> None:
        """Exclude an empty queue from the turns, and its flow too if that was its last queue."""
        flow, lane = queue.flow, queue.lane
        del flow.queues[lane]
        of_lane = self.by_lane[lane]
        del of_lane[queue]
        if not of_lane:
            del self.by_lane[lane]
        if flow.queues:
            return
        if flow.group is not None:
            self._detach_named(flow, flow.group)
        else:
            del self.unnamed[flow.tenant]
            self.time.leave(flow.tenant, flow.virtual_ns)

    def _charge_named(self, flow: Flow, group: Tenant, ns: float) -> None:
        present = self.tenants.get(flow.tenant)
        if present is None:
            self.time.charge_absent(group.key, group.virtual_ns, ns)
            return
        present.virtual_ns += ns
        named = present.flows.get(flow.name)
        if named is not None:
            named.virtual_ns += ns
        else:
            present.time.charge_absent(flow.name, flow.virtual_ns, ns)

    def _attach_named(self, flow: Flow) -> None:
        group = self.tenants.get(flow.tenant)
        if group is None:
            group = self.tenants[flow.tenant] = Tenant(flow.tenant)
            group.virtual_ns = self.time.enter(group.key)
        if flow.name not in group.flows:
            group.time.credit_ns = self.time.credit_ns
            flow.virtual_ns = group.time.enter(flow.name)
            group.flows[flow.name] = flow
            flow.group = group

    def _detach_named(self, flow: Flow, group: Tenant) -> None:
        del group.flows[flow.name]
        group.time.leave(flow.name, flow.virtual_ns)
        if not group.flows:
            del self.tenants[flow.tenant]
            self.time.leave(group.key, group.virtual_ns)


def _take_by_tenant(in_turn: list[Queue], rows: int) -> list[Entry]:
    tenants: dict[Flow | Tenant, list[Queue]] = {}
    for queue in in_turn:
        tenants.setdefault(queue.flow.group or queue.flow, []).append(queue)
    taken: list[Entry] = []
    of_tenant = -(-rows // len(tenants))
    for tenant in sorted(tenants, key=_virtual_ns)[:rows]:
        end, queues = min(len(taken) + of_tenant, rows), tenants[tenant]
        each = -(-(end - len(taken)) // len(queues))
        for queue in queues[: end - len(taken)]:
            taken += queue.cut(min(each, end - len(taken)))
    return taken


def _negative_key(entry: Entry) -> int:
    return -entry.key_ns


def _head_key(queue: Queue) -> int:
    return queue.keys[0]


def _virtual_ns(member: Flow | Tenant) -> float:
    return member.virtual_ns


def _virtual_ns_of_queue(queue: Queue) -> float:
    return queue.flow.virtual_ns
