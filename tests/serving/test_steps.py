"""Sequences on a step engine: streams that push back, and states that are released exactly once, however they end."""

import asyncio
import threading
import time

import numpy as np
import pytest

from edge_runtime.core.errors import EngineFailed, RefusalKind, Refused
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.open_states import OpenStates
from edge_runtime.serving.in_flight import STREAM_HIGH_WATER
from edge_runtime.serving.model_runner import ModelRunner
from tests.serving.runner_fakes import Countdown, Echo, Engine, Turnstile, entered, run, until

BOTH = pytest.mark.parametrize("inline", [True, False])


def stepping(engine, **how):
    return ModelRunner("m", Echo(), engine, is_stepwise=True, **how)


async def listen(runner, start, stop=None, **how):
    """The numbers of a stream, which is left at the number `stop`."""
    heard = []
    stream = runner.stream(str(start).encode(), **how)
    async for answer in stream:
        heard.append(int(answer.values[0]))
        if heard[-1] == stop:
            await stream.aclose()
    return heard


async def closed(runner, *engines):
    """Close the runner, and check that each engine had each state released exactly once."""
    await runner.close()
    for engine in engines:
        await until(lambda engine=engine: engine.closed)
        assert engine.is_clean, (engine.opened, engine.releases, engine.open_slots)


@BOTH
def test_members_of_a_step_lane_join_stream_and_leave_at_any_step(inline):
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=inline)
        whole = asyncio.create_task(lane.run(b"6"))
        streams = [asyncio.create_task(listen(lane, *who)) for who in ((3, None), (9, 7), (2, None))]
        assert [await task for task in streams] == [[3, 2, 1, 0], [9, 8, 7], [2, 1, 0]]
        assert (await whole).values == (b"0",)
        assert max(map(len, engine.steps)) == 3
        assert any(6 > step[0] > 0 and 2 in step[1:] for step in engine.steps), "one joined a running group"
        assert lane.waiting == 0
        assert engine.opened == 4
        await closed(lane, engine)

    run(scenario)


def test_a_stream_of_an_engine_without_steps_has_one_answer():
    async def scenario():
        lane = ModelRunner("m", Echo(), Engine(poison=5))
        assert await listen(lane, 4) == [8]
        with pytest.raises(EngineFailed):
            await listen(lane, 5)
        await lane.close()

    run(scenario)


def test_an_inline_sequence_lets_the_event_loop_turn_after_each_step():
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=True)
        sequence = asyncio.create_task(lane.run(b"500"))
        turns = 0
        while not sequence.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(engine.steps) == 501
        assert turns >= 501
        await closed(lane, engine)

    run(scenario)


def test_a_request_of_many_rows_lets_the_event_loop_turn_between_its_inline_batches():
    async def scenario():
        engine = Engine(max_batch=4)
        lane = ModelRunner("m", Echo(), engine, QueueLimits(4, 1000), is_inline=True)
        request = asyncio.create_task(lane.run_rows([b"1"] * 400))
        turns = 0
        while not request.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns >= len(engine.batches) >= 100
        await lane.close()

    run(scenario)


@BOTH
def test_rows_that_grow_never_share_a_step_with_rows_of_another_shape(inline):
    async def scenario():
        engine = Countdown(grows=True)
        lane = stepping(engine, is_inline=inline)
        first = asyncio.create_task(lane.run(b"9"))
        while len(engine.steps) < 3:
            await asyncio.sleep(0)
        others = [asyncio.create_task(listen(lane, start)) for start in (5, 7, 3)]
        assert (await first).values == (b"0",)
        assert [await task for task in others] == [[*range(n, -1, -1)] for n in (5, 7, 3)]
        assert len(set(engine.shapes)) == 10
        await closed(lane, engine)

    run(scenario)


