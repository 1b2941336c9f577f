"""A task, a cloud and a second cache level that do as a test says: rows are texts like b"name@0.9"."""

import asyncio

import numpy as np

from edge_runtime.caching.answer_store import Found
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.escalation.decision import CloudUnavailable, LinkState
from edge_runtime.core.messages import (
    Answer,
    InferReply,
    InferRequest,
    ModelInfo,
    Signature,
    Tensor,
    TensorSpec,
)
from edge_runtime.core.protocol.replies import read_answer
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.processing import PreparedRow
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.serving.service import ServedModel, Service

SIGNATURE = Signature(
    (TensorSpec("text", "BYTES", (-1,)),),
    (TensorSpec("label", "BYTES", (-1,)), TensorSpec("confidence", "FP32", (-1,))),
    (TensorSpec("scores", "FP32", (-1, 1)),),
)
HOUR = 3600 * 10**9


class Named:
    """A processor: the row b"name@0.9" is answered with the label b"name" and the confidence 0.9."""

    signature, version, labels = SIGNATURE, "1", (b"any",)
    input_dtypes = (np.dtype(np.float32),)

    def __init__(self, fusion_version=None):
        self.fusion_version = fusion_version
        self.prepared = []

    def split(self, inputs):
        (tensor,) = inputs
        return list(tensor.data)

    def canonical(self, question):
        return question

    def prepare(self, question):
        self.prepared.append(question)
        name, _, confidence = question.partition(b"@")
        return PreparedRow(((1,),), 8, (name, float(confidence)))

    def encode_batch(self, batch, buffers):
        for i, (_, confidence) in enumerate(batch):
            buffers[0][i] = confidence

    def decode_batch(self, outputs, batch):
        return [
            Answer(
                (name, np.float32(out[0])), float(round(float(out[0]), 3)), (np.array(out),), float(out[0])
            )
            for (name, _), out in zip(batch, outputs[0], strict=True)
        ]

    def tensors(self, question):
        return (Tensor("text", "BYTES", (1,), (question,)),)

    def read(self, reply, *, with_extras):
        return read_answer(self.signature, reply, "confidence", with_extras=with_extras)

    def fuse(self, edge, cloud):
        return Answer((b"fused " + edge.values[0] + b" " + cloud.values[0], np.float32(0.7)), 0.7)


class NamedCloud:
    """Answers b"name@0.9" with b"cloud name", unless `reason` says why not. `gate` holds its answers."""

    is_authenticated = True

    def __init__(self, *, version="1", p95_ns=0):
        self.version, self.p95_ns = version, p95_ns
        self.is_connected, self.is_breaker_open, self.reason = True, False, None
        self.asked, self.deadlines = [], []
        self.gate = asyncio.Event()
        self.gate.set()

    def link_state(self, model):
        return LinkState(self.is_connected, self.is_breaker_open, self.p95_ns)

    async def ask(self, model, request, *, deadline_ns):
        (text,) = request.inputs[0].data
        self.asked.append(text)
        self.deadlines.append(deadline_ns)
        if not self.gate.is_set():
            await self.gate.wait()
        if self.reason is not None:
            raise CloudUnavailable(self.reason, "as the test says")
        outputs = (
            Tensor("label", "BYTES", (1,), (b"cloud " + text.partition(b"@")[0],)),
            Tensor("confidence", "FP32", (1,), np.array([0.95], np.float32)),
            Tensor("scores", "FP32", (1, 1), np.array([[0.95]], np.float32)),
        )
        return InferReply(model, self.version, outputs)


class Disk:
    """A second cache level in memory."""

    def __init__(self, lookup_ns=0):
        self.lookup_ns, self.kept, self.asked, self.age_ns = lookup_ns, {}, 0, 0
        self.is_on, self.size_bytes, self.counters = True, 0, {}

    async def find(self, key):
        self.asked += 1
        await asyncio.sleep(0)
        return Found(self.kept[key], self.age_ns) if key in self.kept else None

    def keep(self, key, model, value, age_ns=0):
        self.kept[key] = value

    def retain_models(self, models):
        pass

    def status(self):
        return {}


def named(engine=None, *, threshold=0.8, digest="d" * 64, row_ns=0, fusion_version=None, **options):
    """A served model of the task above. An engine with a gate runs in a thread."""
    engine = engine or FakeEngine(max_batch=8)
    processor = Named(fusion_version)
    profile = ((1, row_ns),) if row_ns else ()
    info = ModelInfo("named", "1", "fake", SIGNATURE, 64, True, digest, threshold, latency_profile=profile)
    options.setdefault("is_inline", engine.gate is None)
    return ServedModel(info, processor, ModelRunner("named", processor, engine, **options))


def service_of(one, cloud=None, store=None, *, cache=True, ttl_ns=HOUR, stale_ns=HOUR, **options):
    limits = {"timeout_s": 10.0, "cloud_timeout_s": 10.0} | options
    return Service(
        {one.info.name: one},
        cache=Cache(1 << 20, ttl_ns, stale_ns) if cache else None,
        cloud=cloud,
        device_secret=b"s" * 32,
        store=store,
        **limits,
    )


def rows_of(*texts, **parameters):
    """A request of these texts."""
    return InferRequest((Tensor("text", "BYTES", (len(texts),), tuple(texts)),), parameters=parameters)


def labels(reply):
    """The labels of a reply."""
    return list(reply.outputs[0].data)


def run(scenario):
    """Run a scenario in a loop of its own, for 20 seconds at most."""

    async def limited():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


async def turns(count=10):
    """Let others have the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition):
    """Let others have the loop until the condition holds."""
    while not condition():
        await asyncio.sleep(0.001)
