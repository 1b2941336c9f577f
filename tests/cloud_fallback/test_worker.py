"""The worker in virtual time: acknowledgements, duplicates, draining, in every order. No socket, no model, no waiting."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from cloud_fallback.config import CloudConfig, RequestSettings
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.core.errors import RefusalKind, refusal
from edge_runtime.core.messages import Answer, InferRequest, Signature, Tensor, TensorSpec
from edge_runtime.core.protocol import oip
from edge_runtime.mqtt.client import Broker, ConnectOptions
from edge_runtime.mqtt.envelope import Message, unpack
from edge_runtime.mqtt.fake import FakeBroker
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.in_flight import Served
from tests.virtual_time import run_virtual, settle

REQ, RSP = "er/v1/home/d1/req/echo", "er/v1/home/d1/rsp"
SPEC = TensorSpec("x", "FP32", (-1, 2))
SIGNATURE = Signature((SPEC,), (TensorSpec("y", "FP32", (-1, 2)),))
BODY = oip.encode_request(InferRequest((Tensor("x", "FP32", (1, 2), np.float32([[1, 2]])),)))[0]


def request(number, body=BODY, **more):
    return Message(REQ, body, correlation=bytes([number]) * 16, **more)


class Runner:
    """A model runner that answers when `gate` is open, and counts."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.runs, self.error, self.options = 0, None, {}

    async def run_rows(self, rows, **options):
        self.runs += 1
        self.options = options
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [Served(Answer(row, None), 0, 0, 1) for row in rows]


class Rig:
    """A worker, and a device that keeps what it hears."""

    def __init__(self, **config):
        self.server = FakeBroker()
        self.runner = Runner()
        processor = Tensors(SIGNATURE, version="1")
        model = SimpleNamespace(
            name="echo", version="1", processor=processor, info=SimpleNamespace(signature=SIGNATURE)
        )
        settings = CloudConfig(broker="mqtt://nowhere", worker="w1", models=("echo",), **config)
        self.worker = Worker(
            settings, "", {"echo": Loaded(model, self.runner)}, new_client=self.server.new_client
        )
        self.heard = []
        self.device = self.server.new_client(Broker("", "d"), ConnectOptions("d", 9, 30, 5.0), self)

    def on_message(self, message, packet_id, qos):
        self.heard.append(message)

    def __getattr__(self, name):
        return lambda *_: None

    @property
    def clients(self):
        """The worker's connections, oldest first."""
        return self.server.clients[1:]

    @property
    def client(self):
        return self.clients[-1]

    async def __aenter__(self):
        await self.device.open()
        self.device.subscribe([RSP])
        self.worker.connection.start()
        assert await self.worker.connection.wait_connected(1)
        return self

    async def __aexit__(self, *_):
        self.runner.gate.set()
        await self.worker.drain()


def in_rig(scenario, **config):
    async def limited():
        async with Rig(**config) as rig:
            await scenario(rig)

    run_virtual(limited)


def told(message):
    return oip.decode_error(unpack(message)[0])


def test_a_request_is_answered_where_its_sender_listens():
    async def scenario(rig):
        rig.device.publish(request(1))
        await settle()
        (reply,) = rig.heard
        assert (reply.topic, reply.correlation) == (RSP, bytes([1]) * 16)
        answer = oip.decode_reply(*unpack(reply))
        assert answer.outputs[0].data.tolist() == [[1.0, 2.0]]
        assert answer.parameters["origin"] == "cloud"

    in_rig(scenario)


def test_a_request_is_acknowledged_after_its_reply_is_confirmed():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        await settle()
        assert rig.client.acknowledged == []
        rig.server.confirms = False
        rig.runner.gate.set()
        await settle()
        assert (len(rig.heard), rig.client.acknowledged) == (1, [])
        rig.server.confirms = True
        for packet_id in list(rig.client.withheld):
            rig.client.confirm(packet_id)
        await settle()
        assert rig.client.acknowledged == [1]

    in_rig(scenario)


def test_a_duplicate_is_answered_from_memory():
    async def scenario(rig):
        for _ in range(3):
            rig.device.publish(request(1))
            await settle()
        assert rig.runner.runs == 1
        assert len({reply.payload for reply in rig.heard}) == 1
        assert len(rig.heard) == len(rig.client.acknowledged) == 3

    in_rig(scenario)


def test_a_duplicate_of_what_runs_is_not_run_again():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        rig.device.publish(request(1))
        await settle()
        rig.runner.gate.set()
        await settle()
        assert (rig.runner.runs, len(rig.heard)) == (1, 1)

    in_rig(scenario)


