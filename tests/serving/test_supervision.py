"""Which batch of an engine hangs, which one goes on, and what becomes of the engine; seen by a recording owner."""

import threading
import weakref

import pytest

from edge_runtime.core.scheduling.scheduler import Dispatch
from edge_runtime.serving.engine_thread import EngineThread
from edge_runtime.serving.supervision import Supervisor
from tests.serving.runner_fakes import Turnstile, run, until


class Owner:
    """Records what the supervisor reports."""

    def __init__(self):
        self.events = []

    def batch_finished(self, batch, result):
        self.events.append(("finished", batch.batch_id, result))

    def batch_failed(self, batch, error, how):
        self.events.append((how, batch.batch_id))

    def batch_left(self, batch, result=None):
        self.events.append(("left", batch.batch_id))

    def engine_down(self, engine):
        self.events.append(("down", engine))

    def engine_up(self, engine, *, is_new):
        self.events.append(("new" if is_new else "up", engine))

    def flush(self):
        pass


class Idle:
    """An engine that is only closed."""

    is_closed = False

    def close(self):
        assert not self.is_closed
        self.is_closed = True


def supervised(owner, engines=None, **how):
    how = {"is_inline": False, "hang_limit_s": 20.0, "load_engine": None, **how}
    return Supervisor("m", engines or [Idle()], owner, **how)


def batch(batch_id, engine=0):
    return Dispatch(batch_id, "L", (batch_id,), engine)


def test_a_batch_behind_a_hung_one_has_its_own_time():
    async def scenario():
        owner, gate = Owner(), Turnstile()
        supervisor = supervised(owner, hang_limit_s=0.3)
        for batch_id in (1, 2):
            supervisor.start(batch(batch_id), lambda engine, number=batch_id: gate.wait(20) and number)
        await until(lambda: owner.events)
        gate.let(2)  # the first was given up, and returns at once
        await until(lambda: ("finished", 2, 2) in owner.events)
        assert owner.events == [("hung", 1), ("down", 0), ("left", 1), ("up", 0), ("finished", 2, 2)]
        await supervisor.close()

    run(scenario)


def test_all_batches_of_an_engine_that_is_replaced_are_failed_and_reported_once():
    async def scenario():
        owner, gate, old, fresh = Owner(), Turnstile(), Idle(), Idle()
        supervisor = supervised(owner, [old], hang_limit_s=0.02, load_engine=lambda: fresh)
        for batch_id in (1, 2, 3):
            supervisor.start(batch(batch_id), lambda engine: gate.wait(20))
        await until(lambda: ("new", 0) in owner.events)
        assert sorted(event for event in owner.events if event[0] == "hung") == [
            ("hung", 1), ("hung", 2), ("hung", 3),
        ]  # fmt: skip
        assert [event for event in owner.events if event[0] == "left"] == [
            ("left", 1), ("left", 2), ("left", 3),
        ]  # fmt: skip
        assert owner.events[-1] == ("new", 0)
        told = len(owner.events)
        gate.let(3)
        await until(lambda: old.is_closed)
        supervisor.start(batch(4), lambda engine: engine)
        await until(lambda: len(owner.events) > told)
        assert owner.events[told:] == [("finished", 4, fresh)], "late returns change nothing"
        await supervisor.close()
        assert fresh.is_closed

    run(scenario)


def test_an_engine_that_hangs_twice_before_it_is_replaced_is_loaded_once():
    async def scenario():
        owner, gate, loading, loads = Owner(), Turnstile(), threading.Event(), []

        def load():
            loads.append(Idle())
            assert loading.wait(20)
            return loads[-1]

        supervisor = supervised(owner, hang_limit_s=0.02, load_engine=load)
        for batch_id in (1, 2):
            supervisor.start(batch(batch_id), lambda engine: gate.wait(20))
        await until(lambda: ("hung", 2) in owner.events)
        loading.set()
        await until(lambda: ("new", 0) in owner.events)
        assert len(loads) == 1
        gate.let(2)
        await supervisor.close()

    run(scenario)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_whatever_a_model_raises_in_its_thread_ends_its_own_batch(error):
    async def scenario():
        owner = Owner()
        supervisor = supervised(owner)

        def raises(engine):
            raise error

        supervisor.start(batch(1), raises)
        supervisor.start(batch(2), lambda engine: "answer")
        await until(lambda: len(owner.events) == 3)
        assert owner.events == [("raised", 1), ("left", 1), ("finished", 2, "answer")]
        await supervisor.close()

    run(scenario)


@pytest.mark.parametrize("inline", [True, False])
def test_a_call_runs_after_the_batches_before_it_and_never_on_an_engine_that_was_replaced(inline):
    async def scenario():
        owner, order, engine = Owner(), [], Idle()
        supervisor = supervised(owner, [engine], is_inline=inline)
        supervisor.start(batch(1), lambda engine: order.append("batch"))
        supervisor.call(0, engine, lambda: order.append("call"))
        supervisor.call(0, Idle(), lambda: order.append("of another engine"))
        supervisor.start(batch(2), lambda engine: order.append("batch"))
        await until(lambda: len(owner.events) == 2)
        assert order == ["batch", "call", "batch"]
        await supervisor.close()

    run(scenario)


def test_closing_closes_each_engine_once_after_what_it_runs():
    async def scenario():
        owner, gate, engines = Owner(), Turnstile(), [Idle(), Idle()]
        supervisor = supervised(owner, engines)
        supervisor.start(batch(1, engine=1), lambda engine: gate.wait(20) and not engine.is_closed)
        await supervisor.close()
        assert [engine.is_closed for engine in engines] == [True, False]
        gate.let(1)
        await until(lambda: engines[1].is_closed)
        await supervisor.close()
        await until(lambda: owner.events)
        assert owner.events == [("finished", 1, True)]

    run(scenario)


def test_an_idle_thread_keeps_nothing_of_the_last_work():
    class Work:
        def __call__(self):
            return self

    async def scenario():
        thread, work = EngineThread("t"), Work()
        gone = weakref.ref(work)
        thread.submit(work)
        del work
        await until(lambda: gone() is None)
        thread.stop()

    run(scenario)


def test_an_engine_that_returned_while_another_was_loaded_is_kept():
    async def scenario():
        owner, gate, loaded, old, other = Owner(), Turnstile(), threading.Event(), Idle(), Idle()
        supervisor = supervised(
            owner, [old], hang_limit_s=0.02, load_engine=lambda: loaded.wait(20) and other
        )
        supervisor.start(batch(1), lambda engine: gate.wait(20))
        await until(lambda: ("down", 0) in owner.events)
        gate.let(1)
        await until(lambda: ("up", 0) in owner.events)
        loaded.set()
        await until(lambda: other.is_closed)
        assert supervisor.engine(0) is old
        assert ("new", 0) not in owner.events
        await supervisor.close()
        assert old.is_closed

    run(scenario)
