"""The clock of everything that ages: it counts the time in which the device was suspended."""

import secrets
import sys
import time
from pathlib import Path


def since_boot_ns() -> int:
    """Nanoseconds since the boot, suspended time included; only differences mean something.

    `time.monotonic` stands still in suspend on Linux and macOS: by that clock a kiosk that slept for eight hours would
    give out the answers of yesterday as fresh.
    """
    if sys.platform == "linux":
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":
        return time.clock_gettime_ns(
            time.CLOCK_MONOTONIC
        )  # on macOS this one counts on, unlike time.monotonic
    return time.monotonic_ns()


def boot_id() -> str:
    """A text that changes with each boot, and where the system has none, with each call."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return secrets.token_hex(8)  # boots cannot be told apart: across restarts the wall clock counts
