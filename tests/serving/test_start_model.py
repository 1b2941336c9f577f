"""Both tiers start a model in one order, and close what they opened where a step fails."""

import asyncio
import dataclasses
from contextlib import AsyncExitStack

import pytest

from edge_runtime.bundles.folder import find_bundle, load_bundle
from edge_runtime.bundles.trust import VersionFloors
from edge_runtime.core.errors import BundleError, ConfigError
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.serving import start_model as module
from edge_runtime.serving.model_runner import INLINE_LIMIT_NS
from edge_runtime.serving.start_model import RunnerSettings, read_admission, start_model, start_models

SETTINGS = RunnerSettings(threads=1, limits=QueueLimits(8), policy=Policy())


def admission(record="auto"):
    return read_admission(
        "edge-runtime", keys=(), unsigned=False, record=str(record), memory_mb=None, retry_command="x"
    )


def start(names, settings=SETTINGS, record="auto"):
    """The runners of `names`, closed again."""

    async def scenario():
        async with AsyncExitStack() as stack:
            started = await start_models(names, settings, admission(record), stack)
            return {name: one.runner for name, one in started.items()}

    return asyncio.run(scenario())


@pytest.fixture
def fake(monkeypatch):
    """Every engine that is loaded is one of these, so that a test sees whether it is closed."""
    engines = []
    load = module.load_model_soon

    def make():
        engines.append(FakeEngine(max_batch=8))
        return engines[-1]

    async def load_fake(*arguments, **options):
        model = await load(*arguments, **options)
        model.engine.close()
        return dataclasses.replace(model, engine=make())

    monkeypatch.setattr(module, "load_model_soon", load_fake)
    monkeypatch.setattr(module, "load_engine", lambda *_, **__: make())
    return engines


def newer_version_ran(path):
    """A record in which a later version of the bundle `commands` has run."""
    bundle = load_bundle(find_bundle("commands"), admission().trust)
    version = str(int(bundle.manifest.version) + 1)
    VersionFloors(path).admit("commands", "onnx", version, "00" * 32, bundle.signed_by)


def test_a_model_is_started_with_the_engines_asked_for(fake):
    runners = start(("commands",), dataclasses.replace(SETTINGS, instances=3, depth=2))
    assert list(runners) == ["commands"]
    assert len(fake) == 3
    assert all(engine.is_closed for engine in fake)


def test_a_quick_model_runs_on_the_event_loop_only_where_that_is_wanted():
    assert start(("commands",), dataclasses.replace(SETTINGS, inline_limit_ns=INLINE_LIMIT_NS))[
        "commands"
    ].is_inline
    assert not start(("commands",))["commands"].is_inline


def test_a_version_older_than_one_that_ran_is_refused_and_its_engine_closed(fake, tmp_path):
    record = tmp_path / "versions.json"
    newer_version_ran(record)
    with pytest.raises(BundleError, match="has run here"):
        asyncio.run(start_model("commands", SETTINGS, admission(record)))
    assert [engine.is_closed for engine in fake] == [True]


def test_an_engine_that_cannot_be_loaded_closes_those_before_it(fake, monkeypatch):
    made = []

    def third_fails(*_, **__):
        if len(made) == 1:
            raise BundleError("gone")
        made.append(FakeEngine())
        return made[-1]

    monkeypatch.setattr(module, "load_engine", third_fails)
    with pytest.raises(BundleError, match="gone"):
        asyncio.run(start_model("commands", dataclasses.replace(SETTINGS, instances=3), admission()))
    assert [engine.is_closed for engine in (*fake, *made)] == [True, True]


def test_a_version_that_cannot_be_loaded_is_not_remembered(tmp_path, monkeypatch):
    """Else there would be no way back to the version before it."""
    record = tmp_path / "versions.json"

    async def fails(*_, **__):
        raise BundleError("broken")

    monkeypatch.setattr(module, "load_model_soon", fails)
    with pytest.raises(BundleError, match="broken"):
        asyncio.run(start_model("commands", SETTINGS, admission(record)))
    assert not record.exists()


def test_a_version_that_ran_is_remembered(tmp_path):
    record = tmp_path / "versions.json"
    start(("commands",), record=record)
    assert b"commands" in record.read_bytes()


def test_a_model_listed_twice_is_refused_and_both_are_closed(fake):
    with pytest.raises(ConfigError, match="commands is listed twice; remove one of them"):
        start(("commands", "commands"))
    assert [engine.is_closed for engine in fake] == [True, True]
