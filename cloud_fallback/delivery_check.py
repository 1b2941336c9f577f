"""Does the broker deliver the requests whose subscriptions it granted?

mosquitto's `acl_file` grants every SUBSCRIBE and filters at delivery, so that a worker that may not read would wait for
requests for ever and believe that nobody asks. The worker therefore publishes a message to itself on a topic that its
filter fits. Where the access rules let it publish and nothing comes back, it may not read; where they do not let it
publish, as strict rules should, nothing is concluded.
"""

import asyncio
from collections.abc import Iterable

from edge_runtime.core.protocol.topics import worker_check_topic
from edge_runtime.mqtt.connection import Connection
from edge_runtime.mqtt.envelope import Message

_WAIT_S = 3.0


class DeliveryCheck:
    """Checks one connection at a time."""

    def __init__(
        self, connection: Connection, worker: str, models: Iterable[str], wait_s: float = _WAIT_S
    ) -> None:
        self.wait_s = wait_s
        self._connection = connection
        self._topics = {worker_check_topic(worker, model): asyncio.Event() for model in models}

    def arrived(self, topic: str) -> None:
        """Note a message on a worker's topic to itself; those of other workers of the group come here, too."""
        if topic in self._topics:
            self._topics[topic].set()

    async def run(self) -> str:
        """Return what is wrong in one sentence, or nothing. Raises LinkLost."""
        for topic, came in self._topics.items():
            came.clear()
            try:
                async with asyncio.timeout(self.wait_s):
                    code = await self._connection.subscribe(topic)
            except TimeoutError:
                continue
            if code >= 0x80:
                continue
            if await self._connection.publish(Message(topic, b"", expiry_s=max(1, int(self.wait_s)))) >= 0x80:
                continue
            try:
                async with asyncio.timeout(self.wait_s):
                    await came.wait()
            except TimeoutError:
                model = topic.rsplit("/", 1)[1]
                return (
                    f"the broker granted the subscription to er/v1/+/+/req/{model} and does not deliver it; "
                    "check that its access rules let this worker read that topic"
                )
        return ""
