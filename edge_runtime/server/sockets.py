"""Listening sockets: bound where the configuration says, and to this device only."""

import asyncio
import os
import socket
import stat
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from edge_runtime.core.errors import ConfigError, StorageError
from edge_runtime.storage.files import check_owner

#: Connections that may wait in the kernel to be accepted.
BACKLOG = 512


def bind_unix(path: Path) -> socket.socket:
    """A socket bound to `path`, mode 0660 whatever the umask. Raises ConfigError."""
    _clear_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(path.parent)  # the client of the command line asks the same
        mask = os.umask(0o117)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
    except (OSError, StorageError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"[server] socket: {path} cannot be used ({why}); set another path.") from None
    return listening


def inode_of(path: Path) -> int | None:
    """What tells one socket at a path from its successor; None where there is nothing."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None


async def loopback_addresses(host: str) -> list[str]:
    """The loopback addresses that a host names. Raises ConfigError where it names others, or none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    except OSError:
        addresses = []
    if not addresses or not all(ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        raise ConfigError(
            f"[server] tcp: {host} is not a loopback address, and others need encryption and "
            'authentication, which this release does not offer. Write tcp = "127.0.0.1:8080".'
        )
    return addresses


def bind_loopback(addresses: list[str], host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses that this device has, on one port. Raises ConfigError."""
    bound: list[socket.socket] = []
    failure: OSError | None = None
    for address in addresses:
        listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listening.family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((address, port))
            port = listening.getsockname()[1]  # the system chose one for 0; the next address gets the same
            bound.append(listening)
        except OSError as error:
            listening.close()
            failure = error
    if not bound and failure is not None:
        raise ConfigError(
            f"[server] tcp: {host}:{port} cannot be used ({failure.strerror or failure}). Set another port, "
            'or tcp = "off".'
        )
    return bound


def accept_all(listening: socket.socket) -> list[socket.socket]:
    """The connections that wait in the kernel's queue."""
    accepted: list[socket.socket] = []
    with suppress(OSError):  # none is left
        while len(accepted) < BACKLOG:
            peer, _ = listening.accept()
            peer.setblocking(False)
            accepted.append(peer)
    return accepted


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
