"""How long a request waits for company although an engine is idle: a learned window, a fixed one, or a duty target."""

from dataclasses import dataclass

from edge_runtime.core.scheduling.lane import Lane


@dataclass(frozen=True, slots=True)
class Policy:
    """When requests wait although an engine is idle.

    - `window_ns`: None to learn it, 0 for no window, else a fixed time from the arrival of a lane's first request.
    - `duty_target`: the largest share of time that engines should run; None: no limit. Requests wait for it as long as
      their deadlines allow, but at most `duty_wait_ns`.
    - `tick_ns`: the resolution of the owner's timer. No shorter window is learned.
    - `overhead_ns`: what a batch costs its owner outside the engine. It speaks for few, large batches.
    """

    window_ns: int | None = None
    duty_target: float | None = None
    duty_wait_ns: int = 100_000_000
    tick_ns: int = 0
    overhead_ns: int = 0


class Windows:
    """Applies a policy to the only lane with waiting requests. Times in nanoseconds."""

    __slots__ = ("_policy", "_saved_at_ns", "_saved_ns")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._saved_ns = 0.0  # engine time that `duty_target` allows and that was not used
        self._saved_at_ns = 0

    @property
    def has_duty(self) -> bool:
        """Whether there is a duty target, which holds requests however many lanes wait."""
        return self._policy.duty_target is not None

    def began(self, now_ns: int, lane: Lane, *, finds_idle: bool) -> None:
        """Record the first request of a lane; `finds_idle`: an engine had room and nothing else waited."""
        lane.linger.arrived(now_ns, opens=finds_idle)
        window_ns = self._policy.window_ns
        if window_ns is None:
            window_ns = lane.linger.window_ns if finds_idle else 0
        lane.since_ns = now_ns
        lane.held_until_ns = now_ns + window_ns

    def until(self, now_ns: int, lane: Lane, speed: float) -> int:
        """The time until which the lane is held, deadlines aside; `now_ns` or earlier: not held. A full batch never is."""
        if lane.staying:
            return now_ns
        until_ns = now_ns if lane.waiting >= lane.costs.sizes[-1] else lane.held_until_ns
        if self._policy.duty_target is not None:
            until_ns = max(until_ns, self._saved_up(now_ns, lane, speed, self._policy.duty_target))
        return until_ns

    def spend(self, engine_ns: float) -> None:
        """Record predicted engine time that a dispatched batch uses."""
        self._saved_ns -= engine_ns

    def forget_time(self, start_ns: int, gap_ns: int) -> None:
        """Record that no engine ran for `gap_ns` from `start_ns` on, which saves no engine time."""
        if self._saved_at_ns <= start_ns:
            self._saved_at_ns += gap_ns

    def _saved_up(self, now_ns: int, lane: Lane, speed: float, target: float) -> int:
        """The time at which the duty target allows the next batch of this lane."""
        costs = lane.costs
        need_ns = costs.mean(min(lane.waiting, costs.sizes[-1])) * speed
        most_ns = 2 * costs.means[-1] * speed
        # A token bucket clamped to +-2 full batches, so that neither a long idle period nor a long overload affects the
        # next hour.
        saved_ns = max(self._saved_ns, -most_ns) + (now_ns - self._saved_at_ns) * target
        self._saved_ns = min(saved_ns, most_ns)
        self._saved_at_ns = now_ns
        if self._saved_ns >= need_ns:
            return now_ns
        enough_ns = now_ns + int((need_ns - self._saved_ns) / target) + 1
        return min(enough_ns, lane.since_ns + self._policy.duty_wait_ns)
