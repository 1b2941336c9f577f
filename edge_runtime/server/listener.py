"""Opens and closes the listeners: a Unix socket with its mode, loopback addresses, one sweep for slow peers; the drain.

Shutting down is three steps. `close_ingress` draws the line: connections that wait in the kernel's queue are accepted,
since their requests may have come already, then nobody listens any more, and idle peers are told. `drain` waits until
every answer that is owed has left for the kernel, which is later than the return of its handler: the reader may be slow.
`close` ends what is left.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from edge_runtime.server.answers import HttpAnswer
from edge_runtime.server.bodies import Bodies
from edge_runtime.server.browser_guard import browser_guard, host_name
from edge_runtime.server.byte_budget import ByteBudget
from edge_runtime.server.connection_table import ConnectionTable
from edge_runtime.server.counters import HttpCounters
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.routes import Application, HttpRequest, answer
from edge_runtime.server.shell import Connection, ListenerConfig
from edge_runtime.server.sockets import (
    BACKLOG,
    accept_all,
    bind_loopback,
    bind_unix,
    inode_of,
    loopback_addresses,
)
from edge_runtime.server.tenancy import Tenancy

_LOOK_AGAIN_S = 0.05


class Server:
    """Listeners and their connections."""

    def __init__(self, application: Application, limits: HttpLimits, tenancy: Tenancy) -> None:
        """Use `start_server`."""
        self._application = application
        self._limits = limits
        self._tenancy = tenancy
        self._bodies = Bodies(limits.body_bytes)
        self._budget = ByteBudget(limits.buffer_bytes)
        self._counters = HttpCounters()
        self._numbers = count(1)
        self._listeners: list[tuple[asyncio.Server, socket.socket, Callable[[], Connection]]] = []
        self._tables: dict[str, ConnectionTable] = {}
        self._socket: tuple[Path, int | None] | None = None  # where the Unix socket is, and its inode
        self._settled = asyncio.Event()
        self._sweep = asyncio.get_running_loop().create_task(self._sweep_forever(), name="http-sweep")
        self.is_draining = False
        self.addresses: list[str] = []

    async def handle(self, request: HttpRequest) -> HttpAnswer:
        """Answer one request. Raises the errors of the core."""
        return await answer(self._application, self, self._bodies, request)

    def connections(self) -> list[Connection]:
        """All that are open."""
        return [peer for table in self._tables.values() for peer in table if isinstance(peer, Connection)]

    def status(self) -> dict[str, object]:
        """What `/status` shows of the server."""
        return {
            "addresses": self.addresses,
            "draining": self.is_draining,
            "connections": {name: len(table) for name, table in self._tables.items()},
            "max_connections": self._limits.connections,
            "held_bytes": self._budget.held_bytes,
            "buffer_bytes": self._budget.limit_bytes,
            "refused": dict(sorted(self._counters.refused.items())),
        }

    def metrics(self) -> bytes:
        """What `/metrics` shows of the server, in Prometheus text."""
        lines = ["# HELP edge_http_connections Open connections.", "# TYPE edge_http_connections gauge"]
        lines += [
            f'edge_http_connections{{listener="{name}"}} {len(table)}' for name, table in self._tables.items()
        ]
        lines += [
            "# HELP edge_http_held_bytes Bytes of bodies and answers that connections hold.",
            "# TYPE edge_http_held_bytes gauge",
            f"edge_http_held_bytes {self._budget.held_bytes}",
            "# HELP edge_http_refused_total Requests and connections refused before a route, by reason.",
            "# TYPE edge_http_refused_total counter",
        ]
        lines += [
            f'edge_http_refused_total{{reason="{reason}"}} {total}'
            for reason, total in sorted(self._counters.refused.items())
        ]
        return ("\n".join(lines) + "\n").encode()

    async def open_unix(self, path: Path) -> None:
        """Listen on `path`, mode 0660 whatever the umask. Raises ConfigError."""
        listening = bind_unix(path)
        self._socket = path, inode_of(path)
        await self._listen(listening, "unix", None)
        self.addresses.append(f"unix:{path}")

    async def open_tcp(self, host: str, port: int, allowed_hosts: tuple[str, ...]) -> None:
        """Listen on the loopback addresses that `host` names. Raises ConfigError."""
        hosts = frozenset(host_name(name) for name in allowed_hosts)
        for listening in bind_loopback(await loopback_addresses(host), host, port):
            await self._listen(listening, "tcp", hosts)
            address, bound = listening.getsockname()[:2]
            shown = f"[{address}]" if listening.family == socket.AF_INET6 else address
            self.addresses.append(f"http://{shown}:{bound}")

    async def close_ingress(self) -> None:
        """Take no new connection, answer what has begun, and refuse what begins later. Idempotent."""
        if self.is_draining:
            return
        self.is_draining = True
        # Before the listeners close: a bound socket holds its inode, so that no other file has the same number.
        self._remove_socket()
        loop = asyncio.get_running_loop()
        listeners, self._listeners = self._listeners, []
        for listener, listening, factory in listeners:
            for peer in accept_all(listening):
                with suppress(OSError):  # it left in the meantime
                    await loop.connect_accepted_socket(factory, peer)
            listener.close()
        for connection in self.connections():
            connection.begin_drain()

    async def drain(self, deadline_s: float) -> bool:
        """Wait until every answer that is owed has left; False if some were not ready at the deadline.

        What is not ready at the deadline is answered with 503. These answers, too, leave whole, unless their peer stops
        reading.
        """
        if await self._wait_settled(deadline_s):
            return True
        for connection in self.connections():
            connection.give_up()
        await self._wait_settled(self._limits.write_s)
        return False

    async def close(self) -> None:
        """Close everything. Idempotent."""
        await self.close_ingress()
        self._sweep.cancel()
        await asyncio.sleep(0)  # answers that are due are written before their connections close
        for connection in self.connections():
            connection.abort()

    async def _listen(self, listening: socket.socket, name: str, hosts: frozenset[str] | None) -> None:
        listening.setblocking(False)
        loop = asyncio.get_running_loop()
        table = self._tables.setdefault(name, ConnectionTable(self._limits, self._counters))
        config = ListenerConfig(
            name,
            self.handle,
            self._limits,
            browser_guard(hosts),
            self._tenancy,
            self._budget,
            table,
            self._counters,
            loop.time,
            self._numbers.__next__,
            self._settled.set,
        )

        def factory() -> Connection:
            return Connection(config)

        if listening.family == socket.AF_UNIX:
            listener = await loop.create_unix_server(factory, sock=listening, backlog=BACKLOG)
        else:
            listener = await loop.create_server(factory, sock=listening, backlog=BACKLOG)
        self._listeners.append((listener, listening, factory))  # uvloop closes a listener nobody refers to

    async def _wait_settled(self, limit_s: float) -> bool:
        """Whether all connections settle within `limit_s`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                while not all(connection.is_settled for connection in self.connections()):
                    self._settled.clear()
                    # The last bytes of an answer, below the transport's mark, leave without a callback.
                    again = loop.call_later(_LOOK_AGAIN_S, self._settled.set)
                    try:
                        await self._settled.wait()
                    finally:
                        again.cancel()
        except TimeoutError:
            return False
        return True

    def _remove_socket(self) -> None:
        """Remove the Unix socket, unless another one has taken its path."""
        if self._socket is not None:
            path, inode = self._socket
            if inode_of(path) == inode:
                path.unlink(missing_ok=True)
            self._socket = None

    async def _sweep_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1.0)
            now = loop.time()
            for connection in self.connections():
                connection.check_time(now)
            self._counters.log_news()


async def start_server(
    application: Application,
    *,
    socket_path: Path | None,
    tcp: tuple[str, int] | None,
    allowed_hosts: tuple[str, ...] = (),
    limits: HttpLimits | None = None,
    tenancy: Tenancy | None = None,
) -> Server:
    """Listen on the socket and the address that are given. Raises ConfigError naming the key and the fix."""
    server = Server(application, limits or HttpLimits(), tenancy or Tenancy())
    try:
        if socket_path is not None:
            await server.open_unix(socket_path)
        if tcp is not None:
            await server.open_tcp(*tcp, allowed_hosts)
    except BaseException:
        await server.close()
        raise
    return server
