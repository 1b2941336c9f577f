"""The connections of one listener: how many are served, and which gives way when there are too many.

A connection is never dropped without a word. Beyond the limit, the one that has been idle for longest is closed with an
answer that says so; a peer that is sending, waiting for an answer, reading one, or whose bytes wait in the kernel is not
idle. Where none is idle for long enough, the new connection becomes a spare: its request is read, a health check is
answered, and anything else is refused with 503. Of the spares the oldest gives way, so that a health check, which sends
its request at once, is always answered.
"""

from collections.abc import Iterator
from typing import Protocol

from edge_runtime.server.counters import HttpCounters
from edge_runtime.server.events import Refusal
from edge_runtime.server.limits import HttpLimits

SHED = Refusal(
    503, "This connection was idle and gives way to another one; open a new one.", "idle_connection", 1.0
)
TOO_MANY = Refusal(
    503, "Too many connections ([server] max_connections); retry later.", "connections", retry_after_s=1.0
)


class Peer(Protocol):
    """What the table asks of a connection."""

    since: float

    def is_idle(self) -> bool: ...
    def refuse(self, refusal: Refusal) -> None: ...
    def abort(self) -> None: ...


class ConnectionTable:
    """Served connections, spares, and those that only wait for their end. Each is an ordered set."""

    def __init__(self, limits: HttpLimits, counters: HttpCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._served: dict[Peer, None] = {}
        self._spare: dict[Peer, None] = {}
        self._ending: dict[Peer, None] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter([*self._served, *self._spare, *self._ending])

    def __len__(self) -> int:
        return len(self._served) + len(self._spare) + len(self._ending)

    def admit(self, peer: Peer, now: float) -> bool:
        """Take a new connection; True as served, False as spare."""
        if self.serve(peer) or (self._shed(now) and self.serve(peer)):
            return True
        if len(self._spare) >= self._limits.spare_connections:
            next(iter(self._spare)).refuse(TOO_MANY)
        self._spare[peer] = None
        return False

    def serve(self, peer: Peer) -> bool:
        """Whether a connection is served; a spare one takes a place that has become free."""
        if peer not in self._served:
            if len(self._served) >= self._limits.connections:
                return False
            self._spare.pop(peer, None)
            self._served[peer] = None
        return True

    def ending(self, peer: Peer) -> None:
        """Give the connection's place to others: it was answered for the last time and waits for the peer's end."""
        self.lost(peer)
        self._ending[peer] = None
        if len(self._ending) > self._limits.connections:
            next(iter(self._ending)).abort()

    def lost(self, peer: Peer) -> None:
        """Forget a connection."""
        for peers in (self._served, self._spare, self._ending):
            peers.pop(peer, None)

    def _shed(self, now: float) -> bool:
        """Close the connection that has been idle for longest; False where none has been for long enough."""
        latest = now - self._limits.idle_before_shed_s
        for peer in sorted(self._served, key=lambda one: one.since):
            if peer.since > latest:
                return False
            if peer.is_idle():
                peer.refuse(SHED)
                return True
        return False
