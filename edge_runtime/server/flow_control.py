"""Whether the peer reads what is written to it."""


class WriteFlow:
    """What asyncio says with pause_writing and resume_writing.

    The transport's marks are zero, so `is_paused` means that a part of an answer has not left yet: at most one answer is
    in the transport's buffer, and an answer is delivered to the kernel once the flow is not paused.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self._unsent_bytes = 0
        self._since = 0.0

    def pause(self, now: float, unsent_bytes: int) -> None:
        """The kernel took only a part; write nothing until `resume`."""
        self.is_paused = True
        self._unsent_bytes = unsent_bytes
        self._since = now

    def resume(self) -> None:
        """Everything has left."""
        self.is_paused = False

    def is_stalled(self, now: float, unsent_bytes: int, limit_s: float) -> bool:
        """Whether the peer has read nothing for longer than `limit_s`. A slow reader is not stalled."""
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes = unsent_bytes
            self._since = now
        return self.is_paused and now - self._since > limit_s
