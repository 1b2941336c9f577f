"""The configuration of the edge's daemon as one typed tree; each default stands here or in `settings`, and only there."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated

import msgspec

from edge_runtime.core.errors import ConfigError
from edge_runtime.settings import (
    BatchSettings,
    BrokerSettings,
    LimitSettings,
    Positive,
    RequestSettings,
    Seconds,
    Settings,
    TrustSettings,
    check_batch,
    check_broker,
    check_id,
    check_models,
    check_path,
    id_from_host_name,
    is_port,
)
from edge_runtime.typed_toml import Renamed, check_types, load_toml

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")


class ServerSettings(Settings, frozen=True):
    """Where the daemon listens."""

    socket: str = "auto"
    """Unix socket: a path, `"auto"` (in the runtime directory), or `"off"`."""
    tcp: str = "127.0.0.1:8080"
    """Loopback address and port for HTTP, or `"off"`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may carry beside `localhost` and the loopback addresses."""
    max_connections: Positive = 256
    """Open connections of the Unix socket, and as many of the address. Beyond them an idle one is closed with an answer,
    or the new one is answered with 503; a health check is always answered."""
    max_pipelined: Positive = 64
    """Requests of one connection that wait for their answers at a time."""
    max_body_bytes: Positive = 8 << 20
    """Bytes of one request's body, and of what a compressed body inflates to."""
    # 64 MiB: eight of the largest bodies, or a thousand connections with a body of 64 KiB each.
    buffer_bytes: Positive = 64 << 20
    """Bytes of bodies and answers that all connections hold together; beyond them requests are answered with 503."""
    header_s: Seconds = 5.0
    """Time limit for the headers of a request, from its first byte."""
    body_s: Seconds = 60.0
    """Time limit for the body of a request; it also ends after 10 seconds without 1 KiB."""
    idle_s: Seconds = 75.0
    """How long a connection may be without a request before it is closed."""
    write_s: Seconds = 30.0
    """How long a peer may read nothing of an answer before its connection is closed."""
    tenant_header: str = ""
    """Header in which a request names its tenant, one of `tenants`. Unset: all requests are of the tenant `local`. Any
    program that reaches the daemon can send it."""
    tenants: tuple[str, ...] = ()
    """Ids of the tenants that `tenant_header` may name."""
    tenant_by_user: bool = False
    """Whether each user of the Unix socket is a tenant, named after the user id, for example `user-1000`."""


class CacheSettings(Settings, frozen=True):
    """The answer cache in memory, and the one on disk below it."""

    enabled: bool = True
    """Whether answers are kept at all."""
    max_bytes: Positive = 2 << 20
    """Bytes of answers in memory; 2 MiB hold about 2,800 commands."""
    ttl_s: Seconds = 3600.0
    """How long an answer is fresh."""
    # A day: a link lost in the evening is repaired next morning, and the same question rarely changes its answer.
    stale_s: Annotated[float, msgspec.Meta(ge=0, le=7 * 86_400)] = 86_400.0
    """How long after `ttl_s` an answer of the cloud may still be given, marked stale, while the cloud is out of
    reach."""
    path: str = "off"
    """File of answers that outlives the process: a path, `"auto"` (in the state directory), or `"off"`."""
    disk_max_bytes: Annotated[int, msgspec.Meta(ge=4 << 20)] = 64 << 20
    """Bytes of that file together with its log."""


class EscalationSettings(Settings, frozen=True):
    """When the edge's own answer is kept."""

    accept: Probability | None = None
    """Confidence from which the edge's answer is kept. Unset: the threshold of the bundle."""


class CloudSettings(BrokerSettings, frozen=True):
    """The way to the cloud tier; without this section no request leaves the device."""

    tenant: str = "home"
    """Id of the tenant that this device belongs to."""
    device: str = "auto"
    """Id of this device, unique within its tenant; `"auto"` makes one of the host name."""
    timeout_s: Seconds = 2.0
    """Longest time that a caller waits for the cloud."""