@BOTH
def test_a_reader_that_stops_reading_pauses_its_own_member_alone(inline):
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=inline)
        slow = lane.stream(b"1000")
        assert int((await anext(slow)).values[0]) == 1000
        assert await listen(lane, 99) == [*range(99, -1, -1)], "its neighbour goes on"
        before = len(engine.steps)
        assert sum(1 for step in engine.steps if step[0] > 99) <= 1 + STREAM_HIGH_WATER
        assert (await lane.run(b"3")).values == (b"0",)
        assert len(engine.steps) == before + 4, "it takes part in no step"
        assert [int(answer.values[0]) async for answer in slow] == [*range(999, -1, -1)], "none is lost"
        await closed(lane, engine)

    run(scenario)


@BOTH
def test_the_answers_that_wait_for_a_reader_are_bounded(inline):
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=inline)
        stream = lane.stream(b"500")
        read = 0
        async for _ in stream:
            read += 1
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(engine.steps) - read <= STREAM_HIGH_WATER + 1
        assert read == 501
        await closed(lane, engine)

    run(scenario)


def test_a_sequence_that_paused_is_not_refused_when_its_reader_goes_on():
    """The queue is full by then, and the runner drains: the sequence was admitted, and goes to its end."""

    async def scenario():
        engine = Countdown(max_batch=1)
        lane = stepping(engine, limits=QueueLimits(1, 1), is_inline=True)
        slow = lane.stream(b"40")
        await anext(slow)
        await until(lambda: len(engine.steps) == 1 + STREAM_HIGH_WATER)
        engine.gate, engine.entered = threading.Event(), threading.Event()
        engine.gate.set()
        other = asyncio.create_task(lane.run(b"3"))
        await asyncio.sleep(0)
        draining = asyncio.create_task(lane.drain())
        assert [int(answer.values[0]) async for answer in slow] == [*range(39, -1, -1)]
        assert (await other).values == (b"0",)
        await draining
        await closed(lane, engine)

    run(scenario)


def test_a_sequence_that_paused_beyond_its_deadline_ends_after_the_answers_it_had():
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=True)
        deadline_ns = time.monotonic_ns() + 300_000_000
        slow = lane.stream(b"900", deadline_ns=deadline_ns)
        heard = [int((await anext(slow)).values[0])]
        await until(lambda: time.monotonic_ns() > deadline_ns)
        assert len(engine.steps) == 1 + STREAM_HIGH_WATER

        async def hear():
            async for answer in slow:
                heard.append(int(answer.values[0]))  # noqa: PERF401 - those before the error count

        with pytest.raises(Refused) as late:
            await hear()
        assert late.value.kind is RefusalKind.LATE
        assert heard == [*range(900, 900 - len(heard), -1)]
        assert len(heard) >= 1 + STREAM_HIGH_WATER
        await closed(lane, engine)

    run(scenario)


# How a member may end, and where it may be then. Each state must be released exactly once.


@BOTH
def test_a_reader_leaves_between_two_steps(inline):
    async def scenario():
        engine = Countdown(max_batch=1)
        lane = stepping(engine, is_inline=inline)
        others = [asyncio.create_task(listen(lane, start)) for start in (30, 40)]
        assert await listen(lane, 50, 45) == [*range(50, 44, -1)]
        assert [len(await task) for task in others] == [31, 41]
        await closed(lane, engine)

    run(scenario)


@BOTH
def test_a_reader_leaves_while_its_member_is_paused(inline):
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=inline)
        stream = lane.stream(b"900")
        await anext(stream)
        await until(lambda: len(engine.steps) == 1 + STREAM_HIGH_WATER)
        await stream.aclose()
        await until(lambda: engine.is_clean)
        await lane.drain()
        await closed(lane, engine)

    run(scenario)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_caller_leaves_while_its_member_is_in_a_step(steps):
    async def scenario():
        engine = Countdown(gate=Turnstile(steps - 1))
        lane = stepping(engine)
        stays, leaves = (asyncio.create_task(listen(lane, start)) for start in (6, 8))
        await until(lambda: len(engine.steps) == steps)
        leaves.cancel()
        await asyncio.wait([leaves])
        assert leaves.cancelled()
        engine.gate.let(9)
        assert await stays == [*range(6, -1, -1)]
        await until(lambda: engine.is_clean)
        await closed(lane, engine)

    run(scenario)


