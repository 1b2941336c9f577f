"""Predictions of when waiting requests end, from the costs of all lanes and the engines that serve them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from edge_runtime.core.scheduling.batch_costs import BatchCosts
from edge_runtime.core.scheduling.engine_pool import EnginePool
from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Queue

#: So many lanes are remembered; beyond that the one used longest ago is forgotten, unless it waits or runs.
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request would wait; `above` rows wait in higher priority classes, `waiting` rows in all."""

    queue: Queue
    above: int
    waiting: int


class Forecast:
    """Predictions over all lanes, in nanoseconds.

    `row_ns`, `batch_ns` and `single_ns` are the costs of the most expensive lane at the present speed of the engines:
    of a row in the cheapest batch size (divided by the number of engines), the 99th percentile of a full batch, and
    the mean of a batch of one.
    """

    __slots__ = ("_make", "_pool", "batch_ns", "lanes", "row_ns", "single_ns")

    def __init__(self, pool: EnginePool, make: Callable[[Hashable], Lane]) -> None:
        """`make` returns a new lane that starts with the costs of the latency profile."""
        self._pool, self._make = pool, make
        self.lanes: dict[Hashable, Lane] = {}
        self.row_ns = self.batch_ns = self.single_ns = 0.0

    def new_lane(self, key: Hashable) -> Lane:
        """Add a lane with the costs of the latency profile. An idle lane may be forgotten to make room."""
        if len(self.lanes) >= _REMEMBERED:
            idle = [lane for lane in self.lanes.values() if not lane.waiting and not lane.running]
            if idle:
                del self.lanes[min(idle, key=_last_used).key]
        lane = self.lanes[key] = self._make(key)
        self.refresh()
        return lane

    def costs(self, key: Hashable) -> BatchCosts:
        """The batch costs of a lane; those of the latency profile if the lane is not remembered."""
        return (self.lanes.get(key) or self._make(key)).costs

    def refresh(self) -> None:
        """Recompute the costs of the most expensive lane, after a batch ended or a lane was added."""
        speed = self._pool.speed
        lanes = self.lanes.values()
        if (
            len(lanes) == 1
        ):  # the case of most models, after every batch; the lists below would add 5 % to a lone request
            (lane,) = lanes
            self.row_ns = lane.split.per_row * speed / self._pool.up
            self.batch_ns = lane.costs.p99s[-1] * speed
            self.single_ns = lane.costs.means[0] * speed
            return
        self.row_ns = max([lane.split.per_row for lane in lanes]) * speed / self._pool.up
        self.batch_ns = max([lane.costs.p99s[-1] for lane in lanes]) * speed
        self.single_ns = max([lane.costs.means[0] for lane in lanes]) * speed

    def waiting_ns(self) -> float:
        """The time that all waiting rows take from the moment an engine has room."""
        rows_ns = sum([lane.waiting * lane.split.per_row for lane in self.lanes.values()])
        return rows_ns * self._pool.speed / self._pool.up

    def half_served_ns(self, now_ns: int) -> int | None:
        """The time from now until half of the waiting rows are served, as a hint when to retry. None: not known."""
        half_ns = self._pool.free_from(now_ns) - now_ns + self.waiting_ns() / 2
        return int(half_ns) + 1 if half_ns > 0 else None

    def finish_ns(self, now_ns: int, place: Place, at: int, *, is_overloaded: bool) -> float:
        """When a request at index `at` of its queue is predicted to end."""
        lane = place.queue.lane
        ahead = at + self._foreign_rows(place, at)
        most = lane.split.most
        # Under overload, later requests will fill the request's own batch, as they filled the batch before. The own batch
        # is predicted by its 99th percentile and the batches before by their means, whose errors even out.
        if is_overloaded and (lane.is_filling or ahead >= most):
            last, before_ns = most, ahead // most * most * lane.split.per_row
        else:
            last = min(ahead, most - 1) + 1
            before_ns = max(lane.split.drain(ahead + 1) - lane.split.drain(last), 0.0)
        own_ns = before_ns / self._pool.up + lane.costs.p99(last)
        return self._pool.free_from(now_ns) + own_ns * self._pool.speed

    def displaces(self, now_ns: int, place: Place, at: int) -> bool:
        """Whether admitting a request at index `at` would make an already admitted one miss its deadline.

        All batches are taken to be full. Only requests at batch borders can be hurt: each moves from last of its batch
        to first of the next.
        """
        queue, split = place.queue, place.queue.lane.split
        own_ns, start_ns = queue.lane.costs.mean(split.most), self._pool.free_from(now_ns)
        for last in range(at - at % split.most + split.most - 1, len(queue.keys), split.most):
            rows = (last + 1 + self._foreign_rows(place, last + 1)) // split.most * split.most
            finish_ns = start_ns + (rows * split.per_row / self._pool.up + own_ns) * self._pool.speed
            deadline_ns = queue.entries[last].deadline_ns
            if deadline_ns is not None and deadline_ns < finish_ns:
                return True
        return False

    def _foreign_rows(self, place: Place, at: int) -> int:
        """Rows of other flows that are served before: all of higher classes, and the turns of flows in the same class."""
        queue, priority_class = place.queue, place.queue.flow.priority_class
        others = priority_class.waiting - len(queue.keys)
        turns = priority_class.rivals(queue) * (at + 1)
        foreign = place.above + min(others, turns)
        if len(self.lanes) > 1 and foreign:  # convert to rows that cost what this lane's rows cost
            mean_ns = self.waiting_ns() * self._pool.up / self._pool.speed / place.waiting
            foreign = int(foreign * mean_ns / (queue.lane.split.per_row or 1.0))
        return foreign


def _last_used(lane: Lane) -> int:
    return lane.since_ns
