"""A lane: what may share a batch, with all that was learned about its batches."""

from collections.abc import Hashable

from edge_runtime.core.messages import LatencyProfile
from edge_runtime.core.scheduling.batch_costs import BatchCosts
from edge_runtime.core.scheduling.learned_window import Linger
from edge_runtime.core.scheduling.splitting import Split


class Lane:
    """State of one lane: costs, how they split, its window, how many rows wait, batches run, and who must be next.

    `since_ns` is when it last began to wait, `held_until_ns` when the window ends that began then;
    `is_filling`: its last batch was a full one.
    """

    __slots__ = (
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
        pads: bool = True,
    ) -> None:
        self.key = key
        self.costs = BatchCosts(max_batch, latency_profile, pads=pads)
        self.linger = Linger(least_window_ns)
        self.waiting = 0
        self.running = 0
        self.confirmed_ns = 0  # when its costs were last checked by a batch
        self.is_filling = False
        self.since_ns = 0
        self.held_until_ns = 0
        self.staying: dict[int, None] = {}  # ids of those between two steps, longest first; they wait, too
        self.refresh()

    def refresh(self) -> None:
        """Derive again what follows from the costs."""
        self.version = self.costs.version
        self.split = Split(self.costs.sizes, self.costs.means)
        self.linger.set_costs(*self.costs.fixed_and_marginal())
