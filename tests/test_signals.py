"""Signals from the first to the last moment of a process: its exit code never says that nobody handled them."""

import asyncio
import subprocess
import sys

import pytest

from edge_runtime.signals import unless_stopped

PROGRAM = """
import asyncio, atexit, os, signal, sys
from edge_runtime.signals import stop_signals

def again():
    os.kill(os.getpid(), signal.SIGTERM)

if sys.argv[1] == "at exit":
    atexit.register(again)  # registered first, so it runs last

async def main():
    with stop_signals() as stop:
        again()
        await asyncio.wait_for(stop.wait(), 10)
        if sys.argv[1] == "inside":
            again()
            await asyncio.Event().wait()
    if sys.argv[1] == "in the loop":
        again()

if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
if sys.argv[1] == "after the loop":
    again()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("when", "code"),
    [("never", 0), ("inside", 1), ("in the loop", 1), ("after the loop", 1), ("at exit", 0)],
)
def test_a_second_signal_is_handled_whenever_it_comes(when, code, loop):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, when, loop], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr


def test_a_stop_ends_the_work_and_waits_for_its_end():
    ended = []

    async def work(stop):
        try:
            stop.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def scenario():
        stop = asyncio.Event()
        async with asyncio.timeout(10):
            assert await unless_stopped(stop, work(stop)) is None
        assert ended == ["cleaned up"]

    asyncio.run(scenario())


def test_without_a_stop_the_work_returns_or_raises_as_it_does():
    async def returns():
        return 7

    async def raises():
        raise ValueError("mine")

    async def scenario():
        stop = asyncio.Event()
        assert await unless_stopped(stop, returns()) == 7
        with pytest.raises(ValueError, match="mine"):
            await unless_stopped(stop, raises())

    asyncio.run(scenario())


def test_a_caller_cancelled_while_its_work_ends_stays_cancelled():
    async def stubborn(stop, leaves):
        stop.set()
        try:
            await asyncio.Event().wait()
        finally:
            await leaves.wait()

    async def scenario():
        stop, leaves = asyncio.Event(), asyncio.Event()
        caller = asyncio.create_task(unless_stopped(stop, stubborn(stop, leaves)))
        await stop.wait()
        for _ in range(3):  # now it waits for the end of the work
            await asyncio.sleep(0)
        caller.cancel()
        leaves.set()
        with pytest.raises(asyncio.CancelledError):
            await caller

    asyncio.run(scenario())
