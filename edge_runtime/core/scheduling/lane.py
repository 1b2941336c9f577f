"""A lane: the requests that may share a batch, and everything that was learned about their batches."""

from collections.abc import Hashable

from edge_runtime.core.messages import LatencyProfile
from edge_runtime.core.scheduling.batch_costs import BatchCosts
from edge_runtime.core.scheduling.learned_window import Linger
from edge_runtime.core.scheduling.splitting import Split


class Lane:
    """State of one lane: costs, best split, learned window, waiting rows, running batches, members between two steps.

    `since_ns` is when rows of the lane last began to wait, `held_until_ns` the end of the window that began then.
    `is_filling`: the lane's last batch was a full one.
    """

    __slots__ = (
        "_overhead_ns",
        "confirmed_ns",
        "costs",
        "held_until_ns",
        "is_filling",
        "key",
        "linger",
        "running",
        "since_ns",
        "split",
        "staying",
        "version",
        "waiting",
    )

    def __init__(
        self,
        key: Hashable,
        max_batch: int,
        latency_profile: LatencyProfile,
        least_window_ns: int = 0,
        *,
        overhead_ns: int = 0,
        pads: bool = True,
    ) -> None:
        self.key = key
        self.costs = BatchCosts(max_batch, latency_profile, pads=pads)
        self.linger = Linger(least_window_ns)
        self._overhead_ns = overhead_ns
        self.waiting = 0
        self.running = 0
        self.confirmed_ns = 0  # when a batch last confirmed or corrected the costs
        self.is_filling = False
        self.since_ns = 0
        self.held_until_ns = 0
        self.staying: dict[
            int, None
        ] = {}  # ids of members between two steps, longest first; they are counted in `waiting`
        self.refresh()

    def forget_time(self, start_ns: int, gap_ns: int) -> None:
        """Record that nothing arrived and no batch ran for `gap_ns` from `start_ns` on."""
        if self.since_ns <= start_ns:
            self.since_ns += gap_ns
            self.held_until_ns += gap_ns
        if self.confirmed_ns <= start_ns:
            self.confirmed_ns += gap_ns
        self.linger.forget_time(start_ns, gap_ns)

    def refresh(self) -> None:
        """Recompute what is derived from the costs: the best splits and the learned window."""
        self.version = self.costs.version
        self.split = Split(self.costs.sizes, self.costs.means, self._overhead_ns)
        self.linger.set_costs(*self.costs.fixed_and_marginal())
