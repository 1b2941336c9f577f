"""The callers: well-behaved ones, whose every request must be answered, and ones that misbehave."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tools.soak.account import Account, Asked, Known
from tools.soak.connection import Connection, NoAnswerError, get, infer, post
from tools.soak.pool import Pool

#: The daemon's time limit of 10 s, the longest freeze and a busy machine.
ANSWER_S = 40.0
#: Connections at a time to the Unix socket and to the TCP port: four fifths of what the daemon accepts there.
MAX_CONNECTIONS = (200, 50)
BULK_ROWS = (16, 64, 256, 1024)
CANCELLED_ROWS = (1, 64)
HURRIED_US = 20_000
SLOW_S = 1.0
_BULK = sum(BULK_ROWS) / len(BULK_ROWS)
#: Kind of caller: its share of all callers, and its rows on average.
KINDS = {
    "single": (50, 1),
    "uncached": (18, 1),
    "private": (6, 1),
    "hurried": (6, 1),
    "bulk": (12, _BULK),
    "slow reader": (0.5, _BULK),
    "pipelined": (2, 3),
    "half-closed": (3, 1),
    "cancelled": (3, sum(CANCELLED_ROWS) / len(CANCELLED_ROWS)),
    "aborted upload": (1.5, 0),
    "invalid": (1, 0),
}
ROWS_PER_CALLER = sum(share * rows for share, rows in KINDS.values()) / sum(
    share for share, _ in KINDS.values()
)


class Callers:
    """Makes requests of every kind at a given rate. `known` has the texts and their answers."""

    def __init__(
        self, addresses: tuple[str, str], known: Mapping[str, Known], account: Account, seed: int
    ) -> None:
        self._address = addresses[0]
        self._known = known
        self._account = account
        self._chance = random.Random(seed)
        self._texts = list(known)
        self._sure = [text for text in known if len(known[text].cloud) == 1]
        self.pool = Pool(dict(zip(addresses, MAX_CONNECTIONS, strict=True)), self._chance)
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_id = 0
        self.held_back = 0
        self.single_s: list[float] = []
        self.health_s: list[float] = []
        self.lag_s: list[float] = []
        self.is_frozen = False
        self.stops_at: float | None = None
        self._calls: dict[str, Callable[[], Awaitable[None]]] = {
            "single": self._single,
            "uncached": lambda: self._single("uncached", cache=False),
            "private": lambda: self._single("private", is_private=True, cache=False),
            "hurried": lambda: self._single("hurried", cache=False, timeout=HURRIED_US),
            "bulk": self._bulk,
            "slow reader": lambda: self._bulk("slow reader", wait_s=SLOW_S),
            "pipelined": self._pipelined,
            "half-closed": self._half_closed,
            "cancelled": self._cancelled,
            "aborted upload": self._aborted,
            "invalid": self._invalid,
        }

    async def at_rate(self, per_s: float, seconds: float) -> None:
        """Start callers at random moments, `per_s` on average, whether or not earlier ones have their answers."""
        loop = asyncio.get_running_loop()
        due, ends = loop.time(), loop.time() + seconds
        names, shares = list(KINDS), [share for share, _ in KINDS.values()]
        while due < ends:
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += self._chance.expovariate(per_s)
            if not self.pool.has_room or len(self._tasks) >= sum(MAX_CONNECTIONS):
                self.held_back += 1
                continue
            self.start(self._chance.choices(names, shares)[0])

    def start(self, kind: str) -> None:
        task = asyncio.get_running_loop().create_task(self._limited(kind), name=kind)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def in_turn(self, kinds: Sequence[str], seconds: float, at_once: int) -> None:
        """Keep `at_once` callers busy, each with the next request as soon as it has its answer."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        shares = [KINDS[kind][0] for kind in kinds]

        async def caller() -> None:
            while loop.time() < ends:
                await self._limited(self._chance.choices(kinds, shares)[0])

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(caller(), name="caller")

    async def finish(self) -> None:
        """Wait until every caller has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def pause(self, seconds: float) -> None:
        """Sleep, and note how much later this program itself woke up: its latencies contain as much."""
        due = asyncio.get_running_loop().time() + seconds
        await asyncio.sleep(seconds)
        self.lag_s.append(asyncio.get_running_loop().time() - due)

    async def health(self) -> None:
        """One probe of liveness, on a connection of its own."""
        loop = asyncio.get_running_loop()
        started, was_frozen = loop.time(), self.is_frozen
        try:
            async with asyncio.timeout(ANSWER_S):
                connection = await Connection.open(self._address)
                try:
                    status, _ = await connection.ask(get("/v2/health/live"))
                finally:
                    connection.close()
        except (OSError, TimeoutError, NoAnswerError) as error:
            if not (was_frozen or self.is_frozen or self.stops_at):
                self._account.breach("a daemon that runs says that it lives", repr(error))
            return
        if status != 200 and self.stops_at is None:
            self._account.breach("a daemon that runs says that it lives", f"status {status}")
        if not (was_frozen or self.is_frozen):
            self.health_s.append(loop.time() - started)

    # One caller

    async def _limited(self, kind: str) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._calls[kind]()
        except TimeoutError:
            self._lost(kind, started, f"nothing within {ANSWER_S:.0f} s")
        except NoAnswerError as error:
            self._lost(kind, started, str(error))
        except OSError as error:
            self._account.ended(kind, "not connected")
            if not (self.is_frozen or self.stops_at):
                self._account.breach("a caller can connect", f"{kind}: {error!r}")

    def _lost(self, kind: str, started: float, why: str) -> None:
        """A caller without an answer; one that began after the signal to stop has no claim to one."""
        if self.stops_at is not None and started >= self.stops_at:
            self._account.ended(kind, "came after the end")
            return
        self._account.ended(kind, "no answer")
        self._account.breach("each caller has an answer", f"{kind}: {why}")

    def _asked(self, rows: int = 1, *, is_private: bool = False) -> Asked:
        self._next_id += 1
        self._account.rows_asked += rows
        # Each unsure row is a message to the cloud: a bulk request has some, or none.
        texts = (
            self._texts if rows == 1 or (rows <= BULK_ROWS[1] and self._chance.random() < 0.1) else self._sure
        )
        return Asked(f"q{self._next_id}", self._chance.choices(texts, k=rows), is_private)

    def _judge(self, kind: str, asked: Asked, answer: tuple[int, Any]) -> None:
        self._account.answered(kind, asked, *answer, self._known)

    async def _single(
        self, kind: str = "single", *, is_private: bool = False, cache: bool = True, **parameters: object
    ) -> None:
        started = asyncio.get_running_loop().time()
        asked = self._asked(is_private=is_private)
        async with self.pool.kept() as connection:
            self._judge(kind, asked, await connection.ask(infer(asked, cache=cache, **parameters)))
        self.single_s.append(asyncio.get_running_loop().time() - started)

    async def _bulk(self, kind: str = "bulk", wait_s: float = 0.0) -> None:
        asked = self._asked(self._chance.choice(BULK_ROWS))
        async with self.pool.kept() as connection:
            await connection.send(infer(asked, cache=False))
            await asyncio.sleep(wait_s)
            self._judge(kind, asked, await connection.read())

    async def _pipelined(self) -> None:
        """Three requests in one piece; the answers come in their order."""
        asked = [self._asked() for _ in range(3)]
        async with self.pool.kept() as connection:
            await connection.send(b"".join(map(infer, asked)))
            for one in asked:
                self._judge("pipelined", one, await connection.read())

    async def _half_closed(self) -> None:
        """Says that nothing more comes, and waits for the answer."""
        asked = self._asked()
        async with self.pool.fresh() as connection:
            await connection.send(infer(asked))
            connection.half_close()
            self._judge("half-closed", asked, await connection.read())

    async def _cancelled(self) -> None:
        asked = self._asked(self._chance.choice(CANCELLED_ROWS))
        async with self.pool.fresh() as connection:
            await connection.send(infer(asked, cache=False))
            await asyncio.sleep(self._chance.choice((0.0, 0.001, 0.01)))
        self._account.ended("cancelled", "left by the caller")

    async def _aborted(self) -> None:
        async with self.pool.fresh() as connection:
            await connection.send(post(b" " * self._chance.choice((0, 1000, 1 << 20)), 8_000_000))
        self._account.ended("aborted upload", "left by the caller")

    async def _invalid(self) -> None:
        """What is no request is refused, and the connection serves the next one or says that it closes."""
        body = self._chance.choice((b"{", b"[]", b'{"inputs":[]}', b'{"inputs":[{"name":"text"}]}'))
        async with self.pool.kept() as connection:
            status, _ = await connection.ask(post(body))
        self._account.ended("invalid", "refused" if 400 <= status < 500 else f"status {status}")
        if not (400 <= status < 500 or status == 503):
            self._account.breach("an invalid request is refused", f"{body!r}: {status}")
