"""Shutting down and replacing models: every request that was taken is answered."""

import asyncio
import threading
from dataclasses import replace

import pytest

from edge_runtime.core.escalation.decision import CloudUnavailable, Peer
from edge_runtime.core.messages import Reason
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.serving.bounded_cloud import BoundedCloud
from edge_runtime.serving.registry import ModelState
from tests.serving.fakes import NamedCloud, labels, named, rows_of, run, service_of, turns, until


def test_a_service_that_drains_is_not_ready_and_answers_all_the_same():
    async def scenario():
        service = service_of(named(), NamedCloud())
        assert service.is_ready
        service.drain(10)
        assert not service.is_ready
        assert labels(await service.infer("named", None, rows_of(b"a@0.9", b"b@0.1"))) == [b"a", b"cloud b"]

    run(scenario)


def test_at_the_end_of_a_drain_rows_that_wait_for_the_cloud_get_the_edges_answer():
    async def scenario():
        cloud = NamedCloud()
        cloud.gate.clear()
        service = service_of(named(), cloud)
        askers = [
            asyncio.create_task(service.infer("named", None, rows_of(b"sure@0.9", text)))
            for text in (b"a@0.1", b"a@0.1", b"b@0.1")
        ]
        await turns()
        assert len(cloud.asked) == 2
        service.drain(0.01)
        for asker in askers:
            reply = await asker
            assert labels(reply)[0] == b"sure"
            assert reply.parameters["reason"].endswith(",cloud_late")
            assert reply.parameters["degraded"] is True
        after = await service.infer("named", None, rows_of(b"c@0.1"))
        assert (labels(after), after.parameters["reason"]) == ([b"c"], "cloud_late")
        assert len(service._flights) == 0

    run(scenario)


def test_the_cloud_is_waited_for_until_the_drain_ends_and_not_less():
    async def scenario():
        cloud = NamedCloud()
        cloud.gate.clear()
        service = service_of(named(), cloud)
        asker = asyncio.create_task(service.infer("named", None, rows_of(b"a@0.1")))
        await turns()
        service.drain(15)
        await turns()
        assert not asker.done()
        cloud.gate.set()
        assert labels(await asker) == [b"cloud a"]

    run(scenario)


def test_a_cancelled_caller_of_the_cloud_is_cancelled_and_leaves_no_wait_behind():
    async def scenario():
        cloud = NamedCloud()
        cloud.gate.clear()
        bounded = BoundedCloud(cloud)
        task = asyncio.create_task(bounded.ask("named", rows_of(b"a@0.1"), deadline_ns=1))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bounded._waits == set()
        bounded.end_by(0.0)
        with pytest.raises(CloudUnavailable, match="shuts down") as late:
            await bounded.ask("named", rows_of(b"a@0.1"), deadline_ns=1)
        assert late.value.reason is Reason.CLOUD_LATE
        assert late.value.peer is Peer.UNKNOWN, "the cloud is not to blame"
        assert bounded._waits == set()

    run(scenario)


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.DRAINING, ModelState.FAILED])
def test_a_service_is_ready_only_if_each_of_its_models_is(state):
    async def scenario():
        service = service_of(named())
        service.registry.set_state("another", state, "as the test says")
        assert not service.is_ready
        service.registry.set_state("another", ModelState.READY)
        assert service.is_ready

    run(scenario)


# Replacing a model


def version(number, engine=None):
    one = named(engine, digest=str(number) * 64)
    return replace(one, info=replace(one.info, version=str(number)))


def test_a_model_is_replaced_under_load_without_a_failed_request():
    async def scenario():
        gate = threading.Event()
        old = version(1, FakeEngine(max_batch=2, gate=gate))
        cloud = NamedCloud()
        cloud.gate.clear()
        service = service_of(old, cloud)
        before = [
            asyncio.create_task(service.infer("named", None, rows_of(b"a%d@0.9" % i, b"u@0.1")))
            for i in range(6)
        ]
        await until(lambda: len(old.processor.prepared) >= 7)
        new = version(2)
        assert service.replace_model(new) is old
        retiring = asyncio.create_task(service.retire_model(old))
        after = [asyncio.create_task(service.infer("named", None, rows_of(b"b%d@0.9" % i))) for i in range(6)]
        assert [(await task).model_version for task in after] == ["2"] * 6
        await turns()
        assert not retiring.done()
        gate.set()
        await turns()
        before[0].cancel()  # its flight of the unsure row goes to a follower, which needs the old runner
        cloud.gate.set()
        results = await asyncio.gather(*before, return_exceptions=True)
        assert [(reply.model_version, labels(reply)[1]) for reply in results[1:]] == [("1", b"cloud u")] * 5
        await retiring
        assert old.runner._is_closed
        reply = await service.infer("named", None, rows_of(b"a1@0.9", b"u@0.1"))
        assert (reply.model_version, reply.parameters["origin"]) == ("2", "local,cloud"), (
            "none of the old answers"
        )
        await new.runner.close()

    run(scenario)


def test_a_replacement_that_is_given_up_leaves_the_old_runner_open():
    async def scenario():
        gate = threading.Event()
        old = version(1, FakeEngine(gate=gate))
        service = service_of(old)
        asker = asyncio.create_task(service.infer("named", None, rows_of(b"a@0.9")))
        await turns()
        service.replace_model(version(2))
        retiring = asyncio.create_task(service.retire_model(old))
        await turns()
        retiring.cancel()
        await turns()
        gate.set()
        assert labels(await asker) == [b"a"]
        assert not old.runner._is_closed
        await service.retire_model(old)
        assert old.runner._is_closed

    run(scenario)


def test_a_model_that_nobody_uses_is_retired_at_once():
    async def scenario():
        old = version(1)
        service = service_of(old)
        await service.infer("named", None, rows_of(b"a@0.9"))
        service.replace_model(version(2))
        await service.retire_model(old)
        assert old.runner._is_closed

    run(scenario)
