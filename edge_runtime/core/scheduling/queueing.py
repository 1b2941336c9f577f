"""The requests that wait, in the order in which they are served: priority classes, flows in turns, deadlines.

    PriorityClass (strict, with ageing) -> Flow (one tenant, takes turns) -> Queue (one lane, earliest deadline first)

Turns are start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Each flow has a virtual time: the engine time
that its rows have used. The flow with the smallest virtual time is served next. Engine time is shared as by deficit
round robin, but without a quantum, and a flow that empties its queue with each batch and refills it (a caller with
one request at a time) gains nothing by doing so.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator

from edge_runtime.core.scheduling.lane import Lane

#: Flows with nothing waiting whose virtual time is kept. Beyond that the flow that left first is forgotten.
_REMEMBERED = 1024


class Entry:
    """A waiting request. `key_ns` orders it in its queue: its deadline, or one assumed for it."""

    __slots__ = ("has_deadline", "id", "key_ns", "queue", "size_bytes")

    def __init__(
        self, request_id: int, queue: "Queue", size_bytes: int, key_ns: int, has_deadline: bool
    ) -> None:
        self.id = request_id
        self.queue = queue
        self.size_bytes = size_bytes
        self.key_ns = key_ns
        self.has_deadline = has_deadline


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
    """One tenant in one priority class: its queues, and its virtual time in nanoseconds of engine time."""

    __slots__ = ("priority_class", "queues", "tenant", "virtual_ns")

    def __init__(self, priority_class: "PriorityClass", tenant: str) -> None:
        self.priority_class = priority_class
        self.tenant = tenant
        self.queues: dict[Lane, Queue] = {}  # none of them empty
        self.virtual_ns = 0.0

    @property
    def waiting(self) -> int:
        """How many requests of this flow wait."""
        return sum([len(queue.keys) for queue in self.queues.values()])

    def most_urgent(self) -> Queue:
        """The queue whose head has the earliest deadline."""
        queues = self.queues.values()
        return next(iter(queues)) if len(queues) == 1 else min(queues, key=_head_key)


class PriorityClass:
    """One priority and the flows that wait in it. `since_ns`: when it last had a turn, or began to wait.

    `credit_ns` is the largest lag behind the other flows that a returning flow keeps (start-time fair queueing would
    reset the lag to 0). A quiet flow may so send a short burst ahead of a flood instead of in turns with it.
    """

    __slots__ = ("_ahead", "_clock_ns", "by_lane", "credit_ns", "flows", "since_ns", "waiting")

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self.by_lane: dict[Lane, dict[Queue, None]] = {}
        self.waiting = 0
        self.since_ns = 0
        self.credit_ns = 0.0
        self._clock_ns = 0.0  # virtual time of the last turn: a new flow starts there, less the credit
        self._ahead: OrderedDict[str, float] = OrderedDict()  # virtual time of flows with nothing waiting

    def queue(self, tenant: str, lane: Lane) -> Queue:
        """The queue of a tenant's requests for a lane. A new queue is attached by its first `insert`."""
        flow = self.flows.get(tenant)
        if flow is None:
            flow = Flow(self, tenant)
        queue = flow.queues.get(lane)
        return Queue(flow, lane) if queue is None else queue

    def queues(self) -> Iterator[Queue]:
        """All queues; none is empty."""
        for flow in self.flows.values():
            yield from flow.queues.values()

    def turn(self) -> Flow:
        """The flow whose turn it is: the one with the smallest virtual time; of equal ones, the one that waits longer."""
        flows = self.flows.values()
        flow = next(iter(flows)) if len(flows) == 1 else min(flows, key=_virtual_ns)
        if flow.virtual_ns > self._clock_ns:
            self._clock_ns = flow.virtual_ns
        return flow

    def in_turn(self, lane: Lane) -> list[Queue]:
        """The queues of a lane, in the order of their flows' turns."""
        queues = self.by_lane.get(lane, ())
        return sorted(queues, key=_virtual_ns_of_queue) if len(queues) > 1 else list(queues)

    def charge(self, flow: Flow, ns: float) -> None:
        """Add engine time to a flow's virtual time, also if nothing of the flow waits any more."""
        present = self.flows.get(flow.tenant)
        if present is not None:
            present.virtual_ns += ns
        else:
            self._remember(flow.tenant, self._ahead.get(flow.tenant, flow.virtual_ns) + ns)

    def attach(self, queue: Queue) -> None:
        """Include a queue in the turns, just before its first entry is inserted."""
        flow = queue.flow
        if flow.tenant not in self.flows:
            flow.virtual_ns = max(self._ahead.pop(flow.tenant, 0.0), self._clock_ns - self.credit_ns)
            self.flows[flow.tenant] = flow
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
        if not flow.queues:
            del self.flows[flow.tenant]
            self._remember(flow.tenant, flow.virtual_ns)

    def _remember(self, tenant: str, virtual_ns: float) -> None:
        ahead = self._ahead
        if virtual_ns > self._clock_ns - self.credit_ns:
            ahead[tenant] = virtual_ns
            if len(ahead) > _REMEMBERED:
                ahead.popitem(last=False)


def _head_key(queue: Queue) -> int:
    return queue.keys[0]


def _virtual_ns(flow: Flow) -> float:
    return flow.virtual_ns


def _virtual_ns_of_queue(queue: Queue) -> float:
    return queue.flow.virtual_ns
