"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do.

For tests of shells without threads and sockets: a time-out of an hour takes no time, and the order of events is the
same in every run. A scenario in which nothing is left to wait for fails at once instead of hanging.
"""

import asyncio
import selectors


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self._loop = loop

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("nothing is left to wait for: the scenario would hang")
        if not ready and timeout > 0:
            self._loop.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module's text. `now_s` may be read by tests."""

    def __init__(self):
        self.now_s = 1000.0
        super().__init__(_Jumping(self))

    def time(self):
        return self.now_s


def now_ns():
    """The clock of the running loop, as `time.monotonic_ns` is the clock of the real one."""
    return round(asyncio.get_running_loop().time() * 1e9)


def run_virtual(scenario, *, limit_s=100_000.0):
    """Run `scenario()`; more than `limit_s` of virtual time is a failure."""

    async def limited():
        async with asyncio.timeout(limit_s):
            return await scenario()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(limited())


async def settle():
    """Return when everything that needs no time has happened."""
    await asyncio.sleep(1e-6)
