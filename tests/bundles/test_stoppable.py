"""Work in a thread ends with its caller, however and however often the caller is cancelled."""

import asyncio
import threading

import pytest

from edge_runtime.bundles.stoppable import Stop, Stopped, run_stoppable


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


def test_results_and_errors_come_back():
    async def scenario():
        assert await run_stoppable(lambda stop: 3, "work") == 3
        with pytest.raises(ZeroDivisionError):
            await run_stoppable(lambda stop: 1 // 0, "work")

    run(scenario)


@pytest.mark.parametrize("cancels", [1, 2, 5])
def test_a_cancelled_caller_returns_when_the_work_has_ended_and_not_before(cancels):
    async def scenario():
        began, ended, gate = threading.Event(), [], threading.Event()

        def work(stop):
            with stop.calls(lambda: None):
                began.set()
                gate.wait(30)
                ended.append(True)

        task = asyncio.create_task(run_stoppable(work, "work"))
        while not began.is_set():
            await asyncio.sleep(0)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    run(scenario)


def test_a_stop_between_two_steps_is_seen_at_the_next():
    stop, called = Stop(), []
    stop.check()
    with stop.calls(lambda: called.append("first")):
        pass
    stop.set()
    assert called == []  # the first step had ended
    with pytest.raises(Stopped):
        stop.check()
    with pytest.raises(Stopped), stop.calls(lambda: called.append("second")):
        pytest.fail("a step began after the stop")
    with pytest.raises(Stopped):
        stop.check()


def test_a_stop_within_a_step_calls_what_ends_it():
    stop, called = Stop(), []
    with pytest.raises(Stopped), stop.calls(lambda: called.append(True)):
        stop.set()
    assert called == [True]
