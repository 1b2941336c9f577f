"""A circuit breaker: stops asking a peer that keeps failing, and finds out with one probe when it is back.

    CLOSED ── faults >= rate of at least `min_count` outcomes in the window ──► OPEN
    OPEN ── `open_ns` later, the first caller ──► HALF-OPEN (exactly one probe is out)
    HALF-OPEN ── probe succeeds ──► CLOSED;  probe fails ──► OPEN;  probe abandoned ──► the next caller probes

Every permit ends with exactly one of `succeeded`, `failed` and `abandoned`. A refusal ("busy") is a
success here: the peer lives and answers. An outcome that says nothing about the peer (the caller left, the
link fell, nobody was subscribed) is abandoned. Time is an argument.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """What the breaker does with the next caller."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When to open and for how long. Durations in nanoseconds."""

    window_ns: int = 30_000_000_000
    min_count: int = 5  # below it a rate is noise: one bad answer of one is 100 %
    fault_rate: float = 0.5
    open_ns: int = 10_000_000_000
    max_outcomes: int = 256  # bounds memory under load; the newest ones decide


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission to ask once; to be given back with the outcome."""

    generation: int
    is_probe: bool


class Breaker:
    """One peer's breaker. One owner calls it; not thread-safe."""

    def __init__(self, limits: BreakerLimits | None = None) -> None:
        self._limits = limits or BreakerLimits()
        self._outcomes: deque[tuple[int, bool]] = deque(maxlen=self._limits.max_outcomes)
        self._generation = 0  # outcomes of permits given before a change of state are ignored
        self._opened_ns: int | None = None
        self._is_probing = False

    def state(self, now_ns: int) -> BreakerState:
        """The state at `now_ns`; OPEN also while the one probe is out."""
        if self._opened_ns is None:
            return BreakerState.CLOSED
        if self._is_probing or now_ns - self._opened_ns < self._limits.open_ns:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    def permit(self, now_ns: int) -> Permit | None:
        """Return permission to ask, or None while open. In half-open the permit is the probe."""
        state = self.state(now_ns)
        if state is BreakerState.OPEN:
            return None
        if state is BreakerState.HALF_OPEN:
            self._is_probing = True
            return Permit(self._generation, is_probe=True)
        return Permit(self._generation, is_probe=False)

    def succeeded(self, permit: Permit, now_ns: int) -> None:
        """The peer answered, if only to refuse."""
        if permit.generation != self._generation:
            return
        if permit.is_probe:
            self._change(None)
        else:
            self._record(now_ns, is_fault=False)

    def failed(self, permit: Permit, now_ns: int) -> None:
        """The peer did not answer in time, or answered nonsense."""
        if permit.generation != self._generation:
            return
        if permit.is_probe:
            self._change(now_ns)
        else:
            self._record(now_ns, is_fault=True)

    def abandoned(self, permit: Permit) -> None:
        """Nothing was learned about the peer; the next caller may probe."""
        if permit.generation == self._generation and permit.is_probe:
            self._is_probing = False

    def _record(self, now_ns: int, *, is_fault: bool) -> None:
        outcomes = self._outcomes
        outcomes.append((now_ns, is_fault))
        while outcomes[0][0] <= now_ns - self._limits.window_ns:
            outcomes.popleft()
        if not is_fault or len(outcomes) < self._limits.min_count:
            return
        faults = sum(fault for _, fault in outcomes)
        if faults >= self._limits.fault_rate * len(outcomes):
            self._change(now_ns)

    def _change(self, opened_ns: int | None) -> None:
        self._generation += 1
        self._opened_ns = opened_ns
        self._is_probing = False
        self._outcomes.clear()
