"""The clock of what ages."""

import sys
import time

import pytest

from edge_runtime.storage import clock


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other clocks")
def test_on_linux_it_is_the_clock_that_runs_in_suspend(monkeypatch):
    asked = []
    monkeypatch.setattr(time, "clock_gettime_ns", lambda which: asked.append(which) or 5)
    assert clock.since_boot_ns() == 5
    assert asked == [time.CLOCK_BOOTTIME]


def test_a_boot_has_one_name():
    assert len(clock.boot_id()) >= 16
    if sys.platform == "linux":
        assert clock.boot_id() == clock.boot_id()
