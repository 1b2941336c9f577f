"""A step engine that knows which of its states are open, so that each is released exactly once."""

import logging
from collections.abc import Sequence

from edge_runtime.core.messages import Row
from edge_runtime.engines import Step, StepEngine

_log = logging.getLogger(__name__)


class OpenStates:
    """A step engine that knows which states are open. All calls come from the engine's thread.

    Its handles are numbers of its own that are never used again: engines number slots, and the late release of an
    ended member must not meet the member that has the slot now.
    """

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._handles: dict[int, int] = {}  # ours -> the engine's
        self._next = 0

    @property
    def max_batch(self) -> int:
        """The most members of one step."""
        return self._engine.max_batch

    def open(self, row: Row) -> int:
        """See `StepEngine.open`."""
        handle = self._engine.open(row)
        self._next += 1
        self._handles[self._next] = handle
        return self._next

    def step(self, handles: Sequence[int], rows: Sequence[Row]) -> Sequence[Step]:
        """See `StepEngine.step`."""
        known = self._handles
        return self._engine.step([known[handle] for handle in handles], rows)

    def release(self, handle: int) -> None:
        """Free the state of a member, if it is still open. What the engine raises is logged: nobody waits for it."""
        known = self._handles.pop(handle, None)
        if known is None:
            return
        try:
            self._engine.release(known)
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            _log.error("event=release_failed error=%r", error)

    def close(self) -> None:
        """Free all states that are open, then the model."""
        for handle in list(self._handles):
            self.release(handle)
        self._engine.close()
