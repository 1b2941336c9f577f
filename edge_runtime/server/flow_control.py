"""Whether the peer reads what is written to it."""


class WriteFlow:
    """What asyncio says with pause_writing and resume_writing: above and below the transport's marks."""

    def __init__(self) -> None:
        self.is_paused = False
        self.paused_at = 0.0

    def pause(self, now: float) -> None:
        """The transport holds more than its high mark; write nothing until `resume`."""
        self.is_paused = True
        self.paused_at = now

    def resume(self) -> None:
        """The transport is below its low mark again."""
        self.is_paused = False

    def is_stalled(self, now: float, limit_s: float) -> bool:
        """Whether the peer has left the transport full for longer than `limit_s`."""
        return self.is_paused and now - self.paused_at > limit_s
