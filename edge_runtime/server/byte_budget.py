"""One bound on the bytes that all connections of a daemon hold together: bodies coming in, answers going out.

A cap on each peer alone bounds nothing: 256 peers with an unfinished upload of 8 MiB each would hold 2 GiB. Bytes
are counted when they arrive, not when they are announced, so that nobody reserves memory with a header.
"""

import msgspec

#: A body or answer up to this size may use the whole budget, a larger one three quarters of it: uploads that are never
#: finished cannot keep commands out.
SMALL_BYTES = 64 << 10


class ByteBudget:
    """How much is held, and at most."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def has_room(self, size_bytes: int, more_bytes: int) -> bool:
        """Whether something of `size_bytes` may grow by `more_bytes`."""
        limit = self.limit_bytes if size_bytes + more_bytes <= SMALL_BYTES else self.limit_bytes * 3 // 4
        return more_bytes <= 0 or self.held_bytes + more_bytes <= limit


class Lease(msgspec.Struct, gc=False):
    """What one request holds: its body, then its answer. The owner of a lease releases it, however the request ends.

    After `release` it holds nothing and cannot grow: a task that was cancelled may run once more.
    """

    budget: ByteBudget
    size_bytes: int = 0
    is_released: bool = False

    def resize(self, size_bytes: int) -> bool:
        """Hold `size_bytes` from now on; False, and no change, where that is not free. To shrink always succeeds."""
        more, budget = size_bytes - self.size_bytes, self.budget
        if self.is_released or (more > 0 and not budget.has_room(self.size_bytes, more)):
            return False
        budget.held_bytes += more
        self.size_bytes = size_bytes
        return True

    def release(self) -> None:
        """Hold nothing, for good. Idempotent."""
        self.budget.held_bytes -= self.size_bytes
        self.size_bytes = 0
        self.is_released = True
