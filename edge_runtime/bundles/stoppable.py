"""Blocking work in a thread that a cancelled caller ends: loading must not hold up the event loop, nor outlive it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - a signal to the work, never seen outside
    """The caller of this work was cancelled."""


class Stop:
    """Tells work in a thread to end. `set` belongs to the caller, the rest to the work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._call: Callable[[], None] | None = None

    def set(self) -> None:
        """End the work: call what it registered now, and let its next `check` raise."""
        with self._lock:
            self._is_set = True
            call = self._call
        if call is not None:
            call()

    def check(self) -> None:
        """Raise Stopped if the work is to end; between steps that cannot be interrupted."""
        if self._is_set:
            raise Stopped

    @contextmanager
    def calls(self, call: Callable[[], None]) -> Iterator[None]:
        """Within the block `set` calls `call`, from another thread. Raises Stopped at the end if it did."""
        with self._lock:
            self._call = call
        self.check()  # after registering: `set` either sees the call or is seen here
        try:
            yield
        finally:
            with self._lock:
                self._call = None
        self.check()


async def run_stoppable(work: Callable[[Stop], T], name: str) -> T:
    """Run `work` in a thread of its own and return its result; raises what it raises.

    Interleaving: the caller can be cancelled at any moment of the work, and again while the work ends. The first cancel
    stops the work; this function then returns only once the thread has ended, however often it is cancelled, so that
    nothing runs on and nothing is written after the caller has gone.
    """
    stop = Stop()
    with ThreadPoolExecutor(1, thread_name_prefix=name) as executor:
        future = asyncio.get_running_loop().run_in_executor(executor, work, stop)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    continue  # the first one is raised below
            if not future.cancelled():
                future.exception()  # mark as retrieved: the caller gets its cancel
            raise
