"""The asyncio driver with a fake engine: the ugly cases first."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest

from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.messages import Answer
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.serving import model_runner, supervision
from edge_runtime.serving.in_flight import Served
from edge_runtime.serving.model_runner import ModelRunner
from tests.serving.runner_fakes import Echo, Engine, Watched, entered, run, until


@pytest.mark.parametrize("inline", [True, False])
def test_callers_of_one_tick_share_a_batch_and_get_their_own_answers(inline):
    async def scenario():
        engine = Engine()
        lane = ModelRunner("m", Echo(), engine, is_inline=inline)
        answers = await asyncio.gather(*(lane.run(str(i).encode()) for i in range(8)))
        assert [answer.values[0] for answer in answers] == [str(2 * i).encode() for i in range(8)]
        assert engine.batches == [list(range(8))]
        await lane.close()
        assert engine.closed

    run(scenario)


def test_one_cancelled_caller_leaves_waiting_and_running_neighbours_alone():
    async def scenario():
        gate = threading.Event()
        engine = Engine(gate=gate)
        lane = ModelRunner("m", Echo(), engine, is_inline=False)
        first = [asyncio.create_task(lane.run(str(i).encode())) for i in range(3)]
        await entered(engine)
        second = [asyncio.create_task(lane.run(str(i).encode())) for i in range(10, 13)]
        await asyncio.sleep(0)
        first[1].cancel()
        second[1].cancel()
        await asyncio.sleep(0)
        gate.set()
        done = await asyncio.gather(*first, *second, return_exceptions=True)
        assert [d.values[0] if isinstance(d, Answer) else type(d) for d in done] == [
            b"0", asyncio.CancelledError, b"4", b"20", asyncio.CancelledError, b"24",
        ]  # fmt: skip
        assert engine.batches == [[0, 1, 2], [10, 12]]
        await lane.close()

    run(scenario)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("fault", [{"poison": 1}, {"loses": True}])
def test_a_failing_batch_fails_alone(inline, fault):
    async def scenario():
        engine = Engine(max_batch=2, **fault)
        lane = ModelRunner("m", Echo(), engine, is_inline=inline)
        done = await asyncio.gather(*(lane.run(str(i).encode()) for i in range(4)), return_exceptions=True)
        assert all(isinstance(d, EngineFailed) for d in done[:2])
        assert all(isinstance(d, Answer) != bool(fault.get("loses")) for d in done[2:])
        engine.poison, engine.loses = None, False
        assert (await lane.run(b"5")).values == (b"10",)
        assert lane.statistics.failures.count == (4 if fault.get("loses") else 2)
        await lane.close()

    run(scenario)


def test_a_hung_engine_fails_its_batch_and_the_queue_meets_its_deadlines():
    async def scenario():
        gate = threading.Event()
        engine = Engine(gate=gate)
        lane = ModelRunner("m", Echo(), engine, is_inline=False, hang_limit_s=0.02)
        with pytest.raises(EngineFailed):
            await lane.run(b"1")
        now_ns = time.monotonic_ns()
        with pytest.raises(Refused) as refused:
            await lane.run(b"2", deadline_ns=now_ns + 10_000_000)
        assert refused.value.kind is RefusalKind.LATE
        gate.set()
        assert (await lane.run(b"3")).values == (b"6",)
        await lane.close()

    run(scenario)


def test_a_hung_engine_is_replaced_and_its_late_return_changes_nothing():
    async def scenario():
        gate = threading.Event()
        hung, fresh = Engine(gate=gate), Engine()
        lane = ModelRunner("m", Echo(), hung, hang_limit_s=0.02, load_engine=lambda: fresh)
        with pytest.raises(EngineFailed):
            await lane.run(b"1")
        assert (await lane.run(b"2")).values == (b"4",)
        assert (hung.batches, fresh.batches) == ([[1]], [[2]])
        assert (lane.statistics.faults, lane.statistics.replaced) == ({"hung": 1}, 1)
        gate.set()
        assert (await lane.run(b"3")).values == (b"6",)
        while not hung.closed:  # by its own thread, once its call has returned
            await asyncio.sleep(0.001)
        await lane.close()
        assert fresh.closed

    run(scenario)


def test_an_engine_that_cannot_be_replaced_serves_again_when_it_returns():
    async def scenario():
        gate = threading.Event()
        engine = Engine(gate=gate)

        def renew():
            raise OSError("the bundle is gone")

        lane = ModelRunner("m", Echo(), engine, hang_limit_s=0.02, load_engine=renew)
        with pytest.raises(EngineFailed):
            await lane.run(b"1")
        waiting = asyncio.create_task(lane.run(b"2"))
        await asyncio.sleep(0)
        gate.set()
        assert (await waiting).values == (b"4",)
        assert lane.statistics.replaced == 0
        await lane.close()

    run(scenario)


def test_an_engine_that_comes_back_while_another_is_loaded_is_kept_with_what_it_runs():
    async def scenario():
        gate, loading, loaded = threading.Event(), threading.Event(), threading.Event()
        engine, other = Engine(gate=gate), Engine()

        def renew():
            loading.set()
            assert loaded.wait(20)
            return other

        lane = ModelRunner("m", Echo(), engine, hang_limit_s=0.05, load_engine=renew)
        with pytest.raises(EngineFailed):
            await lane.run(b"1")
        lane._supervisor.hang_limit_s = 20.0
        await asyncio.to_thread(loading.wait, 20)
        gate.set()
        assert (await lane.run(b"2")).values == (b"4",)
        gate.clear()
        engine.entered.clear()
        innocent = asyncio.create_task(lane.run(b"3"))
        await entered(engine)
        loaded.set()
        while not other.closed:
            await asyncio.sleep(0.001)
        gate.set()
        assert (await innocent).values == (b"6",)
        assert lane.statistics.replaced == 0
        await lane.close()

    run(scenario)


def test_a_restart_that_fails_is_tried_again(monkeypatch):
    async def scenario():
        gate = threading.Event()
        hung, fresh, tries = Engine(gate=gate), Engine(), []

        def renew():
            tries.append(1)
            if len(tries) < 3:
                raise OSError("not now")
            return fresh

        monkeypatch.setattr(supervision, "_RESTART_S", 0.001)
        lane = ModelRunner("m", Echo(), hung, hang_limit_s=0.02, load_engine=renew)
        with pytest.raises(EngineFailed):
            await lane.run(b"1")
        assert (await lane.run(b"2")).values == (b"4",)
        assert len(tries) == 3
        gate.set()
        await lane.close()

    run(scenario)


def test_two_engines_run_two_batches_and_one_may_fail_alone():
    async def scenario():
        gate = threading.Event()
        engines = [Engine(max_batch=1, gate=gate, poison=0), Engine(max_batch=1, gate=gate)]
        lane = ModelRunner("m", Echo(), engines)
        tasks = [asyncio.create_task(lane.run(str(i).encode())) for i in range(2)]
        for engine in engines:
            await entered(engine)
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], EngineFailed)
        assert done[1].values == (b"2",)
        assert lane.statistics.faults == {"raised": 1}
        await lane.close()

    run(scenario)


def test_a_storm_of_disconnects_leaves_everybody_else_their_own_answers():
    async def scenario():
        gate = threading.Event()
        engine = Engine(max_batch=4, gate=gate)
        lane = ModelRunner("m", Echo(), engine, QueueLimits(max_waiting=400))
        tasks = [asyncio.create_task(lane.run(str(i).encode(), tenant="ab"[i % 2])) for i in range(200)]
        await entered(engine)
        for i, task in enumerate(tasks):
            if i % 3:
                task.cancel()
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for i, answer in enumerate(done):
            if i % 3:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer.values == (str(2 * i).encode(),)
        assert lane.waiting == 0
        await lane.close()

    run(scenario)


def test_a_full_queue_refuses_and_a_drain_serves_what_was_admitted():
    async def scenario():
        gate = threading.Event()
        engine = Engine(gate=gate)
        lane = ModelRunner("m", Echo(), engine, QueueLimits(max_waiting=1), is_inline=False)
        running = asyncio.create_task(lane.run(b"1"))
        await entered(engine)
        waiting = asyncio.create_task(lane.run(b"2"))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as full:
            await lane.run(b"3")
        assert full.value.kind is RefusalKind.FULL
        assert full.value.retry_after_s
        draining = asyncio.create_task(lane.drain())
        await asyncio.sleep(0)
        with pytest.raises(Refused) as late:
            await lane.run(b"4")
        assert late.value.kind is RefusalKind.DRAINING
        for _ in range(20):
            await asyncio.sleep(0)
        assert not draining.done(), "two rows are not answered"
        gate.set()
        await draining
        assert [(await task).values[0] for task in (running, waiting)] == [b"2", b"4"]
        await lane.close()

    run(scenario)


def test_closing_tells_everybody_who_still_waits():
    async def scenario():
        gate = threading.Event()
        engine = Engine(gate=gate)
        lane = ModelRunner("m", Echo(), engine, is_inline=False)
        task = asyncio.create_task(lane.run(b"1"))
        await entered(engine)
        await lane.close()
        with pytest.raises(Refused):
            await task
        gate.set()

    run(scenario)


@pytest.mark.parametrize("inline", [True, False])
def test_the_rows_of_one_request_fail_each_on_their_own(inline):
    async def scenario():
        lane = ModelRunner("m", Echo(), Engine(), is_inline=inline)
        rows = [b"1", b"unprepared", b"2", b"no number", b"3", b"-1", b"4"]
        results = await lane.run_rows(rows)
        good = [result.answer.values[0] for result in results if isinstance(result, Served)]
        assert good == [b"2", b"4", b"6", b"8"]
        assert [i for i, result in enumerate(results) if isinstance(result, EngineFailed)] == [1, 3, 5]
        assert await lane.run_rows([]) == []
        await lane.close()

    run(scenario)


def test_a_request_has_one_future_however_many_rows_it_has():
    async def scenario():
        lane = ModelRunner("m", Echo(), Engine(), is_inline=True)
        loop, made = asyncio.get_running_loop(), []
        create = loop.create_future
        loop.create_future = lambda: made.append(1) or create()
        assert len(await lane.run_rows([b"1"] * 30)) == 30
        assert len(made) == 1
        await lane.close()

    run(scenario)


def test_each_row_is_told_once_in_the_order_of_the_batches_that_answer_it():
    async def scenario():
        gate = threading.Event()
        engine = Engine(max_batch=2, gate=gate)
        lane = ModelRunner("m", Echo(), engine, QueueLimits(2, 4))
        told = []

        def on_row(index, result):
            told.append((index, type(result)))

        request = asyncio.create_task(
            lane.run_rows([b"1", b"no number", b"3", b"4", b"5", b"6", b"7"], on_row=on_row)
        )
        await asyncio.sleep(0)
        assert told == [(4, Refused), (5, Refused), (6, Refused)], "the queue has room for four"
        gate.set()
        results = await request
        assert told[3:] == [(0, Served), (1, EngineFailed), (2, Served), (3, Served)]
        assert [type(result) for result in results] == [kind for _, kind in sorted(told, key=lambda t: t[0])]
        await lane.close()

    run(scenario)


def test_a_callback_that_raises_hurts_neither_its_own_request_nor_others(caplog):
    async def scenario():
        def on_row(index, result):
            raise ZeroDivisionError

        lane = ModelRunner("m", Echo(), Engine(), is_inline=True)
        mine, other = await asyncio.gather(lane.run_rows([b"1", b"2"], on_row=on_row), lane.run(b"3"))
        assert [result.answer.values for result in mine] == [(b"2",), (b"4",)]
        assert other.values == (b"6",)
        assert caplog.text.count("event=row_callback_failed") == 2
        await lane.close()

    run(scenario)


@pytest.mark.parametrize(
    "rows", [[b"1", b"-1", b"2", b"3", b"4"], [b"-1", b"-1", b"2", b"3", b"4"], [b"unprepared", b"2"]]
)
def test_all_or_nothing_raises_the_first_error_and_forgets_the_other_rows(rows):
    async def scenario():
        gate = threading.Event()
        engine = Engine(max_batch=2, gate=gate)
        lane = ModelRunner("m", Echo(), engine)
        gate.set()
        with pytest.raises(EngineFailed):
            await lane.run_rows(rows, is_all_or_nothing=True)
        assert (await lane.run(b"5")).values == (b"10",)
        await lane.drain()
        assert lane.waiting == 0
        assert sum(map(len, engine.batches)) <= 5, "rows that nobody waits for still run"
        await lane.close()

    run(scenario)


def test_all_or_nothing_returns_all_where_all_are_well():
    async def scenario():
        lane = ModelRunner("m", Echo(), Engine(), is_inline=True)
        results = await lane.run_rows([b"1", b"2"], is_all_or_nothing=True)
        assert [result.answer.values for result in results] == [(b"2",), (b"4",)]
        assert await lane.run_rows([], is_all_or_nothing=True) == []
        await lane.close()

    run(scenario)


def test_all_or_nothing_that_is_refused_on_arrival_submits_no_further_row():
    async def scenario():
        engine = Engine(gate=threading.Event())
        lane = ModelRunner("m", Echo(), engine, QueueLimits(8, 2))
        with pytest.raises(Refused) as refused:
            await lane.run_rows([b"1"] * 1000, is_all_or_nothing=True)
        assert refused.value.kind is RefusalKind.FULL
        assert lane.waiting == 0
        assert lane.statistics.refused == {"full": 1}
        engine.gate.set()
        await lane.close()

    run(scenario)


@pytest.mark.parametrize("turns", range(6))
def test_a_request_of_a_thousand_rows_is_cancelled_while_it_is_submitted(turns, monkeypatch):
    async def scenario():
        monkeypatch.setattr(model_runner, "_SUBMIT_NS", -1)  # each row is a turn of the event loop
        gate = threading.Event()
        engine = Engine(gate=gate)
        lane = ModelRunner("m", Echo(), engine, QueueLimits(8, 2000))
        request = asyncio.create_task(lane.run_rows([b"1"] * 1000))
        other = asyncio.create_task(lane.run(b"9"))
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()
        gate.set()
        assert (await other).values == (b"18",)
        await lane.drain()
        assert lane.waiting == 0
        assert sum(map(len, engine.batches)) <= turns + 1
        await lane.close()

    run(scenario)


def test_a_thousand_rows_are_submitted_in_several_turns_of_the_event_loop():
    async def scenario():
        class Slow(Echo):
            def prepare(self, row):
                begun_ns = time.monotonic_ns()
                while time.monotonic_ns() < begun_ns + 100_000:
                    pass
                return super().prepare(row)

        lane = ModelRunner("m", Slow(), Engine(), QueueLimits(8, 2000), is_inline=True)
        request = asyncio.create_task(lane.run_rows([b"1"] * 200))
        await asyncio.sleep(0)
        turns = 0
        while lane._next_id < 200:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 5
        assert all(isinstance(result, Served) for result in await request)
        await lane.close()

    run(scenario)


@pytest.mark.parametrize("turns", range(4))
def test_closing_while_a_request_is_submitted_answers_all_of_its_rows(turns, monkeypatch):
    async def scenario():
        monkeypatch.setattr(model_runner, "_SUBMIT_NS", -1)
        lane = ModelRunner("m", Echo(), Engine(gate=threading.Event()), QueueLimits(8, 2000))
        request = asyncio.create_task(lane.run_rows([b"1"] * 50))
        for _ in range(turns):
            await asyncio.sleep(0)
        await lane.close()
        assert {result.kind for result in await request} == {RefusalKind.DRAINING}
        lane._supervisor.engine(0).gate.set()

    run(scenario)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("row", [b"7", b"unprepared", b"no number", b"-1", b"5"])
def test_what_a_request_held_is_free_when_it_ends_well_or_badly(row, inline):
    """Without the garbage collector: the daemon rarely runs it."""

    async def scenario():
        lane = ModelRunner("m", Echo(), Engine(poison=5), is_inline=inline)

        async def ask(data):
            with contextlib.suppress(EngineFailed):
                await lane.run(data)

        data = Watched(row)
        gone = weakref.ref(data)
        gc.collect()
        gc.disable()
        try:
            await ask(data)
            del data
            await until(lambda: gone() is None)  # the engine's thread has reached its next wait
        finally:
            gc.enable()
        await lane.close()

    run(scenario)
