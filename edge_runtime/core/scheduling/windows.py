"""When an idle engine waits although somebody does: learned, fixed, or to keep its duty down."""

from dataclasses import dataclass

from edge_runtime.core.scheduling.lane import Lane


@dataclass(frozen=True, slots=True)
class Policy:
    """`window_ns`: None for learned, 0 for never, else counted from the arrival of the first of a lane.

    `duty_target` is the share of time that engines should run at most (None: they run whenever there is work);
    for it requests wait as long as their deadlines allow, and `duty_wait_ns` at most. `tick_ns` is what the owner's
    timer can tell apart: no shorter window is learned.
    """

    window_ns: int | None = None
    duty_target: float | None = None
    duty_wait_ns: int = 100_000_000
    tick_ns: int = 0


class Windows:
    """Applies a policy to the one lane that waits. Times in nanoseconds."""

    __slots__ = ("_policy", "_saved_at_ns", "_saved_ns")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._saved_ns = 0.0  # engine time saved up under `duty_target`
        self._saved_at_ns = 0

    @property
    def has_duty(self) -> bool:
        """Whether requests are held for the engine's sake, however many lanes wait."""
        return self._policy.duty_target is not None

    def began(self, now_ns: int, lane: Lane, *, finds_idle: bool) -> None:
        """The first request of a lane arrived; `finds_idle`: at a free engine, with nothing else waiting."""
        lane.linger.arrived(now_ns, opens=finds_idle)
        window_ns = self._policy.window_ns
        if window_ns is None:
            window_ns = lane.linger.window_ns if finds_idle else 0
        lane.since_ns = now_ns
        lane.held_until_ns = now_ns + window_ns

    def until(self, now_ns: int, lane: Lane, speed: float) -> int:
        """When the lane may go, deadlines aside; `now_ns` or before: now. No window holds a full batch."""
        if lane.staying:
            return now_ns
        until_ns = now_ns if lane.waiting >= lane.costs.sizes[-1] else lane.held_until_ns
        if self._policy.duty_target is not None:
            until_ns = max(until_ns, self._saved_up(now_ns, lane, speed, self._policy.duty_target))
        return until_ns

    def spend(self, engine_ns: float) -> None:
        """Note that an engine is to run."""
        self._saved_ns -= engine_ns

    def _saved_up(self, now_ns: int, lane: Lane, speed: float, target: float) -> int:
        """When enough engine time is saved up for a batch of what waits."""
        costs = lane.costs
        need_ns = costs.mean(min(lane.waiting, costs.sizes[-1])) * speed
        # For two full batches at most, or a quiet hour would pay for a busy one.
        most_ns = 2 * costs.means[-1] * speed
        # And no deeper in debt, or an hour of deadlines that left no choice would slow the next one.
        saved_ns = max(self._saved_ns, -most_ns) + (now_ns - self._saved_at_ns) * target
        self._saved_ns = min(saved_ns, most_ns)
        self._saved_at_ns = now_ns
        if self._saved_ns >= need_ns:
            return now_ns
        enough_ns = now_ns + int((need_ns - self._saved_ns) / target) + 1
        return min(enough_ns, lane.since_ns + self._policy.duty_wait_ns)
