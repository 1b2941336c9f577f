"""The cloud as rows may wait for it: until a drain ends, and not a moment longer.

A daemon that shuts down owes an answer to every request that it took. Rows that wait for the cloud have one already, the
edge's; they get it when the time of the drain is over, whatever the cloud does.

Interleavings that the code guards against:
- The drain begins while rows wait: each wait is an `asyncio.timeout` whose end is moved, so no wait is cancelled from
  outside, and a wait that ends in the same turn with an answer has that answer.
- A row asks after the drain began: its wait ends at the same time.
"""

import asyncio

from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.messages import InferReply, InferRequest, Reason
from edge_runtime.uplink.cloud_answer import Cloud


class BoundedCloud:
    """See `uplink.cloud_answer.Cloud`."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._waits: set[asyncio.Timeout] = set()
        self._ends_s: float | None = None  # by the clock of the event loop

    def end_by(self, ends_s: float) -> None:
        """Let nobody wait for the cloud beyond this time of the event loop's clock."""
        self._ends_s = ends_s
        for wait in self._waits:
            wait.reschedule(ends_s)

    @property
    def is_authenticated(self) -> bool:
        """See `Cloud.is_authenticated`."""
        return self._cloud.is_authenticated

    def link_state(self, model: str) -> LinkState:
        """See `Cloud.link_state`."""
        return self._cloud.link_state(model)

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """See `Cloud.ask`; raises CloudUnavailable at the end of the drain, too."""
        try:
            async with asyncio.timeout_at(self._ends_s) as wait:
                self._waits.add(wait)
                try:
                    return await self._cloud.ask(model, request, deadline_ns=deadline_ns)
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise CloudUnavailable(
                Reason.CLOUD_LATE, "The runtime shuts down and does not wait for the cloud any longer."
            ) from None
