"""What the kernel knows of a peer's socket and asyncio does not tell."""

import array
import fcntl
import select
import socket
import struct
import termios
from typing import Any

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def unread_bytes(connected: Any) -> int:
    """Bytes that have arrived and were not read yet; 0 where the kernel does not say."""
    waiting = array.array("i", [0])
    try:
        fcntl.ioctl(connected.fileno(), termios.FIONREAD, waiting)
    except (OSError, ValueError):
        return 0
    return waiting[0]


def has_hung_up(connected: Any) -> bool:
    """Whether the peer is gone in both directions, rather than only done with sending.

    A Unix socket shows it at once. TCP shows it only after the peer answered something with a reset.
    """
    poll = select.poll()
    try:
        poll.register(connected.fileno(), 0)  # hang-up and error are always reported
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True


def user_of(connected: Any) -> int | None:
    """The user id of the process at the other end of a Unix socket; None for TCP and where the system has no such."""
    if connected is None or connected.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(raw)[1]
    return user
