"""The worker in virtual time: acknowledgements, duplicates, draining, in every order. No socket, no model, no waiting."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from cloud_fallback import worker as worker_module
from cloud_fallback.config import CloudConfig, RequestSettings
from cloud_fallback.duplicates import Duplicates
from cloud_fallback.worker import RECEIVE_MAXIMUM, Loaded, Worker
from edge_runtime.core.errors import RefusalKind, refusal
from edge_runtime.core.messages import Answer, InferRequest, Signature, Tensor, TensorSpec
from edge_runtime.core.protocol import oip
from edge_runtime.mqtt.client import Broker, ConnectOptions
from edge_runtime.mqtt.envelope import Message, pack, unpack
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
        assert await self.worker.wait_ready(1)
        await settle()
        self.client.acknowledged.clear()  # of its messages to itself
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


def arrivals(client):
    """Packet ids in the order in which the broker sent them."""
    first = client.acknowledged[0] if client.acknowledged else 0
    return list(range(first, first + len(client.acknowledged)))


def test_requests_are_acknowledged_at_admission_in_the_order_of_arrival():
    """Whatever they are and whenever they are answered: a broker may close at an acknowledgement out of turn."""

    async def scenario(rig):
        rig.runner.gate.clear()
        first = rig.device.publish(request(1))
        rig.client.deliver(Message("er/v1/home/d1/req/a..b", BODY))  # no request
        rig.device.publish(request(1))  # known
        rig.device.publish(request(2))
        rig.client.deliver(Message(REQ, b"planted", retain=True))
        rig.client.deliver(Message("er/v1/home/d1/req/other", BODY, correlation=b"x" * 16))  # not served here
        rig.device.publish(request(3, b"{"))  # cannot be read
        await settle()
        assert first is not None
        assert len(rig.client.acknowledged) == 7
        assert rig.client.acknowledged == arrivals(rig.client)
        assert rig.runner.runs == 2  # none of them is done

    in_rig(scenario)


def test_a_reply_that_waits_holds_no_acknowledgement_back():
    async def scenario(rig):
        rig.server.confirms = False
        for number in range(1, 4):
            rig.device.publish(request(number))
        await settle()
        assert len(rig.client.acknowledged) == 3

    in_rig(scenario)


def test_a_duplicate_is_answered_from_memory():
    async def scenario(rig):
        for _ in range(3):
            rig.device.publish(request(1))
            await settle()
        assert rig.runner.runs == 1
        assert len({reply.payload for reply in rig.heard}) == 1
        assert len(rig.heard) == len(rig.client.acknowledged) == 3
        assert rig.worker.counters["duplicates"] == 2

    in_rig(scenario)


def test_what_was_sent_is_what_is_kept():
    """A reply that is too large for the broker is kept as the small error that was sent in its place."""

    async def scenario(rig):
        rows = np.zeros((500, 2), np.float32)
        large = oip.encode_request(InferRequest((Tensor("x", "FP32", rows.shape, rows),)))[0]
        rig.client._events.max_packet_bytes = 2000
        for _ in range(2):
            rig.device.publish(request(1, large))
            await settle()
        assert rig.runner.runs == 1
        assert ["accepts 2000" in told(reply)[0] for reply in rig.heard] == [True, True]
        assert rig.worker._duplicates.size_bytes < 2000

    in_rig(scenario)


def test_what_is_kept_of_replies_is_bounded_in_bytes():
    """13 MB of traffic from one device filled 1.3 GB: 300 kB of scores for each request of 3 kB."""

    async def scenario(rig):
        rig.worker._duplicates = Duplicates(max_bytes=20_000)
        for number in range(200):
            rig.device.publish(request(number))
            await settle()
            assert rig.worker._duplicates.size_bytes <= 20_000
        assert rig.runner.runs == 200

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


def test_large_bodies_are_decoded_in_turns_and_small_ones_overtake_them():
    async def scenario(rig):
        rows = np.random.default_rng(1).random((1024, 2), np.float32)
        body, length = oip.encode_request(
            InferRequest((Tensor("x", "FP32", rows.shape, rows),)), binary=False
        )
        assert length is None
        for number in (1, 2):
            rig.device.publish(pack(REQ, body, None, correlation=bytes([number]) * 16, expiry_s=5))
        rig.device.publish(request(3))
        await settle()
        assert [reply.correlation[0] for reply in rig.heard] == [3, 1, 2]
        assert [len(oip.decode_reply(*unpack(reply)).outputs[0].data) for reply in rig.heard] == [
            1,
            1024,
            1024,
        ]

    in_rig(scenario)


def test_what_does_not_fit_the_model_is_refused_before_its_data_is_decoded():
    """Eight kilobytes of zstd hold two million empty texts, for a model that takes two numbers."""

    async def scenario(rig):
        head = b'{"inputs":[{"name":"x","shape":[1,2000000],"datatype":"BYTES","parameters":{"binary_data_size":8000000}}]}'
        bomb = pack(REQ, head + bytes(8_000_000), len(head), correlation=b"b" * 16, expiry_s=5)
        assert len(bomb.payload) < 10_000
        rig.device.publish(bomb)
        await settle()
        _, fields = told(rig.heard[0])
        assert fields["reason"] == "invalid"
        assert rig.runner.runs == 0

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
        assert (len(rig.client.acknowledged), rig.heard, rig.runner.runs) == (1, [], 0)
        assert rig.worker.counters["foreign"] == 1

    in_rig(scenario)


def test_a_model_that_is_not_served_is_called_so_and_no_internal_error():
    """A broker may deliver by an old subscription; edges must not take it for a failing cloud."""

    async def scenario(rig):
        rig.client.deliver(Message("er/v1/home/d1/req/other", BODY, correlation=b"x" * 16))
        await settle()
        text, fields = told(rig.heard[0])
        assert fields["reason"] == "invalid"
        assert "does not serve other" in text

    in_rig(scenario)


def test_beyond_its_room_it_refuses_as_busy_at_once_and_says_when_to_come_back():
    async def scenario(rig):
        rig.runner.gate.clear()
        for number in range(1, 6):
            rig.device.publish(request(number))
        await settle()
        assert [reply.correlation[0] for reply in rig.heard] == [4, 5]
        assert {told(reply)[1]["reason"] for reply in rig.heard} == {"full"}
        assert min(told(reply)[1]["retry_after_ms"] for reply in rig.heard) > 0
        assert len(rig.client.acknowledged) == 5
        assert rig.worker.counters["busy"] == 2
        rig.runner.gate.set()
        await settle()
        rig.device.publish(request(4))
        await settle()
        assert {reply.correlation[0] for reply in rig.heard[2:]} == {1, 2, 3, 4}
        assert "outputs" in rig.heard[-1].payload.decode()

    in_rig(scenario, max_in_flight=3)


def test_its_room_is_bounded_in_bytes():
    async def scenario(rig):
        rig.runner.gate.clear()
        large = BODY[:-1] + b" " * 100_000 + b"}"
        for number in range(1, 4):
            rig.device.publish(request(number, large))
        await settle()
        assert [reply.correlation[0] for reply in rig.heard] == [3]
        rig.runner.gate.set()
        await settle()
        assert rig.worker._held_bytes == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "_MAX_HELD_BYTES", 250_000)
        in_rig(scenario)


def test_a_flood_that_cannot_even_be_refused_is_held_at_the_broker():
    """The broker confirms no reply: refusals wait for the window, and Receive Maximum stops the flood."""

    async def scenario(rig):
        rig.runner.gate.clear()
        rig.server.confirms = False
        for number in range(5000):
            rig.client.deliver(Message(REQ, BODY, correlation=number.to_bytes(16, "big")))
        await settle()
        admitted = len(rig.client.acknowledged)
        assert admitted == 3 + RECEIVE_MAXIMUM
        assert len(rig.worker._tasks) <= 3 + 2 * RECEIVE_MAXIMUM + 1  # even if the broker does not stop
        assert all(received.message.payload == b"" for received in rig.worker._unacknowledged)
        rig.server.confirms = True
        for packet_id in list(rig.client.withheld):
            rig.client.confirm(packet_id)
        await settle()
        assert len(rig.client.acknowledged) == 5000
        assert rig.client.acknowledged == arrivals(rig.client)

    in_rig(scenario, max_in_flight=3)


def test_a_reply_waits_for_the_next_connection():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1, expiry_s=30))
        await settle()
        rig.client.lose()
        rig.server.unreachable = "connection refused"
        await settle()
        rig.runner.gate.set()
        await asyncio.sleep(5)
        assert rig.heard == []
        rig.server.unreachable = ""
        assert await rig.worker.wait_ready(30)
        await settle()
        assert [reply.correlation[0] for reply in rig.heard] == [1]
        rig.device.publish(request(1))
        await settle()
        assert (rig.runner.runs, len(rig.heard)) == (1, 2)

    in_rig(scenario)


def test_a_reply_lost_with_its_connection_is_sent_again():
    async def scenario(rig):
        rig.server.confirms = False
        rig.server.publish_code = lambda message: 0 if message.topic == RSP else None  # it gets nowhere
        rig.device.publish(request(1))
        await settle()
        assert [message.topic for message in rig.client.published[-1:]] == [RSP]
        rig.server.confirms, rig.server.publish_code = True, lambda message: None
        rig.client.lose()
        await settle()
        assert await rig.worker.wait_ready(30)
        await settle()
        assert [reply.correlation[0] for reply in rig.heard] == [1]

    in_rig(scenario)


def test_a_reply_is_given_up_when_its_sender_has():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.device.publish(request(1, expiry_s=3))
        await settle()
        rig.client.lose()
        rig.server.unreachable = "connection refused"
        await settle()
        rig.runner.gate.set()
        await asyncio.sleep(3.1)
        assert rig.worker.counters["expired_replies"] == 1
        assert not rig.worker._tasks
        assert rig.worker._held_bytes == 0
        rig.server.unreachable = ""

    in_rig(scenario)


def test_what_was_held_back_of_a_lost_connection_is_not_acknowledged_on_the_next():
    async def scenario(rig):
        rig.runner.gate.clear()
        rig.server.confirms = False
        for number in range(3 + RECEIVE_MAXIMUM + 50):
            rig.client.deliver(Message(REQ, BODY, correlation=number.to_bytes(16, "big")))
        await settle()
        assert rig.worker._unacknowledged
        rig.server.confirms = True
        rig.client.lose()
        await settle()
        assert not rig.worker._unacknowledged
        rig.runner.gate.set()
        assert await rig.worker.wait_ready(30)
        assert len(rig.client.acknowledged) == 2  # its messages to itself, by both subscriptions

    in_rig(scenario, max_in_flight=3)


def test_replies_that_the_broker_refuses_are_named():
    async def scenario(rig):
        assert rig.worker.problem == ""
        rig.server.publish_code = lambda message: 0x87 if message.topic == RSP else None
        rig.device.publish(request(1))
        await settle()
        assert f"refuses replies on {RSP}" in rig.worker.problem
        assert "authorise" in rig.worker.problem
        assert rig.worker.counters["refused_replies"] == 1
        rig.server.publish_code = lambda message: None
        rig.device.publish(request(2))
        await settle()
        assert rig.worker.problem == ""

    in_rig(scenario)


def test_a_subscription_that_is_refused_is_named_and_it_is_not_ready():
    async def scenario():
        rig = Rig()
        rig.server.subscribe_code = lambda topic: 0x87
        rig.worker.connection.start()
        assert not await rig.worker.wait_ready(10)
        assert "refused the subscription to $share/workers/er/v1/+/+/req/echo" in rig.worker.problem
        await rig.worker.drain()

    run_virtual(scenario)


def test_requests_that_are_granted_and_not_delivered_are_named_and_it_is_not_ready():
    """mosquitto's acl_file grants every subscription and filters at delivery."""

    async def scenario():
        rig = Rig()
        rig.server.publish_code = lambda message: 0 if "/req/" in message.topic else None
        rig.worker.connection.start()
        assert not await rig.worker.wait_ready(20)
        assert "granted the subscription to er/v1/+/+/req/echo and does not deliver" in rig.worker.problem
        rig.server.publish_code = lambda message: None  # a person corrects the rules
        assert await rig.worker.wait_ready(60)
        assert rig.worker.problem == ""
        await rig.worker.drain()

    run_virtual(scenario)


