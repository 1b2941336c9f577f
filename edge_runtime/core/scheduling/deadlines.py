"""The deadlines of a batch's members: which are refused, and which wait for the next batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.core.scheduling.lane import Lane
from edge_runtime.core.scheduling.queueing import Entry


@dataclass(frozen=True, slots=True)
class Fit:
    """A batch that starts at `now_ns` on an engine with speed factor `speed`.

    `is_stale`: the predictions are too old to refuse a request that would run alone.
    """

    now_ns: int
    lane: Lane
    speed: float
    is_stale: bool

    def apply(
        self, members: list[Entry], newcomers: Sequence[Entry], *, may_shrink: bool
    ) -> tuple[list[Entry], list[Entry]]:
        """Shrink the batch until every remaining member meets its deadline; return (refused, postponed).

        `members` is changed in place. If `may_shrink`, newcomers are postponed first, latest deadline first; never a
        member in mid-sequence. Otherwise, and where that is not enough, the tightest deadlines are refused, because
        smaller batches cost throughput, which an overloaded queue cannot afford (early drop: Nexus, SOSP 2019).
        """
        late: list[Entry] = []
        postponed: list[Entry] = []
        tight = sorted([entry for entry in members if entry.deadline_ns is not None], key=_deadline_of)
        # Late even in a batch of one: admission judged by the fastest engine, and this one may be slower.
        while tight and not self.is_stale and self._ends_late(1, tight[0]):
            late.append(tight.pop(0))
            members.remove(late[-1])
        if may_shrink:
            spare = sorted([entry for entry in newcomers if entry in members], key=_key_of)
            while spare and len(members) > 1 and tight and self._ends_late(len(members), tight[0]):
                postponed.append(spare.pop())
                members.remove(postponed[-1])
                tight = [entry for entry in tight if entry is not postponed[-1]]
        while len(members) > 1 and tight and self._ends_late(len(members), tight[0]):
            late.append(tight.pop(0))
            members.remove(late[-1])
        return late, postponed

    def _ends_late(self, rows: int, entry: Entry) -> bool:
        return self.now_ns + self.lane.costs.mean(rows) * self.speed > _deadline_of(entry)


def _key_of(entry: Entry) -> int:
    return entry.key_ns


def _deadline_of(entry: Entry) -> float:
    return float("inf") if entry.deadline_ns is None else entry.deadline_ns
