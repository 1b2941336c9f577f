"""Connections to the daemon: kept alive between callers, and fewer than it accepts."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping

from tools.soak.connection import Connection

#: The daemon closes what idles for 75 s; a connection is not used when that may happen at the same moment.
IDLE_S = 20.0


class Pool:
    """`most`: for each address, how many connections may be open."""

    def __init__(self, most: Mapping[str, int], chance: random.Random) -> None:
        self._most = most
        self._chance = chance
        self._open: Counter[str] = Counter()
        self._idle: list[tuple[float, Connection]] = []

    @property
    def has_room(self) -> bool:
        return bool(self._idle) or any(self._open[address] < most for address, most in self._most.items())

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[Connection]:
        """An idle connection or a new one, kept for the next caller if this one succeeds. Raises OSError."""
        connection = self._idle_one() or await self._new()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append((asyncio.get_running_loop().time(), connection))

    @contextlib.asynccontextmanager
    async def fresh(self) -> AsyncIterator[Connection]:
        """A new connection for one caller, closed afterwards. Raises OSError."""
        connection = await self._new()
        try:
            yield connection
        finally:
            connection.close()

    def _idle_one(self) -> Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            since, connection = self._idle.pop()
            if now - since < IDLE_S:
                return connection
            connection.close()
        return None

    async def _new(self) -> Connection:
        room = {address: max(0, most - self._open[address]) for address, most in self._most.items()}
        if not any(room.values()):
            room = dict(self._most)
        address = self._chance.choices(list(room), list(room.values()))[0]
        self._open[address] += 1
        try:
            return await Connection.open(address, lambda: self._open.subtract([address]))
        except BaseException:
            self._open[address] -= 1
            raise

    def close(self) -> None:
        """Close those that idle."""
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()
