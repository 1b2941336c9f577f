"""The daemon's whole configuration as one typed tree; defaults live here and nowhere else."""

import os
import re
import socket
from pathlib import Path
from typing import Annotated

import msgspec

from edge_runtime.core.errors import ConfigError
from edge_runtime.core.scheduling.windows import policy_of
from edge_runtime.typed_toml import load_toml

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=60_000)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: an unknown key is an error, never ignored."""


class ServerSettings(Settings, frozen=True):
    """Where the daemon listens."""

    socket: str = "auto"  # a path, "auto" (runtime directory), or "off"
    tcp: str = "127.0.0.1:8080"  # a loopback address, or "off"
    allowed_hosts: tuple[str, ...] = ()  # further names accepted in the Host header


class BatchSettings(Settings, frozen=True):
    """How each model's requests are batched, and how many may wait."""

    max: Positive = 8  # a small model gains nothing beyond, and each doubling costs it 3 MB of buffers
    window: str | Milliseconds = (
        "learned"  # how long an idle model waits for company: "learned", "none", or ms
    )
    duty_target: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None  # share of time to run; saves power
    duty_wait_ms: Milliseconds = 100.0  # the longest that a request waits for that
    queue: Positive = 1024  # requests that may wait; more are refused at once
    queue_bytes: Positive = 64 << 20
    tenant_queue: Positive | None = None  # of them, of one tenant; unset: all
    tenant_engine_share: Annotated[float, msgspec.Meta(gt=0)] | None = (
        None  # engine time of one tenant per time
    )


class CacheSettings(Settings, frozen=True):
    """The answer cache in memory, and below it one on disk."""

    enabled: bool = True
    max_bytes: Positive = 2 << 20  # about 2,900 commands
    ttl_s: Seconds = 3600.0
    # How long after that an answer of the cloud may still be given, marked stale, while the cloud is out of reach.
    # A day: a link lost in the evening is repaired next morning, and the same question rarely changes its answer.
    stale_s: Annotated[float, msgspec.Meta(ge=0, le=7 * 86_400)] = 86_400.0
    path: str = "off"  # a file that outlives the process: a path, "auto" (state directory), or "off"
    disk_max_bytes: Annotated[int, msgspec.Meta(ge=4 << 20)] = 64 << 20  # of that file with its log


class RequestSettings(Settings, frozen=True):
    """Time limits."""

    timeout_s: Seconds = 10.0  # for requests that bring no deadline of their own
    drain_s: Seconds = 10.0  # how long SIGTERM waits for requests under way


class EscalationSettings(Settings, frozen=True):
    """When the edge's answer is kept."""

    accept: Probability | None = None  # confidence from which it is; unset: the bundle's own threshold


class TrustSettings(Settings, frozen=True):
    """Whose model bundles are loaded."""

    keys: tuple[str, ...] = ()  # files with public keys; empty: the project's development key alone
    unsigned: bool = False  # also load bundles that nobody signed: for experiments
    record: str = "auto"  # file of the versions that ran: a path, "auto" (state directory), or "off"


class LimitSettings(Settings, frozen=True):
    """What a model may take."""

    model_memory_mb: Positive | None = None  # at most, as measured at its first load; unset: no budget


class CloudSettings(Settings, frozen=True):
    """The way to the cloud tier; without this section nothing ever leaves the device."""

    broker: str  # mqtt://HOST[:PORT] or mqtts://HOST[:PORT]
    tenant: str = "home"
    device: str = ""  # empty: from the host name
    timeout_s: Seconds = 2.0  # the longest a caller waits for the cloud
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class Config(Settings, frozen=True):
    """One TOML file. Every key has a default, so that an empty file, or none, works."""

    models: tuple[str, ...] = ("commands",)  # names of bundled models, or paths of bundles
    threads: Positive = 1  # threads of one model run; 1 leaves the other cores to the device
    server: ServerSettings = ServerSettings()
    batch: BatchSettings = BatchSettings()
    cache: CacheSettings = CacheSettings()
    requests: RequestSettings = RequestSettings()
    escalation: EscalationSettings = EscalationSettings()
    trust: TrustSettings = TrustSettings()
    limits: LimitSettings = LimitSettings()
    cloud: CloudSettings | None = None


def load_config(path: Path | None) -> Config:
    """Read and check the file; None gives the defaults. Raises ConfigError."""
    if path is None:
        return Config()
    config = load_toml(path, Config)
    check_config(config, str(path))
    return config


def check_config(config: Config, where: str) -> None:
    """Check what types cannot say. Raises ConfigError."""
    if not config.models:
        raise ConfigError(f'{where}: models: the list is empty. Write models = ["commands"].')
    tcp_address(config, where)
    if not config.cache.path:
        raise ConfigError(f'{where}: [cache] path: the path is empty. Write path = "off" or path = "auto".')
    policy_of(config.batch.window, f"{where}: [batch] window")
    if config.cloud is not None:
        for key, value in (("tenant", config.cloud.tenant), ("device", config.cloud.device or "x")):
            if not _ID.fullmatch(value):
                raise ConfigError(
                    f"{where}: [cloud] {key}: expected an id of lower-case letters, digits, '.', '_' or '-', "
                    f'at most 64 long. Write for example {key} = "kitchen-1".'
                )
        if not re.fullmatch(r"mqtts?://[^/\s:@]+(:\d{1,5})?", config.cloud.broker):
            raise ConfigError(
                f"{where}: [cloud] broker: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]. "
                'Write for example broker = "mqtt://127.0.0.1:1883".'
            )


def tcp_address(config: Config, where: str = "config") -> tuple[str, int] | None:
    """Host and port to listen on, or None for "off". Raises ConfigError."""
    if config.server.tcp == "off":
        return None
    host, _, port = config.server.tcp.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(
            f'{where}: [server] tcp: expected HOST:PORT or "off". Write tcp = "127.0.0.1:8080".'
        )
    return host.strip("[]"), int(port)


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
    return Path(f"/tmp/edge-runtime-{os.getuid()}") / "edge.sock"  # noqa: S108 - made 0700, owner checked


def device_id(cloud: CloudSettings) -> str:
    """The configured device id, or one made of the host name."""
    if cloud.device:
        return cloud.device
    return re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip(".-_")[:64] or "device"
