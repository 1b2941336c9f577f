"""What the service counts: requests and rows apart, and how each request ended, once, where it leaves.

A request ends in one way: served, or with the first error of one of its rows. Its rows are counted by origin and reason
if it is served; rows of other requests have no answer to be counted. What the scheduler refused and what failed in
batches is counted by row in `ModelStatistics`, beside the times of the engine. These totals belong to a model's name and
outlive its versions.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.core.errors import InvalidRequest, Refused
from edge_runtime.core.messages import RequestTotals
from edge_runtime.core.outcome import Outcome

SERVED, INVALID, FAILED, CANCELLED = "served", "invalid", "failed", "cancelled"


def ending_of(error: BaseException) -> str:
    """Return how a request ended that raised `error`; a refusal ends as "refused_" and its kind."""
    if isinstance(error, Refused):
        return f"refused_{error.kind.value}"
    if isinstance(error, InvalidRequest):
        return INVALID
    return CANCELLED if isinstance(error, asyncio.CancelledError) else FAILED


@dataclass(slots=True)
class Counters:
    """Totals by model; rows by (model, origin, reason); rows that took the outcome of an equal row."""

    outcomes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    coalesced: int = 0
    requests: dict[str, RequestTotals] = field(default_factory=dict)
    unknown_model: int = 0  # requests for models that are not loaded: their names are the callers' own

    def of(self, model: str) -> RequestTotals:
        """Return the totals of a model."""
        totals = self.requests.get(model)
        if totals is None:
            totals = self.requests[model] = RequestTotals()
        return totals

    def served(self, model: str, outcomes: Sequence[Outcome], took_ns: int, unix_ms: int) -> None:
        """Count a request that was served, and its rows."""
        totals = self.of(model)
        totals.success.add(took_ns)
        totals.rows += len(outcomes)
        totals.endings[SERVED] = totals.endings.get(SERVED, 0) + 1
        totals.last_served_ms = unix_ms
        for outcome in outcomes:
            key = (model, str(outcome.origin), str(outcome.reason))
            self.outcomes[key] = self.outcomes.get(key, 0) + 1

    def ended(self, model: str, error: BaseException, took_ns: int) -> None:
        """Count a request that ended with `error`."""
        totals, ending = self.of(model), ending_of(error)
        totals.endings[ending] = totals.endings.get(ending, 0) + 1
        totals.failures.add(took_ns)
