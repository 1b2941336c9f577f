"""The clock of everything that ages: it counts the time in which the device was suspended."""

import secrets
import sys
import time
from pathlib import Path

#: The clock that goes on in suspend. On macOS that is CLOCK_MONOTONIC, which time.monotonic does not use there.
_CLOCK: int | None = None
if sys.platform == "linux":
    _CLOCK = time.CLOCK_BOOTTIME
elif sys.platform == "darwin":
    _CLOCK = time.CLOCK_MONOTONIC


def since_boot_ns() -> int:
    """Nanoseconds since the boot, suspended time included; only differences mean something.

    `time.monotonic` stands still in suspend on Linux and macOS: by that clock a kiosk that slept for eight hours would
    give out the answers of yesterday as fresh.
    """
    return time.monotonic_ns() if _CLOCK is None else time.clock_gettime_ns(_CLOCK)


def boot_id() -> str:
    """A text that changes with each boot, and where the system has none, with each call."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return secrets.token_hex(8)  # boots cannot be told apart: across restarts the wall clock counts