def test_a_caller_leaves_before_its_first_step():
    async def scenario():
        engine = Countdown(gate=threading.Event(), max_batch=1)
        lane = stepping(engine)
        stays, leaves = (asyncio.create_task(lane.run(start)) for start in (b"2", b"3"))
        await entered(engine)
        leaves.cancel()
        await asyncio.wait([leaves])
        engine.gate.set()
        assert (await stays).values == (b"0",)
        assert engine.opened == 1
        await closed(lane, engine)

    run(scenario)


@BOTH
def test_a_step_that_raises_ends_its_members_alone(inline):
    async def scenario():
        engine = Countdown(poison=5)
        lane = stepping(engine, is_inline=inline)
        done = await asyncio.gather(*(listen(lane, start) for start in (7, 6, 5, 4)), return_exceptions=True)
        assert [type(answers) for answers in done] == [EngineFailed] * 3 + [list]
        assert done[3] == [4, 3, 2, 1, 0]
        assert lane.statistics.faults == {"raised": 1}
        await until(lambda: engine.is_clean)
        await closed(lane, engine)

    run(scenario)


@BOTH
def test_a_step_of_the_wrong_count_ends_its_members_alone(inline):
    async def scenario():
        engine = Countdown()
        engine.step = lambda handles, rows: []
        lane = stepping(engine, is_inline=inline)
        with pytest.raises(EngineFailed):
            await lane.run(b"3")
        assert lane.statistics.faults == {"miscounted": 1}
        del engine.step
        assert (await lane.run(b"3")).values == (b"0",)
        await closed(lane, engine)

    run(scenario)


@BOTH
@pytest.mark.parametrize("bad", [b"8", b"not a number", b"unprepared", b"-2"])
def test_a_member_that_cannot_be_opened_encoded_or_read_ends_alone(inline, bad):
    async def scenario():
        engine = Countdown(unopened=8)
        lane = stepping(engine, is_inline=inline)
        done = await asyncio.gather(*(lane.run(row) for row in (b"3", bad, b"4")), return_exceptions=True)
        assert isinstance(done[1], EngineFailed)
        assert [answer.values for answer in (done[0], done[2])] == [(b"0",)] * 2
        assert lane.statistics.faults == {}
        await closed(lane, engine)

    run(scenario)


@pytest.mark.parametrize(
    "returned", [lambda step: (1, 2, 3), lambda step: step._replace(following=(1,)), lambda step: None]
)
def test_a_member_whose_step_is_nonsense_ends_alone(returned):
    async def scenario():
        engine = Countdown()
        sound = engine.step

        def step(handles, rows):
            return [returned(made) if made.output[0] == 5 else made for made in sound(handles, rows)]

        engine.step = step
        lane = stepping(engine)
        done = await asyncio.gather(*(lane.run(row) for row in (b"3", b"5", b"4")), return_exceptions=True)
        assert isinstance(done[1], EngineFailed)
        assert [answer.values for answer in (done[0], done[2])] == [(b"0",)] * 2
        await closed(lane, engine)

    run(scenario)


def test_a_release_that_raises_is_logged_and_hurts_nobody(caplog):
    async def scenario():
        engine = Countdown()

        def release(slot):
            raise OSError("device lost")

        engine.release = release
        lane = stepping(engine)
        assert [(await lane.run(b"2")).values for _ in range(2)] == [(b"0",)] * 2
        await lane.close()
        assert engine.closed
        assert caplog.text.count("event=release_failed") == 2

    run(scenario)


def hanging(**how):
    return Countdown(gate=threading.Event(), **how)


