"""The worker's configuration: one TOML file, every key with a default, the shared sections as the edge has them."""

from pathlib import Path

from edge_runtime.settings import (
    BatchSettings,
    BrokerSettings,
    LimitSettings,
    Positive,
    RequestSettings,
    TrustSettings,
    check_batch,
    check_broker,
    check_id,
    check_models,
    check_path,
    id_from_host_name,
)
from edge_runtime.typed_toml import Renamed, check_types, load_toml


class WorkerBatchSettings(BatchSettings, frozen=True):
    """How the requests of each model are batched, and how many may wait; the keys of the edge."""

    max: Positive = 32
    """Largest number of rows in one batch; a bundle may allow fewer."""


class CloudConfig(BrokerSettings, frozen=True):
    """One TOML file. Every key has a default, so an empty file, or none, works."""

    broker: str = "mqtt://127.0.0.1:1883"
    """Address of the broker: `mqtt://HOST[:PORT]`, or `mqtts://HOST[:PORT]` with TLS."""
    group: str = "workers"
    """Id of the group of workers; each request reaches one worker of the group."""
    worker: str = "auto"
    """Id of this worker, unique at the broker; `"auto"` makes one of the host name."""
    models: tuple[str, ...] = ("models/commands-cloud",)
    """Models to serve: names of bundled ones, or paths of bundles."""
    threads: Positive = 2
    """Threads of one model run."""
    instances: Positive = 1
    """Engines of each model, each in a thread of its own."""
    depth: Positive = 1
    """Batches that each engine is handed at a time; 2 hides the copies to a GPU."""
    max_in_flight: Positive = 1024
    """Requests that this worker holds without having answered them; further ones are refused as busy."""
    batch: WorkerBatchSettings = WorkerBatchSettings()
    requests: RequestSettings = RequestSettings()
    trust: TrustSettings = TrustSettings()
    limits: LimitSettings = LimitSettings()


#: Former keys and words of this configuration, read for one release more.
RENAMED = Renamed(
    keys={
        "max_batch": "batch.max",
        "window": "batch.window",
        "queue": "batch.queue",
        "tenant_queue": "batch.tenant_queue",
        "tenant_engine_share": "batch.tenant_engine_share",
        "timeout_s": "requests.timeout_s",
        "drain_s": "requests.drain_s",
        "trusted_keys": "trust.keys",
        "allow_unsigned": "trust.unsigned",
        "record": "trust.record",
    },
    words={"batch.window": {"none": "off"}, "worker": {"": "auto"}},
)


def load_config(path: Path | None) -> CloudConfig:
    """Read and check the file; None gives the defaults. Raises ConfigError."""
    if path is None:
        return CloudConfig()
    config = load_toml(path, CloudConfig, RENAMED)
    check_config(config, str(path))
    return config


def check_config(config: CloudConfig, where: str) -> None:
    """Check all that can be checked without looking at this machine. Raises ConfigError that begins with `where`."""
    check_types(config, where)
    check_models(config.models, where, "models/commands-cloud")
    check_path(config.trust.record, f"{where}: [trust] record")
    check_broker(config.broker, f"{where}: broker")
    check_batch(config.batch, where)
    check_id(config.group, f"{where}: group", "workers")
    check_id(config.worker, f"{where}: worker", "gpu-1")


def worker_id(config: CloudConfig) -> str:
    """The configured id, or one made of the host name."""
    return config.worker if config.worker != "auto" else id_from_host_name("worker")
