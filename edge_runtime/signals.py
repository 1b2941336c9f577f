"""How a process stops when it is asked to: the one place that handles signals, for the daemons of both tiers."""

import asyncio
import atexit
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once with exit code 1.

    Use it once in a process, in the main thread, inside a running loop. The handlers that were there before are
    deliberately not restored: closing the loop would reinstall SIG_DFL, and a second SIGTERM in those milliseconds would
    end the process with the exit code of an unhandled signal.
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
    """Ignore signals while the interpreter ends: the exit code is already decided."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; once `stop` is set, cancel it, wait for its end and return None.

    Raises what `work` raises, also at its end after a stop.
    """
    working = asyncio.create_task(work, name="work")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        # Not `await working`: the CancelledError of a caller that is cancelled here would look like that of `working`,
        # and one of the two would be swallowed.
        await asyncio.wait({working})
        if not working.cancelled():
            working.result()
        return None
    finally:
        stopping.cancel()
        working.cancel()
