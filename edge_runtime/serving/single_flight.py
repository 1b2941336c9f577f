"""Identical rows in flight are computed once: the first request to ask leads, later ones follow.

    request A ── lead(key) ── computes ──┬── land(outcome) ──► A's own answer, and that of every follower
    request B ── join(key) ── waits ─────┤
    request C ── join(key) ── waits ─────┘── abandon ──► the followers look again; the first of them leads

What the end of a leader means for its followers:

| the leader ...                       | its followers ...                                                        |
|--------------------------------------|--------------------------------------------------------------------------|
| has an outcome                       | get the same outcome                                                     |
| fails (the model raised, hung)       | get the same error: asking again would run a failing row once for each  |
| is refused, or its caller is gone    | look again: deadline, place in the queue and caller were the leader's own |

Ownership: the registration of a key belongs to the request that leads it. That request ends it exactly once, by
`land`, `fail` or `abandon`, on every way out. A waiter's future belongs to its follower.

Interleavings that the code guards against:
- A follower is cancelled: its own future is cancelled with it, and `land` passes over it. No other waiter notices.
- A follower is cancelled in the turn in which the flight landed: its future is done and nobody reads it; a future
  with an exception is marked as read for that case.
- A leader is cancelled while followers wait: `abandon` wakes all of them in one turn of the event loop. The first
  that runs finds no flight and leads; the others find its flight and join it.
- A leader lands after its key was registered again (it had abandoned it): the registration is compared by
  identity, so that only its own flight is taken out.
"""

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from edge_runtime.core.outcome import Outcome

#: What one follower waits for.
Waiter: TypeAlias = asyncio.Future[Outcome | None]


class Flight:
    """One row that is being computed."""

    __slots__ = ("key", "waiters")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.waiters: list[Waiter] = []

    def join(self) -> Waiter:
        """Wait for this flight: the future is set to the leader's outcome, or its error.

        It is set to None where the leader abandoned the flight: then the follower must look again. The follower joins
        when it finds the flight, not in a task that starts later: the flight may land in between.
        """
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter


class SingleFlight:
    """The rows in flight, by cache key. Used inside one event loop."""

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, key: bytes) -> Flight | None:
        """Return the flight of `key` that can be joined, or None."""
        return self._flights.get(key)

    def lead(self, key: bytes) -> Flight:
        """Register the caller as the leader of `key`, which has no flight. The caller must end it."""
        flight = self._flights[key] = Flight(key)
        return flight

    def land(self, flight: Flight, outcome: Outcome) -> None:
        """End a flight: its followers get `outcome`."""
        self._end(flight, lambda waiter: waiter.set_result(outcome))

    def abandon(self, flight: Flight) -> None:
        """End a flight without an outcome: its followers look again."""
        self._end(flight, lambda waiter: waiter.set_result(None))

    def fail(self, flight: Flight, error: Exception) -> None:
        """End a flight: its followers get `error`."""

        def wake(waiter: Waiter) -> None:
            waiter.set_exception(error)
            waiter.exception()  # mark as read: its follower may be cancelled in this turn

        self._end(flight, wake)

    def _end(self, flight: Flight, wake: Callable[[Waiter], None]) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        for waiter in flight.waiters:
            if not waiter.done():
                wake(waiter)
        flight.waiters.clear()
