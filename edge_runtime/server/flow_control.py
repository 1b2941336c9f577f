"""Whether the peer reads what is written to it."""

#: Bytes that the transport keeps before the flow is paused. With 0 each answer would be written at once: uvloop then
#: makes a system call within the turn of the loop instead of one for all at its end, which took a tenth of the rate.
HIGH_MARK_BYTES = 64 << 10


class WriteFlow:
    """What asyncio says with pause_writing and resume_writing.

    The transport's low mark is zero, so a paused flow resumes only once everything has left for the kernel. Beyond the
    high mark a peer that does not read has at most one answer in the transport's buffer.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self._unsent_bytes = 0
        self._since = 0.0

    def pause(self, now: float, unsent_bytes: int) -> None:
        """The transport holds more than its high mark; write nothing until `resume`."""
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
