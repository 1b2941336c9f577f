"""What is known of the workers that serve one model: whether they answer, how fast, since when they are silent.

Each model has a health of its own, because other workers may serve it, at another speed: the silence or slowness of one
model must not keep callers of another from the cloud.
"""

from edge_runtime.core.escalation.breaker import Breaker, BreakerLimits, BreakerState
from edge_runtime.core.escalation.outstanding import Outstanding
from edge_runtime.core.escalation.roundtrip import RoundTrip


class Health:
    """Told what was sent and what came back; `tick` finds what did not. Times are arguments."""

    def __init__(self, patience_ns: int, limits: BreakerLimits | None = None) -> None:
        """`patience_ns` is the shortest time after which silence is a fault, whatever deadline a caller has."""
        self.breaker = Breaker(limits)
        self.roundtrip = RoundTrip()
        self._outstanding = Outstanding()
        self._patience_ns = patience_ns
        #: When the first of the requests was asked that all went unanswered; None once a reply has come.
        self.silent_since_ns: int | None = None
        #: Since when the broker says that nobody is subscribed; None where somebody is.
        self.absent_since_ns: int | None = None
        #: Whether the broker's "nobody is subscribed" was true so far.
        self.is_absence_true = True
        self._absent: bytes | None = None

    def fair_ns(self, now_ns: int) -> int:
        """How long a peer may take before its silence is a fault."""
        return max(self._patience_ns, self.roundtrip.p95_ns(now_ns))

    def sent(self, request_id: bytes, now_ns: int) -> None:
        """A request left this device; what it waited before that is not the peer's time."""
        self._outstanding.sent(request_id, now_ns)

    def withdrawn(self, request_id: bytes) -> None:
        """The broker refused the request: its silence says nothing about the workers."""
        self._outstanding.withdraw(request_id)

    def absent(self, request_id: bytes, now_ns: int) -> None:
        """The broker says that nobody is subscribed (MQTT reason 0x10)."""
        self._outstanding.withdraw(request_id)
        self._absent = request_id
        if self.absent_since_ns is None:
            self.absent_since_ns = now_ns

    def delivered(self) -> None:
        """The broker passed a request on to somebody."""
        self.absent_since_ns = None

    def link_lost(self) -> None:
        """Nothing can come for what was asked on a lost connection."""
        self._outstanding.withdraw_all()

    def knows(self, request_id: bytes) -> bool:
        """Whether a request of this id was sent and not answered yet."""
        return request_id in self._outstanding

    def answered(self, request_id: bytes, now_ns: int, *, is_fault: bool) -> None:
        """A reply came to a request that is known, to a caller or too late for it."""
        asked = self._outstanding.answered(request_id)
        if asked is None:
            return
        if request_id == self._absent:
            # mosquitto 2.0.19 says 0x10 for every message (its issue 3128).
            self.is_absence_true = False
        self.silent_since_ns = self.absent_since_ns = None
        if is_fault:
            self.breaker.failed(asked.first_ns, now_ns)
        else:
            # From the last copy: that is too short where the reply is to an earlier one, and then the next request is
            # asked again later, so that it measures right. From the first copy it would be too long where that was
            # lost, and each loss would double the time to the next resend.
            self.roundtrip.observe(now_ns, now_ns - asked.last_ns)
            self.breaker.succeeded(now_ns)

    def probe_answered(self, now_ns: int) -> None:
        """A worker answered a probe."""
        self.silent_since_ns = self.absent_since_ns = None
        self.breaker.probe_answered(now_ns)

    def tick(self, now_ns: int) -> bool:
        """Find requests that got no answer in a fair time; return whether a probe is due."""
        for asked_ns in self._outstanding.silent(now_ns, self.fair_ns(now_ns)):
            if self.silent_since_ns is None:
                self.silent_since_ns = asked_ns
            self.breaker.silent(asked_ns, now_ns)
        due_ns = self.breaker.next_probe_ns()
        return due_ns is not None and now_ns >= due_ns

    def next_tick_ns(self, now_ns: int) -> int | None:
        """When `tick` has something to find next; None while nothing is open."""
        first_ns = self._outstanding.first_ns()
        times = [self.breaker.next_probe_ns(), None if first_ns is None else first_ns + self.fair_ns(now_ns)]
        return min([time for time in times if time is not None], default=None)

    def forgive(self, gap_ns: int) -> None:
        """Leave out a time in which this process did not run (suspended, stopped, a blocked event loop)."""
        self._outstanding.forgive(gap_ns)

    @property
    def is_open(self) -> bool:
        """Whether callers are kept from asking."""
        return self.breaker.state is BreakerState.OPEN
