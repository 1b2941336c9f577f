"""A circuit breaker: stops asking a peer that keeps failing, and finds out by probes of its own when it is back.

    CLOSED    ── `silences` requests in a row without any reply, or faults >= rate in the window ──► OPEN
    OPEN      ── a late reply to a request ──► CLOSED;  a probe is answered ──► HALF-OPEN
    HALF-OPEN ── a request is answered ──► CLOSED;  the first fault ──► OPEN, for longer each time

Silence counts per answer and not per time: a caller every few minutes meets the same silent peer as a hundred callers
a second. It counts only after a time that would have been fair to the peer (`health`), never after a caller's own
short deadline. A refusal ("busy") is a success: the peer lives and answers. An outcome that says nothing about the
peer (the caller left, the link fell, nobody was subscribed) is not reported here at all.

While open no caller is let through, so that none waits in vain; probes go out on their own, rarely while nobody asks.
Time is an argument.
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
    """When to open and how often to probe. Durations in nanoseconds."""

    silences: int = 2  # one lost message is noise; each further silence costs a caller its whole patience
    window_ns: int = 30_000_000_000
    min_count: int = 5  # below it a rate is noise: one bad answer of one is 100 %
    fault_rate: float = 0.5
    max_outcomes: int = 256  # bounds memory under load; the newest ones decide
    probe_ns: int = 1_000_000_000  # from opening to the first probe, and between probes at least
    probe_cap_ns: int = (
        10_000_000_000  # between probes while callers ask; a quarter of the silence until then
    )
    idle_probe_ns: int = (
        300_000_000_000  # between probes while nobody asks: a probe costs 600 bytes of the link
    )
    reopen_cap_ns: int = 60_000_000_000  # for a peer that answers probes and fails requests


class Breaker:
    """One peer's breaker. One owner calls it; not thread-safe."""

    def __init__(self, limits: BreakerLimits | None = None) -> None:
        self._limits = limits or BreakerLimits()
        self._state = BreakerState.CLOSED
        self._outcomes: deque[tuple[int, bool]] = deque(maxlen=self._limits.max_outcomes)
        self._silences = 0  # in a row
        self._heard_ns: int | None = None  # the newest reply of any kind
        self._changed_ns: int | None = None  # the newest change of state
        self._is_silence = False  # why it opened
        self._interval_ns = self._limits.probe_ns
        self._opened_ns = self._probed_ns = 0
        self._is_wanted = False  # a caller was turned away since the newest probe

    @property
    def state(self) -> BreakerState:
        """The state; it changes by reports alone."""
        return self._state

    def turned_away(self) -> None:
        """Note that somebody wants to ask while it is open, so that probes are worth their cost."""
        self._is_wanted = True

    def succeeded(self, now_ns: int) -> None:
        """The peer answered a request sensibly, if only to refuse."""
        self._hear(now_ns)
        if self._state is BreakerState.CLOSED:
            self._record(now_ns, is_fault=False)
        elif self._state is BreakerState.HALF_OPEN or self._is_silence:
            # A late reply ends a silence. It says nothing where the peer answers, but with errors.
            self._interval_ns = self._limits.probe_ns
            self._change(BreakerState.CLOSED, now_ns)

    def failed(self, asked_ns: int, now_ns: int) -> None:
        """The peer answered a request of `asked_ns` with a failure of its own or with nonsense."""
        self._hear(now_ns)
        if self._is_news(asked_ns):
            self._fault(now_ns, is_silence=False)

    def silent(self, asked_ns: int, now_ns: int) -> None:
        """The peer had a fair time for a request of `asked_ns` and did not answer it."""
        if not self._is_news(asked_ns):
            return
        # Asked before the newest reply: one message was lost, while the peer answered others.
        if self._heard_ns is None or asked_ns >= self._heard_ns:
            self._silences += 1
        self._fault(now_ns, is_silence=True)

    def next_probe_ns(self) -> int | None:
        """When to send the next probe; None while it is not open."""
        if self._state is not BreakerState.OPEN:
            return None
        if self._is_wanted:
            # As the back-off of connecting: who was silent for ten seconds is found within two and a half.
            quarter_ns = min((self._probed_ns - self._opened_ns) // 4, self._limits.probe_cap_ns)
            return self._probed_ns + max(self._interval_ns, quarter_ns)
        return self._probed_ns + max(self._interval_ns, self._limits.idle_probe_ns)

    def link_renewed(self, now_ns: int) -> None:
        """There is a new connection to the peer: probe at once, whatever was found on the old one."""
        self._interval_ns = self._limits.probe_ns
        self._probed_ns = now_ns - self._interval_ns
        self._opened_ns = max(self._opened_ns, self._probed_ns)
        self._is_wanted = True

    def probe_sent(self, now_ns: int) -> None:
        """A probe is on its way."""
        self._probed_ns = now_ns
        self._is_wanted = False

    def probe_answered(self, now_ns: int) -> None:
        """The peer answered a probe: it lives, whatever it does with requests."""
        self._hear(now_ns)
        if self._state is BreakerState.OPEN:
            self._change(BreakerState.HALF_OPEN, now_ns)

    def _hear(self, now_ns: int) -> None:
        self._heard_ns = now_ns
        self._silences = 0

    def _is_news(self, asked_ns: int) -> bool:
        """Whether a fault counts: those of requests from before a change of state say nothing about now."""
        if self._state is BreakerState.OPEN:
            return False
        return self._changed_ns is None or asked_ns >= self._changed_ns

    def _fault(self, now_ns: int, *, is_silence: bool) -> None:
        if self._state is BreakerState.HALF_OPEN:
            self._open(now_ns, min(2 * self._interval_ns, self._limits.reopen_cap_ns), is_silence=is_silence)
            return
        self._record(now_ns, is_fault=True)
        outcomes = self._outcomes
        faults = sum(fault for _, fault in outcomes)
        is_often = len(outcomes) >= self._limits.min_count and faults >= self._limits.fault_rate * len(
            outcomes
        )
        if is_often or self._silences >= self._limits.silences:
            self._open(now_ns, self._limits.probe_ns, is_silence=is_silence)

    def _record(self, now_ns: int, *, is_fault: bool) -> None:
        outcomes = self._outcomes
        outcomes.append((now_ns, is_fault))
        while outcomes[0][0] <= now_ns - self._limits.window_ns:
            outcomes.popleft()

    def _open(self, now_ns: int, interval_ns: int, *, is_silence: bool) -> None:
        self._interval_ns = interval_ns
        self._opened_ns = self._probed_ns = now_ns
        self._is_wanted = True  # whoever asked last
        self._is_silence = is_silence
        self._change(BreakerState.OPEN, now_ns)

    def _change(self, state: BreakerState, now_ns: int) -> None:
        self._state = state
        self._changed_ns = now_ns
        self._silences = 0
        self._outcomes.clear()
