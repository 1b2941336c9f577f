"""Opens and closes the listeners: a Unix socket with its mode, a loopback port, one sweep for slow peers."""

import asyncio
import ipaddress
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_runtime.core.errors import ConfigError, StorageError
from edge_runtime.server.answers import HttpAnswer, error_answer
from edge_runtime.server.browser_guard import browser_guard
from edge_runtime.server.limits import HttpLimits
from edge_runtime.server.routes import Application, HttpRequest, answer
from edge_runtime.server.shell import Connection, ListenerConfig
from edge_runtime.storage.files import check_owner

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Server:
    """Listeners and their connections."""

    def __init__(self, application: Application, limits: HttpLimits) -> None:
        """Use `start_server`."""
        self._application = application
        self._limits = limits
        self._listeners: list[asyncio.Server] = []  # uvloop closes a listener nobody refers to
        self._connections: list[set[Connection]] = []
        self._socket: tuple[Path, os.stat_result] | None = (
            None  # where the Unix socket is, and what was made there
        )
        self._is_closing = False
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._sweep = asyncio.get_running_loop().create_task(self._sweep_forever(), name="http-sweep")
        self.addresses: list[str] = []

    async def handle(self, request: HttpRequest) -> HttpAnswer:
        """Answer one request and keep count, for the drain."""
        if self._is_closing:
            return error_answer(503, "The runtime is shutting down.")
        self._busy += 1
        self._quiet.clear()
        try:
            return await answer(self._application, request, body_limit=self._limits.body_bytes)
        finally:
            self._busy -= 1
            if not self._busy:
                self._quiet.set()

    def connection_factory(
        self, hosts: frozenset[str] | None, max_connections: int
    ) -> Callable[[], Connection]:
        """A factory of connections for one listener."""
        connections: set[Connection] = set()
        self._connections.append(connections)
        loop = asyncio.get_running_loop()
        config = ListenerConfig(
            self.handle, self._limits, browser_guard(hosts), connections, max_connections, loop.time
        )
        return lambda: Connection(config)

    async def open_unix(self, path: Path) -> None:
        """Listen on `path`, mode 0660 whatever the umask. Raises ConfigError."""
        _clear_stale(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(path.parent)  # the client of the command line asks the same
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o117)
            try:
                listening.bind(str(path))
            finally:
                os.umask(mask)
        except (OSError, StorageError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigError(f"[server] socket: {path} cannot be used ({why}); set another path.") from None
        factory = self.connection_factory(None, self._limits.unix_connections)
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_unix_server(factory, sock=listening))
        self._socket = path, os.lstat(path)
        self.addresses.append(f"unix:{path}")

    async def open_tcp(self, host: str, port: int, allowed_hosts: tuple[str, ...]) -> None:
        """Listen on a loopback address. Raises ConfigError."""
        try:
            is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise ConfigError(
                f"[server] tcp: {host} is not a loopback address, and others need encryption and "
                'authentication, which this release does not offer. Write tcp = "127.0.0.1:8080".'
            )
        names = _LOCAL_NAMES | {name.lower() for name in allowed_hosts}
        factory = self.connection_factory(frozenset(names), self._limits.tcp_connections)
        try:
            listener = await asyncio.get_running_loop().create_server(factory, host, port)
        except OSError as error:
            raise ConfigError(
                f"[server] tcp: {host}:{port} cannot be used ({error.strerror or error}). Set another port, "
                'or tcp = "off".'
            ) from None
        self._listeners.append(listener)
        self.addresses.append(f"http://{host}:{listener.sockets[0].getsockname()[1]}")

    async def close_ingress(self) -> None:
        """Stop listening; further requests on open connections are answered with 503."""
        self._is_closing = True
        # Before the listeners close: a bound socket holds its inode, so that no other file has the same number.
        self._remove_socket()
        for listener in self._listeners:
            listener.close()
        for connections in self._connections:
            for connection in list(connections):
                connection.close_when_idle()

    def _remove_socket(self) -> None:
        """Remove the Unix socket, unless somebody removed it before and another daemon listens at its path."""
        if self._socket is not None:
            path, made = self._socket
            self._socket = None
            with suppress(OSError):
                if os.path.samestat(path.lstat(), made):
                    path.unlink()

    async def drain(self, deadline_s: float) -> bool:
        """Wait for requests under way; False if some were still running at the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Close everything. Idempotent."""
        await self.close_ingress()
        self._sweep.cancel()
        await asyncio.sleep(0)  # answers that are due are written before their connections close
        for connections in self._connections:
            for connection in list(connections):
                connection.abort()

    async def _sweep_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1.0)
            now = loop.time()
            for connections in self._connections:
                for connection in list(connections):
                    connection.check_time(now)


async def start_server(
    application: Application,
    *,
    socket_path: Path | None,
    tcp: tuple[str, int] | None,
    allowed_hosts: tuple[str, ...] = (),
    limits: HttpLimits | None = None,
) -> Server:
    """Listen on the socket and the address that are given. Raises ConfigError naming the key and the fix."""
    server = Server(application, limits or HttpLimits())
    try:
        if socket_path is not None:
            await server.open_unix(socket_path)
        if tcp is not None:
            await server.open_tcp(*tcp, allowed_hosts)
    except BaseException:
        await server.close()
        raise
    return server


def _clear_stale(path: Path) -> None:
    """Remove a socket that this user owns and nobody listens on. Raises ConfigError for anything else."""
    try:
        info = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.getuid():
        raise ConfigError(
            f"[server] socket: {path} exists and is not a socket of ours; remove it or set another path."
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"[server] socket: a daemon already listens on {path}; stop it or set another path.")
