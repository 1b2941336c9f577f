"""However a request ends, its memory comes back without a garbage collection: the daemon collects rarely."""

import asyncio
import gc
import threading

import pytest

from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.messages import Reason
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.fake import FakeEngine
from tests.serving.fakes import NamedCloud, named, rows_of, run, service_of, turns

ROUNDS = 20


async def quietly(awaitable):
    """Await it and drop whatever it comes to."""
    try:
        await awaitable
    except (EdgeRuntimeError, asyncio.CancelledError):
        return


def texts(i, many):
    return [b"row%d.%d@0.9" % (i, row) for row in range(4 if many else 1)]


async def served(i, many):
    await quietly(SERVICE["plain"].infer("named", None, rows_of(*texts(i, many))))


async def hit(i, many):
    await quietly(SERVICE["plain"].infer("named", None, rows_of(*texts(0, many))))


async def escalated(i, many):
    await quietly(SERVICE["cloud"].infer("named", None, rows_of(b"u%d@0.1" % i, *texts(i, many)[1:])))


async def late(i, many):
    await quietly(SERVICE["plain"].infer("named", None, rows_of(*texts(i, many)), deadline_ns=1))


async def full(i, many):
    await quietly(SERVICE["full"].infer("named", None, rows_of(*texts(i, many), b"x%d@0.9" % i)))


async def invalid(i, many):
    await quietly(SERVICE["plain"].infer("named", None, rows_of(*texts(i, many), cache="no")))


async def failed(i, many):
    await quietly(SERVICE["failing"].infer("named", None, rows_of(*texts(i, many))))


async def cancelled(i, many):
    task = asyncio.ensure_future(
        SERVICE["held"].infer("named", None, rows_of(b"u%d@0.1" % i, *texts(i, many)[1:]))
    )
    await turns()
    task.cancel()
    await quietly(task)


async def degraded(i, many):
    await quietly(SERVICE["absent"].infer("named", None, rows_of(b"u%d@0.1" % i, *texts(i, many)[1:])))


async def spilled_in_vain(i, many):
    request = rows_of(*texts(i, many))
    await quietly(SERVICE["absent"].infer("named", None, request, deadline_ns=1))


SERVICE = {}


@pytest.mark.parametrize("many", [False, True], ids=["one row", "many rows"])
@pytest.mark.parametrize(
    "ask",
    [served, hit, escalated, late, full, invalid, failed, cancelled, degraded, spilled_in_vain],
    ids=lambda ask: ask.__name__,
)
def test_a_request_leaves_no_cycle_behind(ask, many):
    async def scenario():
        absent, held = NamedCloud(), NamedCloud()
        absent.reason = Reason.CLOUD_ABSENT
        held.gate.clear()
        gate = threading.Event()
        failing = FakeEngine(max_batch=1, fail_on=range(1, 1000))
        SERVICE.update(
            plain=service_of(named()),
            cloud=service_of(named(), NamedCloud()),
            held=service_of(named(), held),
            absent=service_of(named(), absent),
            failing=service_of(named(failing)),
            full=service_of(named(FakeEngine(gate=gate), limits=QueueLimits(1, 1))),
        )
        if ask is full:
            for text in (b"runs@0.9", b"waits@0.9"):
                BUSY.append(asyncio.ensure_future(SERVICE["full"].infer("named", None, rows_of(text))))
                await turns(5)
        for i in range(3):  # what is made once
            await ask(i, many)
        await turns()
        gc.collect()
        gc.disable()
        try:
            for i in range(3, 3 + ROUNDS):
                await ask(i, many)
            await turns()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            kinds = sorted({type(thing).__name__ for thing in gc.garbage})
            found = len(gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        gate.set()
        await asyncio.gather(*BUSY)
        BUSY.clear()
        await SERVICE["full"].registry.find("named", None).runner.close()
        assert found < ROUNDS, kinds

    run(scenario)


BUSY = []
