"""A caller's time limit is understood in both spellings, whichever way the request came."""

import asyncio
import threading

import numpy as np
import pytest

from edge_runtime.config import Config
from edge_runtime.core.errors import InvalidRequest, RefusalKind, Refused
from edge_runtime.core.messages import InferRequest, Tensor
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.runtime import Runtime
from edge_runtime.serving import start_model
from edge_runtime.settings import RequestSettings


def request(text, **parameters):
    return InferRequest((Tensor("text", "BYTES", (1,), (text,)),), parameters=parameters)


def run(scenario):
    async def limited():
        config = Config(requests=RequestSettings(timeout_s=3600))
        async with asyncio.timeout(10), Runtime.open(config) as runtime:
            await scenario(runtime)

    asyncio.run(limited())


@pytest.fixture
def engine(monkeypatch):
    """The engine of the model: it waits for its gate, in a thread, before it answers."""
    logits = np.zeros(150, np.float32)
    fake = FakeEngine(lambda _: (logits,), max_batch=8, gate=threading.Event())
    real = start_model.ModelRunner

    def held(name, processor, engines, *rest, **options):
        engines[0].close()
        return real(name, processor, [fake], *rest, **options | {"is_inline": False})

    monkeypatch.setattr(start_model, "ModelRunner", held)
    yield fake
    fake.gate.set()


@pytest.mark.parametrize("limit", [{"timeout": 20_000}, {"deadline_ms": 20}])
def test_a_program_that_waits_a_little_is_refused_while_the_engine_is_busy(engine, limit):
    async def scenario(runtime):
        patient = asyncio.create_task(runtime.infer("commands", request(b"a")))
        await asyncio.to_thread(engine.entered.wait)
        with pytest.raises(Refused) as refused:
            await runtime.infer("commands", request(b"b", **limit))
        assert refused.value.kind is RefusalKind.LATE
        assert not patient.done()
        engine.gate.set()
        assert (await patient).outputs

    run(scenario)


def test_a_time_limit_that_has_passed_is_refused_before_the_request_is_read():
    async def scenario(runtime):
        with pytest.raises(Refused) as refused:
            await runtime.infer("commands", InferRequest((), parameters={"deadline_ms": 0}))
        assert refused.value.kind is RefusalKind.LATE
        with pytest.raises(InvalidRequest, match="Parameter deadline_ms"):
            await runtime.infer("commands", request(b"a", deadline_ms="soon"))
        assert (await runtime.infer("commands", request(b"a", timeout=0))).outputs

    run(scenario)
