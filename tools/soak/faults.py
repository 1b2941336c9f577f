"""What goes wrong during a soak: each fault lasts some seconds and is then undone."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Iterator

from tools.soak.callers import Callers
from tools.soak.link import Link
from tools.soak.system import Program

#: Each cycle has the next three of them.
KINDS = (
    "worker frozen",
    "link cut",
    "daemon frozen",
    "link silent",
    "broker frozen",
    "worker's link cut",
)
PER_CYCLE = 3
#: Longer than the 2 s that a caller waits for the cloud, shorter than any limit of a request.
LONGEST_S = 4.0


def planned(cycle: int, chance: random.Random) -> Iterator[tuple[str, float]]:
    """The faults of one cycle with their seconds."""
    for place in range(cycle * PER_CYCLE, (cycle + 1) * PER_CYCLE):
        yield KINDS[place % len(KINDS)], chance.uniform(0.5, LONGEST_S)


class Faults:
    """Brings faults about."""

    def __init__(
        self, parts: dict[str, Program], edge_link: Link, worker_link: Link, callers: Callers
    ) -> None:
        self._parts = parts
        self._edge_link = edge_link
        self._worker_link = worker_link
        self._callers = callers

    async def run(self, kind: str, seconds: float) -> None:
        async with self._fault(kind):
            await asyncio.sleep(seconds)

    @contextlib.asynccontextmanager
    async def _fault(self, kind: str) -> AsyncIterator[None]:
        what, how = kind.rsplit(" ", 1)
        link = self._worker_link if what.startswith("worker") else self._edge_link
        if how == "frozen":
            self._parts[what].send(signal.SIGSTOP)
            self._callers.is_frozen = what == "daemon"
        elif how == "cut":
            link.cut()
        else:
            link.stall()
        try:
            yield
        finally:
            if how == "frozen":
                self._parts[what].send(signal.SIGCONT)
                await asyncio.sleep(0.2)  # what it missed is still on its way to it
                self._callers.is_frozen = False
            else:
                link.mend()
