"""Loading a model leaves the event loop to others, and ends with its caller."""

import asyncio
import threading

import pytest

from edge_runtime.bundles.folder import Trust
from edge_runtime.bundles.stoppable import Stop
from edge_runtime.loading import model as model_module
from edge_runtime.loading.model import load_model_soon
from edge_runtime.loading.quarantine import Quarantine
from tests.loading.test_model import DOUBLE, tensor_bundle

TRUST = Trust((), allow_unsigned=True)


@pytest.fixture
def load(tmp_path):
    folder = tensor_bundle(tmp_path / "tiny", DOUBLE)
    quarantine = Quarantine(None)
    return lambda: load_model_soon(folder, threads=1, trust=TRUST, max_batch=8, quarantine=quarantine)


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


def held(monkeypatch, name):
    """Make a step of the loading wait until the returned event is set; the other event says that it began."""
    began, gate, real = threading.Event(), threading.Event(), getattr(model_module, name)

    def step(*args, **options):
        began.set()
        assert gate.wait(30), "the event loop stood still"
        return real(*args, **options)

    monkeypatch.setattr(model_module, name, step)
    return began, gate


@pytest.mark.parametrize("step", ["load_bundle", "prepare", "measure_latency_profile"])
def test_the_event_loop_runs_during_each_step(load, monkeypatch, step):
    began, gate = held(monkeypatch, step)

    async def scenario():
        loading = asyncio.create_task(load())
        while not began.is_set():
            await asyncio.sleep(0)
        gate.set()
        (await loading).engine.close()

    run(scenario)


def test_a_model_that_is_built_when_its_caller_goes_is_closed(load, monkeypatch):
    closed, real_prepare = [], model_module.prepare
    stopped, real_set = threading.Event(), Stop.set

    def set_and_tell(stop):
        real_set(stop)
        stopped.set()

    def prepare(*args, **options):
        prepared = real_prepare(*args, **options)
        close = prepared.engine.close
        monkeypatch.setattr(prepared.engine, "close", lambda: (closed.append(True), close()), raising=False)
        began.set()
        assert stopped.wait(30)
        return prepared

    began = threading.Event()
    monkeypatch.setattr(Stop, "set", set_and_tell)
    monkeypatch.setattr(model_module, "prepare", prepare)

    async def scenario():
        loading = asyncio.create_task(load())
        while not began.is_set():
            await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert closed == [True]

    run(scenario)