class Config(Settings, frozen=True):
    """One TOML file. Every key has a default, so an empty file, or none, works."""

    models: tuple[str, ...] = ("commands",)
    """Models to serve: names of bundled ones, or paths of bundles."""
    threads: Positive = 1
    """Threads of one model run; 1 leaves the other cores to the device."""
    server: ServerSettings = ServerSettings()
    batch: BatchSettings = BatchSettings()
    cache: CacheSettings = CacheSettings()
    requests: RequestSettings = RequestSettings()
    escalation: EscalationSettings = EscalationSettings()
    trust: TrustSettings = TrustSettings()
    limits: LimitSettings = LimitSettings()
    cloud: CloudSettings | None = None


#: Former words of this configuration, read for one release more.
RENAMED = Renamed(words={"batch.window": {"none": "off"}, "cloud.device": {"": "auto"}})


def load_config(path: Path | None) -> Config:
    """Read and check the file; None gives the defaults. Raises ConfigError."""
    if path is None:
        return Config()
    config = load_toml(path, Config, RENAMED)
    check_config(config, str(path))
    return config


def check_config(config: Config, where: str) -> None:
    """Check all that can be checked without looking at this device. Raises ConfigError that begins with `where`."""
    check_types(config, where)
    check_models(config.models, where, "commands")
    tcp_address(config, where)
    check_path(config.server.socket, f"{where}: [server] socket")
    check_path(config.cache.path, f"{where}: [cache] path")
    check_path(config.trust.record, f"{where}: [trust] record")
    _check_tenants(config.server, where)
    check_batch(config.batch, where)
    if config.cloud is not None:
        check_id(config.cloud.tenant, f"{where}: [cloud] tenant", "home")
        check_id(config.cloud.device, f"{where}: [cloud] device", "kitchen-1")
        check_broker(config.cloud.broker, f"{where}: [cloud] broker")


def check_listens(config: Config, where: str) -> None:
    """Check that a daemon can be reached at all; inside a program no listener is needed. Raises ConfigError."""
    if config.server.socket == config.server.tcp == "off":
        raise ConfigError(f'{where}: [server] socket, tcp: both are "off". Write socket = "auto".')


def _check_tenants(server: ServerSettings, where: str) -> None:
    """Check that a header for tenants and its tenants come together. Raises ConfigError."""
    if server.tenant_header and not _HEADER.fullmatch(server.tenant_header):
        raise ConfigError(
            f"{where}: [server] tenant_header: expected the name of a header of letters, digits and '-'. "
            'Write for example tenant_header = "X-Tenant".'
        )
    if bool(server.tenant_header) != bool(server.tenants):
        raise ConfigError(
            f"{where}: [server] tenants: a tenant_header and its tenants come together. "
            'Write for example tenant_header = "X-Tenant" and tenants = ["kitchen", "hall"].'
        )
    for name in server.tenants:
        check_id(name, f"{where}: [server] tenants", "kitchen")


def tcp_address(config: Config, where: str = "config") -> tuple[str, int] | None:
    """Host and port to listen on, or None for "off". Raises ConfigError."""
    if config.server.tcp == "off":
        return None
    host, _, port = config.server.tcp.rpartition(":")
    if not host or not is_port(port):
        raise ConfigError(
            f'{where}: [server] tcp: expected HOST:PORT or "off". Write tcp = "127.0.0.1:8080".'
        )
    host = host.strip("[]")
    if not _is_loopback(host):
        raise ConfigError(
            f"{where}: [server] tcp: {host} is not a loopback address, and others need encryption and "
            'authentication, which this release does not offer. Write tcp = "127.0.0.1:8080".'
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_path(config: Config) -> Path | None:
    """The Unix socket's path, or None for "off".

    "auto" is $RUNTIME_DIRECTORY (set by systemd), else $XDG_RUNTIME_DIR/edge-runtime, else a folder
    of this user's below /tmp.
    """
    if config.server.socket == "off":
        return None
    if config.server.socket != "auto":
        return Path(config.server.socket)
    if folder := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(folder.split(":")[0]) / "edge.sock"
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(folder) / "edge-runtime" / "edge.sock"
    return Path(f"/tmp/edge-runtime-{os.getuid()}") / "edge.sock"  # noqa: S108 - the server makes it with mode 0700


def device_id(cloud: CloudSettings) -> str:
    """The configured device id, or one made of the host name."""
    return cloud.device if cloud.device != "auto" else id_from_host_name("device")
