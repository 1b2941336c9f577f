"""The asyncio driver with a fake engine: the ugly cases first."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.messages import Answer
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines import Step
from edge_runtime.engines.fake import FakeBatch
from edge_runtime.processing import PreparedRow
from edge_runtime.serving import supervision
from edge_runtime.serving.model_runner import ModelRunner


class Echo:
    """A processor of texts whose answer is the text itself."""

    signature = None
    version = "1"

    input_dtypes = (np.dtype(np.int64),)

    def prepare(self, row):
        return PreparedRow(((1,),), 8, int(row))

    def encode_batch(self, batch, buffers):
        buffers[0][:, 0] = batch

    def decode_batch(self, outputs, batch):
        return [Answer((str(number).encode(),), 1.0) for number in outputs[0][:, 0].tolist()]


class Engine:
    """Doubles its numbers; can wait for a gate, raise on a number, or lose a row."""

    name, is_batch_invariant = "fake", True

    def __init__(self, max_batch=8, *, poison=None, loses=False, gate=None):
        self.max_batch, self.poison, self.loses, self.gate = max_batch, poison, loses, gate
        self.batches, self.entered, self.closed = [], threading.Event(), False

    def bind(self, shapes, rows):
        return FakeBatch(shapes, rows, [np.int64])

    def run(self, batch):
        numbers = batch.inputs[0][:, 0].tolist()
        self.batches.append(numbers)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.poison in numbers:
            raise ValueError("poisoned")
        out = batch.inputs[0] * 2
        return [out[:-1] if self.loses else out]

    def close(self):
        self.closed = True


async def entered(engine):
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, engine.entered.wait, 20)
    engine.entered.clear()


def run(scenario):
    async def limited():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


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
        now_ns = __import__("time").monotonic_ns()
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


class Countdown:
    """A step engine: each step says the number and goes on below it until 0."""

    name, is_batch_invariant, max_batch = "fake", True, 3

    def __init__(self):
        self.steps, self.closed, self.opened, self.released = [], False, 0, []

    def open(self, row):
        self.opened += 1
        return self.opened

    def step(self, handles, rows):
        assert not set(handles) & set(self.released)
        self.steps.append([int(row[0][0]) for row in rows])
        return [Step(row, (row[0] - 1,) if row[0][0] > 0 else None) for row in rows]

    def release(self, handle):
        self.released.append(handle)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("inline", [True, False])
def test_members_of_a_step_lane_join_stream_and_leave_at_any_step(inline):
    async def scenario():
        engine = Countdown()
        lane = ModelRunner("m", Echo(), engine, is_inline=inline, is_stepwise=True)

        async def listen(start, until):
            heard = []
            stream = lane.stream(str(start).encode())
            async for answer in stream:
                heard.append(int(answer.values[0]))
                if heard[-1] == until:
                    await stream.aclose()
            return heard

        whole = asyncio.create_task(lane.run(b"6"))
        streams = [asyncio.create_task(listen(*who)) for who in ((3, None), (9, 7), (2, None))]
        assert [await task for task in streams] == [[3, 2, 1, 0], [9, 8, 7], [2, 1, 0]]
        assert (await whole).values == (b"0",)
        assert max(map(len, engine.steps)) == 3
        assert any(6 > step[0] > 0 and 2 in step[1:] for step in engine.steps), "one joined a running group"
        assert lane.waiting == 0
        await lane.close()
        assert sorted(engine.released) == [1, 2, 3, 4], "each state is freed exactly once"

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
