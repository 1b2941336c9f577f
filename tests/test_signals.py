"""Signals from the first to the last moment of a process: its exit code never says that nobody handled them."""

import subprocess
import sys

import pytest

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
