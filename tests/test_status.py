"""What is wrong and since when, with the time as an argument; and the status of a real runtime."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from edge_runtime.config import CacheSettings, Config
from edge_runtime.runtime import Runtime
from edge_runtime.serving.registry import ModelState
from edge_runtime.status import Problems, problems_of, resident_mb

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
S = 10**9


def later(problems, found, seconds):
    problems.update(found, now_ns=seconds * S, now=NOON + timedelta(seconds=seconds))
    return problems.listed(seconds * S)


def test_a_problem_keeps_its_beginning_until_the_part_is_well():
    problems = Problems()
    assert later(problems, {}, 0) == []
    first = {"part": "cloud", "why": "refused", "since": "2026-11-25T12:00:10+00:00", "for_s": 0.0}
    assert later(problems, {"cloud": "refused"}, 10) == [first]
    assert later(problems, {"cloud": "refused"}, 70) == [first | {"for_s": 60.0}]
    assert later(problems, {"cloud": "timed out"}, 80) == [first | {"why": "timed out", "for_s": 70.0}]
    assert later(problems, {}, 90) == []
    assert later(problems, {"cloud": "refused"}, 100)[0]["since"] == "2026-11-25T12:01:40+00:00"


def test_the_longest_problem_comes_first_and_parts_are_apart():
    problems = Problems()
    later(problems, {"b": "1"}, 1)
    later(problems, {"a": "1", "b": "1"}, 2)
    assert [problem["part"] for problem in later(problems, {"a": "1", "b": "1", "c": "1"}, 3)] == [
        "b",
        "a",
        "c",
    ]
    assert [problem["part"] for problem in later(problems, {"a": "1", "c": "1"}, 4)] == ["a", "c"]


def service(draining=False, disk=None, models=None):
    cache = None if disk is None else SimpleNamespace(disk=disk)
    registry = SimpleNamespace(not_ready=lambda: models or {})
    return SimpleNamespace(is_draining=draining, cache=cache, registry=registry)


def cloud(**more):
    state = {"broker": "mqtt://x", "connected": True, "why_not": None, "breaker": "closed"} | more
    return SimpleNamespace(status=lambda: state)


@pytest.mark.parametrize(
    ("service", "cloud", "found"),
    [
        (service(), None, {}),
        (service(), cloud(), {}),
        (service(draining=True), None, {"daemon": "draining"}),
        (service(models={"m": "It is loading."}), None, {"model m": "It is loading."}),
        (service(), cloud(connected=False), {"cloud": "No connection to mqtt://x: it is being opened."}),
        (
            service(),
            cloud(connected=False, why_not="refused"),
            {"cloud": "No connection to mqtt://x: refused."},
        ),
        (service(), cloud(why_not="no worker answers"), {"cloud": "No worker answers."}),
        (service(), cloud(breaker="open"), {"cloud": "circuit breaker is open"}),
        (
            service(disk=SimpleNamespace(is_on=False, status=lambda: {"why_off": "disk full"})),
            None,
            {"cache on disk": "It is off: disk full."},
        ),
    ],
)
def test_what_is_wrong_is_said_by_part(service, cloud, found):
    seen = problems_of(service, cloud)
    assert seen.keys() == found.keys()
    for part, words in found.items():
        assert words in seen[part]


def test_a_runtime_says_what_is_wrong_and_since_when(tmp_path):
    """A folder where the file of answers should be turns the cache on disk off."""

    async def scenario():
        path = tmp_path / "answers.db"
        path.mkdir()
        async with Runtime.open(Config(cache=CacheSettings(path=str(path)))) as runtime:
            status = runtime.status()
            assert (status["state"], status["ready"], status["addresses"]) == ("ready", True, [])
            (problem,) = status["problems"]
            assert problem["part"] == "cache on disk"
            assert runtime.status()["problems"][0]["since"] == problem["since"]
            runtime.service.registry.set_state("commands", ModelState.FAILED, "its engine hung")
            status = runtime.status()
            assert (status["state"], status["ready"]) == ("not ready", False)
            assert status["problems"][1]["part"] == "model commands"
            assert status["problems"][1]["why"] == "It is failed: its engine hung."
            runtime.service.registry.set_state("commands", ModelState.READY)
            assert runtime.status()["state"] == "ready"
            runtime.service.drain(1.0)
            assert (runtime.status()["state"], runtime.status()["ready"]) == ("draining", False)

    asyncio.run(scenario())


def test_the_memory_is_that_of_this_process():
    assert 10 < resident_mb() < 10_000
