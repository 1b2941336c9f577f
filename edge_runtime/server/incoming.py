"""A request whose body is being read."""

import msgspec

from edge_runtime.server.byte_budget import Lease
from edge_runtime.server.events import RequestHead

#: How many bytes of a body must come within `body_stall_s`.
_PROGRESS_BYTES = 1024


class Incoming(msgspec.Struct):
    """The head, the body so far, and the lease on the bytes of it."""

    head: RequestHead
    tenant: str
    lease: Lease
    progress_at: float  # when `progress_bytes` of the body had come
    is_continue_due: bool
    body: bytes | bytearray = b""
    progress_bytes: int = 0

    def add(self, data: bytes) -> bool:
        """Keep some bytes of the body; False where the budget has no room for them."""
        self.is_continue_due = False  # the body comes unasked
        if not self.lease.resize(self.lease.size_bytes + len(data)):
            return False
        if not self.body:
            self.body = data  # most bodies come in one piece, which is then not copied
        elif isinstance(self.body, bytearray):
            self.body += data
        else:
            self.body = bytearray(self.body) + data
        return True

    def is_stalled(self, now: float, limit_s: float) -> bool:
        """Whether less than 1 KiB of the body came within the last `limit_s` seconds."""
        if len(self.body) >= self.progress_bytes + _PROGRESS_BYTES:
            self.progress_bytes, self.progress_at = len(self.body), now
        return now - self.progress_at > limit_s
