"""Identical rows in flight are computed once: the first request to ask leads, later ones follow.

    request A ── lead(key) ── computes ──┬── land(outcome) ──► A's own answer, and that of every follower
    request B ── join() ───── waits ─────┤
    request C ── join() ───── waits ─────┘── pass_on, abandon ──► the followers go on; the first of them leads

What the end of a leader means for its followers:

| the leader ...                        | its followers ...                                                        |
|---------------------------------------|--------------------------------------------------------------------------|
| has an outcome                        | get the same outcome                                                     |
| has a degraded one for want of time   | get the edge's answer, and decide by their own deadlines                 |
| fails (the model raised, hung)        | get the same error: asking again would run a failing row once for each   |
| is refused, or its caller is gone     | look again: deadline, place in the queue and caller were the leader's own |

A request that is more urgent than the leader of a flight (higher priority, or an earlier deadline) does not depend on
the leader's place in the queue: it runs the row for itself beside it, and takes whichever result comes first. The
flight that it leads is the one which later requests join.

Ownership: the registration of a key belongs to the request that leads it. That request ends it exactly once, by
`land`, `pass_on`, `fail` or `abandon`, on every way out. A waiter's future belongs to its follower.

Interleavings that the code guards against:
- A follower is cancelled: its own future is cancelled with it, and `land` passes over it. No other waiter notices.
- A follower is cancelled in the turn in which the flight landed: its future is done and nobody reads it. Errors are
  results of the future, not exceptions, so that none is reported as lost.
- A leader is cancelled while followers wait: `abandon` wakes all of them in one turn of the event loop. The first
  that runs finds no flight and leads; the others find its flight and join it.
- A leader lands after its key was registered again, by a more urgent request or after it abandoned the key: the
  registration is compared by identity, so that only its own flight is taken out.
"""

import asyncio
from collections.abc import Callable
from copy import copy
from typing import TypeAlias

from edge_runtime.core.outcome import Outcome
from edge_runtime.serving.cascade import Pending

#: What one follower waits for: the leader's outcome, the edge's answer to decide about, the leader's error, or None:
#: look again.
Waiter: TypeAlias = asyncio.Future[Outcome | Pending | Exception | None]


class Flight:
    """One row that is being computed for a request of this priority and deadline."""

    __slots__ = ("awaits_model", "deadline_ns", "key", "priority", "started_ns", "waiters")

    def __init__(self, key: bytes, started_ns: int, priority: int, deadline_ns: int) -> None:
        self.key, self.started_ns, self.priority, self.deadline_ns = key, started_ns, priority, deadline_ns
        self.awaits_model = (
            True  # until the model has answered: then its place in the queue does not matter any more
        )
        self.waiters: list[Waiter] = []

    def join(self) -> Waiter:
        """Wait for this flight.

        The follower joins when it finds the flight, not in a task that starts later: the flight may land in between.
        """
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def would_delay(self, priority: int, deadline_ns: int) -> bool:
        """Whether the leader's place in the queue is worse than that of such a request; priority 0 goes first."""
        return self.awaits_model and (priority < self.priority or deadline_ns < self.deadline_ns)


class SingleFlight:
    """The rows in flight, by cache key. Used inside one event loop."""

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, key: bytes) -> Flight | None:
        """Return the flight of `key` that can be joined, or None."""
        return self._flights.get(key)

    def lead(self, key: bytes, now_ns: int, priority: int, deadline_ns: int) -> Flight:
        """Register the caller as the leader of `key`, in place of one that is less urgent. The caller must end it."""
        flight = self._flights[key] = Flight(key, now_ns, priority, deadline_ns)
        return flight

    def land(self, flight: Flight, outcome: Outcome) -> None:
        """End a flight: its followers get `outcome`."""
        self._end(flight, lambda waiter: waiter.set_result(outcome))

    def pass_on(self, flight: Flight, pending: Pending) -> None:
        """End a flight whose outcome is the leader's own: its followers get the edge's answer, to decide about."""
        self._end(flight, lambda waiter: waiter.set_result(pending))

    def abandon(self, flight: Flight) -> None:
        """End a flight without an outcome: its followers look again."""
        self._end(flight, lambda waiter: waiter.set_result(None))

    def fail(self, flight: Flight, error: Exception) -> None:
        """End a flight: its followers get `error`, each a copy of its own.

        An exception collects the frames of everybody who raises it; one that is shared would hold the requests of all
        followers until the last of them is gone.
        """
        self._end(flight, lambda waiter: waiter.set_result(copy(error)))

    def _end(self, flight: Flight, wake: Callable[[Waiter], None]) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        for waiter in flight.waiters:
            if not waiter.done():
                wake(waiter)
        flight.waiters.clear()
