"""A cloud whose answers are no longer waited for once the daemon ends: callers then get the edge's own, degraded."""

import asyncio

from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.messages import InferReply, InferRequest, Reason
from edge_runtime.uplink.cloud_answer import Cloud


class InterruptibleCloud:
    """Passes everything to `cloud`, until `interrupt`."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._waiting: set[asyncio.Timeout] = set()
        self._is_interrupted = False

    def link_state(self) -> LinkState:
        """The state of the way to the cloud, now."""
        return self._cloud.link_state()

    async def ask(self, model: str, request: InferRequest, *, deadline_ns: int) -> InferReply:
        """Ask the cloud tier. Raises CloudUnavailable with the reason; `cloud_late` after `interrupt`."""
        if self._is_interrupted:
            raise _not_waited_for()
        patience = asyncio.timeout(None)
        try:
            async with patience:
                self._waiting.add(patience)
                return await self._cloud.ask(model, request, deadline_ns=deadline_ns)
        except TimeoutError:
            if not patience.expired():
                raise
            raise _not_waited_for() from None
        finally:
            self._waiting.discard(patience)

    def interrupt(self) -> None:
        """Wait for no answer any more, of requests under way either."""
        self._is_interrupted = True
        now = asyncio.get_running_loop().time()
        for patience in self._waiting:
            patience.reschedule(now)


def _not_waited_for() -> CloudUnavailable:
    return CloudUnavailable(
        Reason.CLOUD_LATE, "The runtime is shutting down and waits for the cloud no longer."
    )
