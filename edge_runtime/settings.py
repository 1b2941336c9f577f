"""Sections of the configuration that the edge and the cloud tier share: the same key means the same on both.

A string below a field is its description in docs/configuration.md (`python -m tools.document_config`).
"""

import re
import socket
from collections.abc import Sequence
from typing import Annotated

import msgspec

from edge_runtime.core.errors import BundleError, ConfigError
from edge_runtime.core.protocol.ids import RULE, id_from, is_id
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.core.scheduling.windows import Policy

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=60_000)]

_BROKER = re.compile(r"mqtts?://[^/\s:@]+(?::(?P<port>\d+))?")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: an unknown key is an error, never ignored."""


class BatchSettings(Settings, frozen=True):
    """How the requests of each model are batched, and how many may wait."""

    # 8: a small model gains nothing beyond, and each doubling costs it 3 MB of buffers.
    max: Positive = 8
    """Largest number of rows in one batch; a bundle may allow fewer."""
    window: str | Milliseconds = "learned"
    """How long an idle model waits for more requests: `"learned"` (only where measured arrivals show that waiting
    pays), `"off"`, or milliseconds from the first arrival."""
    duty_target: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    """Share of time that the engine may run; it saves power and costs latency. Unset: no limit."""
    duty_wait_ms: Milliseconds = 100.0
    """Longest time that a request waits because of `duty_target`."""
    queue: Positive = 1024
    """Number of rows that may wait for the engine; further rows are refused at once."""
    queue_bytes: Positive = 64 << 20
    """Bytes of tensors that may wait for the engine."""
    tenant_queue: Positive | None = None
    """Number of rows of one tenant that may wait. Unset: as many as `queue`."""
    tenant_engine_share: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Engine time that one tenant may use per second of clock time, for example 0.5. Unset: no limit."""


class RequestSettings(Settings, frozen=True):
    """Time limits of requests."""

    timeout_s: Seconds = 10.0
    """Time limit of a request that brings no deadline of its own."""
    drain_s: Seconds = 10.0
    """How long SIGTERM waits for requests that are being answered."""


class TrustSettings(Settings, frozen=True):
    """Which model bundles may be loaded."""

    keys: tuple[str, ...] = ()
    """Files with public keys, as `edge-runtime models keygen` writes them. Empty: the project's development key."""
    unsigned: bool = False
    """Load bundles without a signature too; for experiments."""
    record: str = "auto"
    """File that remembers the newest version of each model that ran, so that an older one is refused: a path,
    `"auto"` (in the state directory), or `"off"`."""


class LimitSettings(Settings, frozen=True):
    """What a model may use."""

    model_memory_mb: Positive | None = None
    """Largest memory of one model, as measured at its first load. Unset: no limit."""


class BrokerSettings(Settings, frozen=True):
    """Where the MQTT broker is, and how to be admitted there."""

    broker: str
    """Address of the broker: `mqtt://HOST[:PORT]`, or `mqtts://HOST[:PORT]` with TLS."""
    username: str = ""
    """User name at the broker. Empty: none is sent."""
    password_file: str = ""
    """File with the password of `username`."""
    ca_file: str = ""
    """Certificates of the authorities that may vouch for the broker. Empty: those of the system."""
    cert_file: str = ""
    """Certificate with which this side proves who it is. Empty: none is sent."""
    key_file: str = ""
    """Private key of `cert_file`."""


def check_broker(broker: str, where: str) -> None:
    """Check a broker's address. Raises ConfigError that begins with `where`: file, section and key."""
    found = _BROKER.fullmatch(broker)
    if found is None or (found["port"] is not None and not (is_port(found["port"]) and int(found["port"]))):
        raise ConfigError(
            f"{where}: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]. "
            'Write for example broker = "mqtt://127.0.0.1:1883".'
        )


def is_port(text: str) -> bool:
    """Whether a text is the number of a port; 0 lets the system choose one."""
    return text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65_535


def check_models(models: Sequence[str], where: str, example: str) -> None:
    """Check the list of models. Raises ConfigError that begins with `where`: the file."""
    if not models:
        raise ConfigError(f'{where}: models: the list is empty. Write models = ["{example}"].')
    if "" in models:
        raise ConfigError(f'{where}: models: a name is empty. Write for example models = ["{example}"].')
    twice = next((name for i, name in enumerate(models) if name in models[:i]), None)
    if twice is not None:
        raise ConfigError(f"{where}: models: {twice} is listed twice. Remove one of them.")


def check_path(path: str, where: str) -> None:
    """Check a path that may be a word instead. Raises ConfigError that begins with `where`: file, section and key."""
    if not path or "\0" in path:
        key = where.rsplit(maxsplit=1)[-1]
        raise ConfigError(
            f'{where}: expected a path, "auto" or "off". Write {key} = "auto" or {key} = "off".'
        )


def check_batch(batch: BatchSettings, where: str) -> None:
    """Check what the types of the section cannot say. Raises ConfigError that begins with `where`: the file."""
    if isinstance(batch.window, str) and batch.window not in ("learned", "off"):
        raise ConfigError(
            f'{where}: [batch] window: expected "learned", "off" or milliseconds. Write window = "learned".'
        )


def check_files(models: Sequence[str], trust: TrustSettings, password_file: str, where: str) -> None:
    """Check that this machine has the files which a configuration names. Raises ConfigError."""
    # Late: only the commands that check a configuration need them.
    from edge_runtime.bundles.folder import find_bundle  # noqa: PLC0415
    from edge_runtime.bundles.trust import read_trust  # noqa: PLC0415
    from edge_runtime.typed_toml import read_secret  # noqa: PLC0415

    read_trust(trust.keys, allow_unsigned=trust.unsigned)
    read_secret(password_file)
    for name in models:
        try:
            find_bundle(name)
        except BundleError as error:
            raise ConfigError(f"{where}: models: {error}") from None


def policy_of(batch: BatchSettings) -> Policy:
    """When an idle engine waits for more requests; for a section that passed `check_batch`."""
    return Policy(
        window_ns=_window_ns(batch.window),
        duty_target=batch.duty_target,
        duty_wait_ns=int(batch.duty_wait_ms * 1e6),
    )


def queue_limits_of(batch: BatchSettings) -> QueueLimits:
    """How large batches and queues may get."""
    return QueueLimits(
        max_batch=batch.max,
        max_waiting=batch.queue,
        max_waiting_bytes=batch.queue_bytes,
        tenant_max_waiting=batch.tenant_queue,
        tenant_engine_share=batch.tenant_engine_share,
    )


def _window_ns(window: str | float) -> int | None:
    """`Policy.window_ns`: None where the window is learned, 0 where there is none."""
    if isinstance(window, str):
        return None if window == "learned" else 0
    return int(window * 1e6)


def check_id(value: str, where: str, example: str) -> None:
    """Check an id. Raises ConfigError that begins with `where`: file, section and key."""
    if not is_id(value):
        key = where.rsplit(maxsplit=1)[-1]
        raise ConfigError(f'{where}: expected an id: {RULE}. Write for example {key} = "{example}".')


def id_from_host_name(otherwise: str) -> str:
    """An id made of the host name; `otherwise` where no character of the host name may stand in an id."""
    return id_from(socket.gethostname(), otherwise)
