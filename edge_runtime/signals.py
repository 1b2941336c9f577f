"""Leaving off when asked to stop: the one place that handles signals, for both tiers' daemons."""

import asyncio
import atexit
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once with exit code 1.

    It belongs to a process of its own, in the main thread of a running loop. What comes after this block is not
    undone: a loop that closes gives signals their deadly default back, and a second SIGTERM in those milliseconds
    would end the process as if nobody had handled the first.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # asked twice: the operator does not want to wait for the drain
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, lambda *_: os._exit(1))
        atexit.register(_ignore)


def _ignore() -> None:
    """The interpreter's own end takes no signals: its exit code is already decided."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; once `stop` is set, cancel it, wait for its end and return None."""
    working = asyncio.create_task(work, name="work")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        return None
    finally:
        stopping.cancel()
        working.cancel()
