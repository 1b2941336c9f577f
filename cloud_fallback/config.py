"""The worker's configuration: one TOML file, every key with a default."""

import re
import socket
from pathlib import Path
from typing import Annotated

import msgspec

from edge_runtime.core.errors import ConfigError
from edge_runtime.core.protocol.topics import is_id
from edge_runtime.core.scheduling.windows import policy_of
from edge_runtime.typed_toml import load_toml

Positive = Annotated[int, msgspec.Meta(ge=1)]


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model may take."""

    model_memory_mb: Positive | None = None  # at most, as measured at its first load; unset: no budget


class CloudConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `cloud.toml` may say."""

    broker: str = "mqtt://127.0.0.1:1883"
    group: str = "workers"  # workers of one group share the requests
    worker: str = ""  # empty: from the host name
    models: tuple[str, ...] = ("models/commands-cloud",)
    threads: Positive = 2  # of one model run
    max_batch: Positive = 32
    window: str | Annotated[float, msgspec.Meta(ge=0, le=60_000)] = (
        "learned"  # "learned", "none", or milliseconds
    )
    instances: Positive = 1  # engines of each model, each in a thread of its own
    depth: Positive = 1  # batches that each is handed at a time: 2 hides the copies to a GPU
    queue: Positive = 1024
    tenant_queue: Positive | None = None  # requests of one tenant that may wait; unset: all
    tenant_engine_share: Annotated[float, msgspec.Meta(gt=0)] | None = (
        None  # engine time of one tenant per time
    )
    max_in_flight: Positive = 64  # requests the broker may hand over before the first is acknowledged
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0  # for requests without a deadline
    drain_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0
    trusted_keys: tuple[str, ...] = ()  # files with public keys; empty: the project's development key alone
    allow_unsigned: bool = False  # also load bundles that nobody signed: for experiments
    record: str = "auto"  # file of the versions that ran: a path, "auto" (state directory), or "off"
    limits: LimitSettings = LimitSettings()
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


def load_config(path: Path | None) -> CloudConfig:
    """Read and check the file; None gives the defaults. Raises ConfigError."""
    if path is None:
        return CloudConfig()
    config = load_toml(path, CloudConfig)
    if not re.fullmatch(r"mqtts?://[^/\s:@]+(:\d{1,5})?", config.broker):
        raise ConfigError(
            f'{path}: broker: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]. Write broker = "mqtt://127.0.0.1:1883".'
        )
    policy_of(config.window, f"{path}: window")
    if not is_id(config.group) or (config.worker and not is_id(config.worker)):
        raise ConfigError(f'{path}: group, worker: expected ids such as "workers" and "gpu-1".')
    if not config.models:
        raise ConfigError(f'{path}: models: the list is empty. Write models = ["models/commands-cloud"].')
    return config


def worker_id(config: CloudConfig) -> str:
    """The configured id, or one made of the host name."""
    if config.worker:
        return config.worker
    return re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip(".-_")[:64] or "worker"