def test_one_id_with_another_body_is_another_request():
    async def scenario(rig):
        other = oip.encode_request(InferRequest((Tensor("x", "FP32", (1, 2), np.float32([[3, 4]])),)))[0]
        rig.device.publish(request(1))
        rig.device.publish(request(1, other))
        await settle()
        assert {oip.decode_reply(*unpack(m)).outputs[0].data.tolist()[0][0] for m in rig.heard} == {1.0, 3.0}

    in_rig(scenario)


def test_without_an_id_every_request_is_new():
    async def scenario(rig):
        for _ in range(2):
            rig.device.publish(Message(REQ, BODY))
        await settle()
        assert (rig.runner.runs, len(rig.heard)) == (2, 2)

    in_rig(scenario)


@pytest.mark.parametrize("error", [refusal(RefusalKind.FULL, 5_000_000), RuntimeError("a defect")])
def test_what_may_fare_better_next_time_is_not_kept(error):
    async def scenario(rig):
        rig.runner.error = error
        rig.device.publish(request(1))
        await settle()
        text, fields = told(rig.heard[0])
        assert fields.get("reason") == ("full" if "full" in str(error) else None)
        assert "defect" not in text
        rig.runner.error = None
        rig.device.publish(request(1))
        await settle()
        assert "outputs" in rig.heard[1].payload.decode()
        assert rig.runner.runs == 2

    in_rig(scenario)


def test_a_topic_that_is_no_request_is_acknowledged_and_not_run():
    async def scenario(rig):
        rig.client.deliver(Message("er/v1/home/d1/req/a..b", BODY))
        await settle()
        assert (rig.client.acknowledged, rig.heard, rig.runner.runs) == ([1], [], 0)

    in_rig(scenario)


def test_a_lost_connection_leaves_the_request_unacknowledged_and_the_reply_kept():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        await settle()
        rig.client.lose()
        await settle()
        rig.runner.gate.set()
        await settle()
        assert await rig.worker.connection.wait_connected(30)
        assert [client.acknowledged for client in rig.clients] == [[], []]
        rig.device.publish(request(1))
        await settle()
        assert (rig.runner.runs, len(rig.heard)) == (1, 1)

    in_rig(scenario)


def test_draining_waits_for_what_runs():
    async def scenario(rig):
        rig.runner.gate.clear()
        for number in range(1, 6):
            rig.device.publish(request(number))
        await settle()
        draining = asyncio.create_task(rig.worker.drain())
        await asyncio.sleep(3)
        assert not draining.done()
        rig.runner.gate.set()
        await draining
        assert {reply.correlation[0] for reply in rig.heard} == {1, 2, 3, 4, 5}
        assert rig.client.is_disconnected

    in_rig(scenario)


def test_draining_takes_what_the_broker_still_sends():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        await settle()
        draining = asyncio.create_task(rig.worker.drain())
        await settle()
        rig.client.deliver(request(2))
        await settle()
        rig.runner.gate.set()
        await draining
        assert {reply.correlation[0] for reply in rig.heard} == {1, 2}

    in_rig(scenario)


def test_draining_ends_in_time_whatever_runs():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        await settle()
        began_s = asyncio.get_running_loop().time()
        await rig.worker.drain()
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(4.0, abs=0.1)
        assert not rig.worker._tasks

    in_rig(scenario, requests=RequestSettings(drain_s=4.0))


@pytest.mark.parametrize(
    ("parameters", "expiry_s", "limit_s"),
    [
        ({"timeout": 2_000_000}, None, 2),
        ({"deadline_ms": 2_000}, None, 2),
        ({"deadline_ms": 9_000}, 3, 3),
        ({}, 3, 3),
        ({}, None, 7),
    ],
)
def test_both_spellings_of_a_time_limit_hold_at_the_worker(parameters, expiry_s, limit_s):
    async def scenario(rig):
        x = Tensor("x", "FP32", (1, 2), np.float32([[1, 2]]))
        body = oip.encode_request(InferRequest((x,), parameters=parameters))[0]
        before_ns = time.monotonic_ns()
        rig.device.publish(request(1, body, expiry_s=expiry_s))
        await settle()
        after_ns = time.monotonic_ns()
        assert before_ns <= rig.runner.options["deadline_ns"] - limit_s * 10**9 <= after_ns

    in_rig(scenario, requests=RequestSettings(timeout_s=7))
