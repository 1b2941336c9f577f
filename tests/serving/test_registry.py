"""The models of a process, by name, version and state."""

import asyncio
from dataclasses import replace

import pytest

from edge_runtime.core.errors import UnknownModel
from edge_runtime.serving.registry import ModelState, Registry
from tests.serving.fakes import named, run


def test_a_model_is_found_by_its_name_and_by_the_version_it_has():
    async def scenario():
        one = named()
        registry = Registry({"named": one})
        assert registry.find("named", None) is one
        assert registry.find("named", "1") is one
        assert [*registry] == [one]
        assert registry.entry("named").state is ModelState.READY
        for name, version, words in (("named", "2", "version 1 only"), ("other", None, "loaded are: named")):
            with pytest.raises(UnknownModel, match=words):
                registry.find(name, version)

    run(scenario)


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.FAILED])
def test_a_name_without_a_runner_says_what_state_it_is_in(state):
    async def scenario():
        registry = Registry({})
        registry.set_state("named", state, "why")
        assert (registry.entry("named").state, registry.entry("named").why, [*registry]) == (state, "why", [])
        with pytest.raises(UnknownModel, match=f"it is {state.value}"):
            registry.find("named", None)
        with pytest.raises(UnknownModel):
            registry.replace(named())

    run(scenario)


def test_a_model_keeps_its_runner_whatever_its_state():
    async def scenario():
        one = named()
        registry = Registry({"named": one})
        registry.set_state("named", ModelState.DRAINING)
        assert registry.entry("named").state is ModelState.DRAINING
        assert registry.find("named", None) is one

    run(scenario)


def test_a_replaced_model_is_not_current_any_more_unless_its_bytes_are_the_same():
    async def scenario():
        one = named()
        registry = Registry({"named": one})
        same = replace(one, info=replace(one.info, accept_threshold=0.1))
        assert registry.replace(same) is one
        assert registry.is_current(one)
        newer = named(digest="e" * 64)
        assert registry.replace(newer) is same
        assert registry.is_current(newer)
        assert not registry.is_current(one)
        await asyncio.gather(one.runner.close(), newer.runner.close())

    run(scenario)
