"""A batch and its members' deadlines: who is too late, who must wait for the next one."""

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Entry


@dataclass(frozen=True, slots=True)
class Fit:
    """One batch that is to start at `now_ns` on an engine of `speed`; `is_stale`: predictions refuse nobody."""

    now_ns: int
    lane: Lane
    speed: float
    is_stale: bool

    def apply(
        self, members: list[Entry], newcomers: Sequence[Entry], *, may_shrink: bool
    ) -> tuple[list[Entry], list[Entry]]:
        """Take out of `members` until all that stay end in time; return (who is late, who waits on, latest first).

        With `may_shrink` the newcomers with most time wait on, never who stays in a step lane. Without, and where that
        is not enough, those are late who would make the batch smaller: smaller batches serve fewer rows per
        second, which only a queue without overload can afford (early drop: Nexus, SOSP 2019).
        """
        late: list[Entry] = []
        back: list[Entry] = []
        hasty = sorted([entry for entry in members if entry.has_deadline], key=_key_of)
        # Late even alone: this engine may be slower than the best one, by which the queue was judged.
        while hasty and not self.is_stale and self._ends_late(1, hasty[0]):
            late.append(hasty.pop(0))
            members.remove(late[-1])
        if may_shrink:
            spare = sorted([entry for entry in newcomers if entry in members], key=_key_of)
            while spare and len(members) > 1 and hasty and self._ends_late(len(members), hasty[0]):
                back.append(spare.pop())
                members.remove(back[-1])
                hasty = [entry for entry in hasty if entry is not back[-1]]
        while len(members) > 1 and hasty and self._ends_late(len(members), hasty[0]):
            late.append(hasty.pop(0))
            members.remove(late[-1])
        return late, back

    def _ends_late(self, rows: int, entry: Entry) -> bool:
        return self.now_ns + self.lane.costs.mean(rows) * self.speed > entry.key_ns


def _key_of(entry: Entry) -> int:
    return entry.key_ns