def test_an_engine_that_hangs_in_a_step_and_is_replaced_releases_every_state_when_it_returns():
    async def scenario():
        engine, fresh = Countdown(gate=Turnstile()), Countdown()
        lane = stepping(engine, hang_limit_s=20, load_engine=lambda: fresh)
        tasks = [asyncio.create_task(lane.run(b"9")) for _ in range(2)]
        await until(lambda: engine.steps)
        tasks.append(asyncio.create_task(lane.run(b"8")))
        await asyncio.sleep(0)
        lane._supervisor.hang_limit_s = 0.02
        engine.gate.let(
            1
        )  # the engine hangs in the second step of two members, which is the first of the third
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in done] == [EngineFailed] * 3
        assert engine.steps[-1] == [8, 8, 8]
        assert (await lane.run(b"2")).values == (b"0",)
        assert not engine.releases, "its thread hangs"
        engine.gate.let(9)
        await closed(lane, engine, fresh)
        assert (engine.opened, fresh.opened) == (3, 1)

    run(scenario)


def test_a_member_that_waits_with_its_state_in_a_replaced_engine_fails_and_a_newcomer_does_not():
    async def scenario():
        engine, fresh = hanging(max_batch=1), Countdown()
        engine.gate.set()
        lane = stepping(engine, hang_limit_s=0.05, load_engine=lambda: fresh)
        stream = lane.stream(b"900")
        await anext(stream)
        await until(lambda: len(engine.steps) == 1 + STREAM_HIGH_WATER)
        engine.gate.clear()
        engine.entered.clear()
        in_step = asyncio.create_task(lane.run(b"7"))
        await entered(engine)
        newcomer = asyncio.create_task(lane.run(b"3"))
        with pytest.raises(EngineFailed):
            await in_step
        assert (await newcomer).values == (b"0",)
        await lane.drain()  # the member that pauses has ended, although nobody reads its stream
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
        engine.gate.set()
        await closed(lane, engine, fresh)

    run(scenario)


def test_an_engine_that_hangs_in_a_step_and_returns_goes_on_with_the_other_members():
    async def scenario():
        engine = hanging(max_batch=1)
        engine.gate.set()
        lane = stepping(engine, hang_limit_s=0.05)
        stream = lane.stream(b"60")
        heard = [int((await anext(stream)).values[0])]
        await until(
            lambda: len(engine.steps) == 1 + STREAM_HIGH_WATER
        )  # it pauses, with its state in the engine
        engine.gate.clear()
        with pytest.raises(EngineFailed):
            await lane.run(b"7")
        engine.gate.set()
        heard += [int(answer.values[0]) async for answer in stream]
        assert heard == [*range(60, -1, -1)]
        await until(lambda: engine.is_clean)
        await closed(lane, engine)

    run(scenario)


@pytest.mark.parametrize("inline", [True, False])
def test_closing_releases_states_that_wait_and_that_pause(inline):
    async def scenario():
        engine = Countdown()
        lane = stepping(engine, is_inline=inline)
        paused = lane.stream(b"900")
        await anext(paused)
        await until(lambda: len(engine.steps) == 1 + STREAM_HIGH_WATER)
        waiting = [asyncio.create_task(lane.run(b"1000000")) for _ in range(2)]
        await until(lambda: engine.opened == 3)
        await closed(lane, engine)
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [answer.kind for answer in done] == [RefusalKind.DRAINING] * 2
        with pytest.raises(Refused):
            async for _ in paused:
                pass

    run(scenario)


def test_closing_while_a_first_step_runs_releases_the_state_that_it_opens():
    async def scenario():
        engine = hanging()
        lane = stepping(engine)
        task = asyncio.create_task(lane.run(b"9"))
        await entered(engine)
        await lane.close()
        with pytest.raises(Refused):
            await task
        engine.gate.set()
        await closed(lane, engine)
        assert engine.opened == 1

    run(scenario)


def test_a_state_is_released_once_however_often_and_late_it_is_asked_for():
    inner = Countdown()
    states = OpenStates(inner)
    row = (np.array([3]),)
    first = states.open(row)
    states.release(first)
    second = states.open(row)  # the engine gives it the same slot
    states.release(first)
    assert len(states.step([second], [row])) == 1
    states.close()
    assert inner.is_clean
    assert inner.opened == 2
