"""MQTT topic names: built from checked ids, and read back by exact level count. Nothing else makes or splits a topic.

    er/v1/{tenant}/{device}/req/{model}   edge -> workers, one of the group `$share/{group}/er/v1/+/+/req/{model}`
    er/v1/{tenant}/{device}/rsp           worker -> that edge
    er/v1/{tenant}/{device}/state         "online" or "offline" of an edge, retained
    er/v1/_worker/{worker}/state          the same for a worker; no tenant can be called `_worker`
    er/v1/_worker/{worker}/req/{model}    that worker -> itself: does the broker deliver what it granted?

The reply topic follows from the request topic alone. A Response Topic property is never read: it would
let one device have answers sent to another.
"""

from dataclasses import dataclass

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.protocol.ids import checked_id

_ROOT = "er/v1"


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """The sender and the model it asks. Tenant and device are only as true as the broker's access control."""

    tenant: str
    device: str
    model: str


def request_topic(tenant: str, device: str, model: str) -> str:
    """Where an edge publishes requests for `model`. Raises InvalidRequest for names that are no ids."""
    return f"{_device(tenant, device)}/req/{checked_id('model', model)}"


def reply_topic(tenant: str, device: str) -> str:
    """Where an edge listens for replies. Raises InvalidRequest for names that are no ids."""
    return f"{_device(tenant, device)}/rsp"


def reply_topic_for(topic: RequestTopic) -> str:
    """Where the reply to a request goes: the only topic the sender is sure to be allowed to read."""
    return reply_topic(topic.tenant, topic.device)


def device_state_topic(tenant: str, device: str) -> str:
    """Where an edge publishes, retained, whether it is online."""
    return f"{_device(tenant, device)}/state"


def worker_state_topic(worker: str) -> str:
    """Where a worker publishes, retained, whether it is online."""
    return f"{_ROOT}/_worker/{checked_id('worker', worker)}/state"


def worker_check_topic(worker: str, model: str) -> str:
    """Where a worker publishes to itself, to learn whether the broker delivers requests for `model` to it."""
    return f"{_ROOT}/_worker/{checked_id('worker', worker)}/req/{checked_id('model', model)}"


def is_worker_check(topic: str) -> bool:
    """Whether a topic is a worker's message to itself; its whole group may get it, since the group's filter fits."""
    return topic.startswith(f"{_ROOT}/_worker/")


def device_client_id(tenant: str, device: str) -> str:
    """The MQTT client id of a device. No id holds a colon, so two devices, or a device and a worker, never share one."""
    return f"edge:{checked_id('tenant', tenant)}:{checked_id('device', device)}"


def worker_client_id(worker: str) -> str:
    """The MQTT client id of a worker; see `device_client_id`."""
    return f"worker:{checked_id('worker', worker)}"


def worker_filter(group: str, model: str) -> str:
    """The shared subscription of a group of workers: each request reaches one of them."""
    return f"$share/{checked_id('group', group)}/{_ROOT}/+/+/req/{checked_id('model', model)}"


def parse_request_topic(topic: str) -> RequestTopic:
    """Read a request's topic. Raises InvalidRequest unless it has exactly the levels and ids it should."""
    # 256 covers the longest valid topic (three ids of 64); longer ones are not worth splitting.
    levels = topic.split("/") if len(topic) <= 256 else []
    if len(levels) != 6 or levels[:2] != ["er", "v1"] or levels[4] != "req":
        raise InvalidRequest("The topic is not er/v1/{tenant}/{device}/req/{model}.")
    return RequestTopic(
        checked_id("tenant", levels[2]), checked_id("device", levels[3]), checked_id("model", levels[5])
    )


def _device(tenant: str, device: str) -> str:
    return f"{_ROOT}/{checked_id('tenant', tenant)}/{checked_id('device', device)}"
