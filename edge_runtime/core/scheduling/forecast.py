"""When what waits will be done: the lanes with their costs, over the engines that serve them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from edge_runtime.core.scheduling.batch_costs import BatchCosts
from edge_runtime.core.scheduling.engine_pool import EnginePool
from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Queue

#: Lanes whose costs are remembered while nothing of theirs waits.
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is to wait; `above` rows wait in higher levels than its own, `waiting` in all."""

    queue: Queue
    above: int
    waiting: int


class Forecast:
    """Predictions over all lanes, in nanoseconds.

    `row_ns`, `batch_ns` and `single_ns` are those of the dearest lane, as fast as engines are now: a row in the
    cheapest batch over all engines, the 99th percentile of a full batch, and a batch of one.
    """

    __slots__ = ("_make", "_pool", "batch_ns", "lanes", "row_ns", "single_ns")

    def __init__(self, pool: EnginePool, make: Callable[[Hashable], Lane]) -> None:
        """`make` begins a lane, with the costs that were measured before."""
        self._pool, self._make = pool, make
        self.lanes: dict[Hashable, Lane] = {}
        self.row_ns = self.batch_ns = self.single_ns = 0.0

    def new_lane(self, key: Hashable) -> Lane:
        """Begin a lane, with the costs of the latency profile; one that has nothing waiting may be forgotten for it."""
        if len(self.lanes) >= _REMEMBERED:
            idle = [lane for lane in self.lanes.values() if not lane.waiting and not lane.running]
            if idle:
                del self.lanes[min(idle, key=_last_used).key]
        lane = self.lanes[key] = self._make(key)
        self.refresh()
        return lane

    def costs(self, key: Hashable) -> BatchCosts:
        """What batches of a lane cost, known or not."""
        return (self.lanes.get(key) or self._make(key)).costs

    def refresh(self) -> None:
        """Derive the dearest costs again: a batch has ended, or a lane begun."""
        speed = self._pool.speed
        lanes = self.lanes.values()
        if len(lanes) == 1:  # after every batch of most models; the lists cost a twentieth of a request alone
            (lane,) = lanes
            self.row_ns = lane.split.per_row * speed / self._pool.up
            self.batch_ns = lane.costs.p99s[-1] * speed
            self.single_ns = lane.costs.means[0] * speed
            return
        self.row_ns = max([lane.split.per_row for lane in lanes]) * speed / self._pool.up
        self.batch_ns = max([lane.costs.p99s[-1] for lane in lanes]) * speed
        self.single_ns = max([lane.costs.means[0] for lane in lanes]) * speed

    def waiting_ns(self) -> float:
        """Time to serve all that waits once an engine is free."""
        rows_ns = sum([lane.waiting * lane.split.per_row for lane in self.lanes.values()])
        return rows_ns * self._pool.speed / self._pool.up

    def half_served_ns(self, now_ns: int) -> int | None:
        """From now until half of what waits will have been served: when to try again. None: not known."""
        half_ns = self._pool.free_from(now_ns) - now_ns + self.waiting_ns() / 2
        return int(half_ns) + 1 if half_ns > 0 else None

    def finish_ns(self, now_ns: int, place: Place, at: int, *, is_overloaded: bool) -> float:
        """When a request at index `at` of its queue ends."""
        lane = place.queue.lane
        ahead = at + self._foreign_rows(place, at)
        most = lane.split.most
        # Under overload later ones fill its batch up, as they did the last one. Else the last batch by its 99th
        # percentile, the others by their means: their errors even out.
        if is_overloaded and (lane.is_filling or ahead >= most):
            last, before_ns = most, ahead // most * most * lane.split.per_row
        else:
            last = min(ahead, most - 1) + 1
            before_ns = max(lane.split.drain(ahead + 1) - lane.split.drain(last), 0.0)
        own_ns = before_ns / self._pool.up + lane.costs.p99(last)
        return self._pool.free_from(now_ns) + own_ns * self._pool.speed

    def displaces(self, now_ns: int, place: Place, at: int) -> bool:
        """Whether one more at index `at` makes one late that was admitted before, with all batches full.

        It would be whoever is the last of a batch now, and the first of the next one then.
        """
        queue, split = place.queue, place.queue.lane.split
        own_ns, start_ns = queue.lane.costs.mean(split.most), self._pool.free_from(now_ns)
        for last in range(at - at % split.most + split.most - 1, len(queue.keys), split.most):
            rows = (last + 1 + self._foreign_rows(place, last + 1)) // split.most * split.most
            finish_ns = start_ns + (rows * split.per_row / self._pool.up + own_ns) * self._pool.speed
            if queue.keys[last] < finish_ns and queue.entries[last].has_deadline:
                return True
        return False

    def _foreign_rows(self, place: Place, at: int) -> int:
        """Rows of others served before: those of higher levels, and the turns of the level's other tenants."""
        queue, level = place.queue, place.queue.share.level
        others = level.waiting - len(queue.keys)
        # Each other tenant is served as often as this one meanwhile, and no more.
        turns = max(len(level.shares) - (1 if queue.keys else 0), 0) * (at + 1)
        foreign = place.above + min(others, turns)
        if len(self.lanes) > 1 and foreign:  # in rows of this lane's cost
            mean_ns = self.waiting_ns() * self._pool.up / self._pool.speed / place.waiting
            foreign = int(foreign * mean_ns / (queue.lane.split.per_row or 1.0))
        return foreign


def _last_used(lane: Lane) -> int:
    return lane.since_ns
