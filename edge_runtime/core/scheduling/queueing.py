"""What waits, and in which order it is served: priority levels, tenants in turns, deadlines.

    PriorityClass (strict, with ageing) -> Flow (one tenant, takes turns) -> Queue (one lane, earliest deadline first)

Turns are start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each tenant has a virtual time, which a
batch moves on by the engine time the tenant's rows took, and the one least far goes next. It shares out
engine time as deficit round robin does, but needs no quantum and does not favour a tenant that empties its queue with
each batch and fills it again, as every caller with one request under way does.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator

from edge_runtime.core.scheduling.lane import Lane

#: Tenants with nothing waiting whose virtual time is kept; the longest gone starts afresh.
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
    """Requests of one tenant for one lane at one level, earliest deadline first, equal ones in order of arrival.

    Sorted parallel lists, not a heap: arrivals mostly go to the end, a batch is cut off as a slice, a cancel leaves
    nothing behind, and a place in the list says who is served before.
    """

    __slots__ = ("entries", "keys", "lane", "share")

    def __init__(self, share: "Flow", lane: Lane) -> None:
        self.share = share
        self.lane = lane
        self.keys: list[int] = []
        self.entries: list[Entry] = []

    def insert(self, at: int, entry: Entry) -> None:
        """Put `entry` at its place among the keys. The queue may be new or have been empty."""
        keys, level = self.keys, self.share.level
        if not keys:
            level.attach(self)
        keys.insert(at, entry.key_ns)
        self.entries.insert(at, entry)
        self.lane.waiting += 1
        level.waiting += 1

    def remove(self, entry: Entry) -> None:
        """Take out an entry that is in it."""
        at = bisect_left(self.keys, entry.key_ns)
        while self.entries[at] is not entry:
            at += 1
        del self.keys[at], self.entries[at]
        self._shrunk(1)

    def cut(self, count: int) -> list[Entry]:
        """Take out the first `count`, or all there are."""
        taken = self.entries[:count]
        del self.entries[:count], self.keys[:count]
        self._shrunk(len(taken))
        return taken

    def _shrunk(self, count: int) -> None:
        self.lane.waiting -= count
        self.share.level.waiting -= count
        if not self.keys:
            self.share.level.detach(self)


class Flow:
    """One tenant at one level: its queues, and its virtual time, in nanoseconds of engine time."""

    __slots__ = ("level", "queues", "tenant", "virtual_ns")

    def __init__(self, level: "PriorityClass", tenant: str) -> None:
        self.level = level
        self.tenant = tenant
        self.queues: dict[Lane, Queue] = {}  # none of them empty
        self.virtual_ns = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum([len(queue.keys) for queue in self.queues.values()])

    def most_urgent(self) -> Queue:
        """The queue whose head has the earliest deadline."""
        queues = self.queues.values()
        return next(iter(queues)) if len(queues) == 1 else min(queues, key=_head_key)


class PriorityClass:
    """One priority and the tenants that wait in it. `since_ns`: when it last had a turn, or began to wait.

    `credit_ns` is how far behind the others a tenant may begin that had less of the engine than its part: a few requests
    of a quiet one are then served in a row beside a flood, not in turns with it.
    """

    __slots__ = ("_ahead", "_clock_ns", "by_lane", "credit_ns", "shares", "since_ns", "waiting")

    def __init__(self) -> None:
        self.shares: dict[str, Flow] = {}
        self.by_lane: dict[Lane, dict[Queue, None]] = {}
        self.waiting = 0
        self.since_ns = 0
        self.credit_ns = 0.0
        self._clock_ns = 0.0  # virtual time of the last turn: a newcomer begins that far, less its credit
        self._ahead: OrderedDict[str, float] = OrderedDict()  # virtual time of tenants with nothing waiting

    def queue(self, tenant: str, lane: Lane) -> Queue:
        """The queue of a tenant's requests for a lane; a new one is attached by its first `insert`."""
        share = self.shares.get(tenant)
        if share is None:
            share = Flow(self, tenant)
        queue = share.queues.get(lane)
        return Queue(share, lane) if queue is None else queue

    def queues(self) -> Iterator[Queue]:
        """All queues; none is empty."""
        for share in self.shares.values():
            yield from share.queues.values()

    def turn(self) -> Flow:
        """Whose turn it is: the tenant that had least of the engine; of equal ones, who waits longer."""
        shares = self.shares.values()
        share = next(iter(shares)) if len(shares) == 1 else min(shares, key=_virtual_ns)
        if share.virtual_ns > self._clock_ns:
            self._clock_ns = share.virtual_ns
        return share

    def in_turn(self, lane: Lane) -> list[Queue]:
        """The queues of a lane, in the order of their tenants' turns."""
        queues = self.by_lane.get(lane, ())
        return sorted(queues, key=_virtual_ns_of_queue) if len(queues) > 1 else list(queues)

    def charge(self, share: Flow, ns: float) -> None:
        """Move a tenant's virtual time on, also when it has nothing waiting any more."""
        present = self.shares.get(share.tenant)
        if present is not None:
            present.virtual_ns += ns
        else:
            self._remember(share.tenant, self._ahead.get(share.tenant, share.virtual_ns) + ns)

    def attach(self, queue: Queue) -> None:
        """Let a queue take part in the turns, before its first entry."""
        share = queue.share
        if share.tenant not in self.shares:
            share.virtual_ns = max(self._ahead.pop(share.tenant, 0.0), self._clock_ns - self.credit_ns)
            self.shares[share.tenant] = share
        share.queues[queue.lane] = queue
        self.by_lane.setdefault(queue.lane, {})[queue] = None

    def detach(self, queue: Queue) -> None:
        """Leave an empty queue out, and a tenant with no other."""
        share, lane = queue.share, queue.lane
        del share.queues[lane]
        beside = self.by_lane[lane]
        del beside[queue]
        if not beside:
            del self.by_lane[lane]
        if not share.queues:
            del self.shares[share.tenant]
            self._remember(share.tenant, share.virtual_ns)

    def _remember(self, tenant: str, virtual_ns: float) -> None:
        ahead = self._ahead
        if virtual_ns > self._clock_ns - self.credit_ns:
            ahead[tenant] = virtual_ns
            if len(ahead) > _REMEMBERED:
                ahead.popitem(last=False)


def _head_key(queue: Queue) -> int:
    return queue.keys[0]


def _virtual_ns(share: Flow) -> float:
    return share.virtual_ns


def _virtual_ns_of_queue(queue: Queue) -> float:
    return queue.share.virtual_ns
