"""What is counted: requests and rows apart, and every request once, where it leaves, with how it ended."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from edge_runtime.config import Config, ServerSettings
from edge_runtime.core.errors import EngineFailed, InvalidRequest, RefusalKind, Refused, UnknownModel
from edge_runtime.core.messages import InferRequest
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.metrics import render
from edge_runtime.runtime import Runtime
from edge_runtime.status import status_of
from tests.serving.fakes import NamedCloud, named, rows_of, run, service_of, turns, until


def test_a_request_of_many_rows_is_one_request_and_its_time_is_its_own():
    async def scenario():
        service = service_of(named(FakeEngine(max_batch=64)))
        started_ns = time.monotonic_ns()
        for start in range(0, 500, 100):
            texts = [b"row%d@0.9" % i for i in range(start, start + 100)]
            await service.infer("named", None, rows_of(*texts))
        took_ns = time.monotonic_ns() - started_ns
        totals = service.requests("named")
        assert (totals.success.count, totals.rows, totals.failures.count) == (5, 500, 0)
        assert totals.success.ns <= took_ns
        assert (totals.success.count, sum(totals.success.counts)) == (5, 5)
        assert totals.endings == {"served": 5}
        assert service.counters.outcomes == {("named", "local", "confident"): 500}
        assert totals.last_served_ms > 0

    run(scenario)


def test_the_short_way_of_asking_counts_like_the_long_one():
    async def scenario():
        service = service_of(named())
        await service.ask("a@0.9", model="named")
        await service.ask("a@0.9", model="named")
        totals = service.requests("named")
        assert (totals.success.count, totals.rows, totals.endings) == (2, 2, {"served": 2})

    run(scenario)


def test_a_text_that_cannot_be_encoded_is_an_invalid_request_and_no_defect():
    async def scenario():
        async with Runtime.open(Config(server=ServerSettings(tcp="off"))) as runtime:
            with pytest.raises(InvalidRequest, match="not UTF-8"):
                await runtime.ask("\ud800")
            assert runtime.service.requests("commands").endings == {"invalid": 1}

    run(scenario)


async def full(service, one, gate):
    return await service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(9)]))


async def late(service, one, gate):
    return await service.infer("named", None, rows_of(b"a@0.9"), deadline_ns=1)


async def passed(service, one, gate):
    return await service.infer("named", None, rows_of(b"a@0.9", deadline_ms=0))


async def invalid(service, one, gate):
    return await service.infer("named", None, rows_of(b"a@0.9", private="yes"))


async def draining(service, one, gate):
    gate.set()
    await one.runner.drain()
    return await service.infer("named", None, rows_of(b"a@0.9"))


async def cancelled(service, one, gate):
    task = asyncio.create_task(service.infer("named", None, rows_of(b"a@0.9")))
    await turns()
    task.cancel()
    return await task


@pytest.mark.parametrize(
    ("how", "error", "ending"),
    [
        (full, Refused, "refused_full"),
        (late, Refused, "refused_late"),
        (passed, Refused, "refused_late"),
        (invalid, InvalidRequest, "invalid"),
        (draining, Refused, "refused_draining"),
        (cancelled, asyncio.CancelledError, "cancelled"),
    ],
)
def test_every_ending_is_counted_once_where_it_leaves(how, error, ending):
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 3))
        service = service_of(one)
        with pytest.raises(error):
            await how(service, one, gate)
        totals = service.requests("named")
        assert totals.endings == {ending: 1}
        assert (totals.success.count, totals.failures.count, totals.rows) == (0, 1, 0)
        assert sum(totals.success.counts) == 0, "latency is that of requests that were served"
        assert service.counters.outcomes == {}
        gate.set()
        await one.runner.close()

    run(scenario)


def test_a_failing_model_is_counted_once_for_a_request_whatever_its_rows():
    async def scenario():
        service = service_of(named(FakeEngine(max_batch=1, fail_on=(1, 2, 3, 4))))
        with pytest.raises(EngineFailed):
            await service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(4)]))
        assert service.requests("named").endings == {"failed": 1}
        assert service.requests("named").failures.count == 1

    run(scenario)


def test_a_name_that_callers_make_up_is_no_label():
    async def scenario():
        service = service_of(named())
        for name in ("made up", "another"):
            with pytest.raises(UnknownModel):
                await service.infer(name, None, rows_of(b"a@0.9"))
        with pytest.raises(UnknownModel):
            await service.infer("named", "99", rows_of(b"a@0.9"))
        assert service.counters.unknown_model == 3
        assert service.counters.requests == {}

    run(scenario)


def test_totals_belong_to_the_name_and_outlive_the_version():
    async def scenario():
        one = named()
        service = service_of(one)
        await service.infer("named", None, rows_of(b"a@0.9"))
        newer = named(digest="e" * 64)
        newer = replace(newer, info=replace(newer.info, version="2"))
        service.replace_model(newer)
        await service.infer("named", None, rows_of(b"a@0.9"))
        assert (service.requests("named").success.count, service.requests("named").rows) == (2, 2)

    run(scenario)


def test_metrics_and_status_tell_requests_from_rows():
    async def scenario():
        service = service_of(named(), NamedCloud())
        await service.infer("named", None, rows_of(b"a@0.9", b"b@0.1", b"c@0.9"))
        with pytest.raises(InvalidRequest):
            await service.infer("named", None, rows_of(b"a@0.9", cache="no"))
        text = render(service, None).decode()
        for line in (
            'edge_requests_total{ending="served",model="named"} 1.0',
            'edge_requests_total{ending="invalid",model="named"} 1.0',
            'edge_requests_seconds_bucket{le="+Inf",model="named"} 1.0',
            'edge_requests_seconds_bucket{le="10.0",model="named"} 1.0',
            'edge_requests_seconds_count{model="named"} 1.0',
            'edge_rows_total{model="named",origin="local",reason="confident"} 2.0',
            'edge_rows_total{model="named",origin="cloud",reason="unsure"} 1.0',
        ):
            assert line in text
        (model,) = status_of(service, None, uptime_ns=1)["models"]
        assert (model["requests"], model["rows"]) == (1, 3)
        assert model["endings"] == {"invalid": 1, "served": 1}

    run(scenario)


def test_a_refusal_of_one_row_is_the_ending_of_its_request_once():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 2))
        service = service_of(one)
        busy = asyncio.create_task(service.infer("named", None, rows_of(b"busy@0.9")))
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        with pytest.raises(Refused) as refused:
            await service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(6)]))
        assert refused.value.kind is RefusalKind.FULL
        gate.set()
        await busy
        assert service.requests("named").endings == {"refused_full": 1, "served": 1}
        assert one.runner.statistics.refused["full"] >= 1, "rows that the scheduler refused are counted there"
        await one.runner.close()

    run(scenario)


def test_a_defect_of_ours_counts_as_failed_and_is_no_callers_fault():
    async def scenario():
        service = service_of(named())
        with pytest.raises(ValueError, match="not enough values"):
            await service.infer("named", None, InferRequest(()))  # this task does not check its inputs
        assert service.requests("named").endings == {"failed": 1}

    run(scenario)