@pytest.mark.parametrize("refuses", ["publish", "subscribe", "silently"])
def test_where_strict_rules_forbid_the_check_nothing_is_concluded(refuses):
    async def scenario():
        rig = Rig()
        if refuses == "publish":
            rig.server.publish_code = lambda message: 0x87 if "/_worker/w1/req/" in message.topic else None
        else:
            code = 0x87 if refuses == "subscribe" else None
            rig.server.subscribe_code = lambda topic: code if "_worker" in topic else 1
        rig.worker.connection.start()
        assert await rig.worker.wait_ready(5)
        await rig.worker.drain()

    run_virtual(scenario)


def test_the_checks_of_other_workers_are_no_requests():
    async def scenario(rig):
        rig.client.deliver(Message("er/v1/_worker/w2/req/echo", b""))
        await settle()
        assert len(rig.client.acknowledged) == 1
        assert rig.worker.counters["foreign"] == 0
        assert rig.heard == []

    in_rig(scenario)


def test_it_asks_for_no_session_and_a_short_keep_alive():
    async def scenario(rig):
        assert rig.client.options.keepalive_s == 10
        assert rig.client.options.receive_maximum == RECEIVE_MAXIMUM
        assert rig.client.broker.client_id == "worker:w1"

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


def test_what_a_drain_cannot_answer_in_time_is_refused_as_draining():
    async def scenario(rig):
        rig.runner.gate.clear()
        for number in (1, 2):
            rig.device.publish(request(number))
        await settle()
        await rig.worker.drain()
        assert {reply.correlation[0]: told(reply)[1]["reason"] for reply in rig.heard} == {
            1: "draining",
            2: "draining",
        }

    in_rig(scenario, requests=RequestSettings(drain_s=4.0))


@pytest.mark.parametrize("after_s", [0.0, 0.5, 3.9, 4.2])
def test_a_cancelled_drain_leaves_nothing_running(after_s):
    """Cancelled while it waits for the broker, for what runs, or for its farewells."""

    async def scenario():
        rig = Rig(requests=RequestSettings(drain_s=4.0))
        await rig.__aenter__()
        rig.runner.gate.clear()
        rig.device.publish(request(1))
        await settle()
        if after_s in (0.0, 4.2):
            rig.client._soon = lambda report: None  # the broker has stopped answering
        draining = asyncio.create_task(rig.worker.drain())
        await asyncio.sleep(after_s)
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        await settle()
        assert {t.get_name() for t in asyncio.all_tasks()} <= {asyncio.current_task().get_name()}
        assert not rig.client.is_open

    run_virtual(scenario)
