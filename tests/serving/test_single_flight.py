"""Who waits for whom, and what the end of a leader means for its followers."""

import asyncio

import pytest

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Origin, Reason
from edge_runtime.core.outcome import Outcome
from edge_runtime.serving.single_flight import SingleFlight
from tests.serving.fakes import run

OUTCOME = Outcome(Answer((b"x",), 0.9), Origin.LOCAL, Reason.CONFIDENT)


def test_followers_get_what_the_leader_lands_and_the_key_is_free_again():
    async def scenario():
        flights = SingleFlight()
        flight = flights.lead(b"k", 0, 1, 100)
        assert flights.find(b"k") is flight
        assert flights.find(b"other") is None
        waiters = [flights.find(b"k").join() for _ in range(3)]
        flights.land(flight, OUTCOME)
        assert await asyncio.gather(*waiters) == [OUTCOME] * 3
        assert (flights.find(b"k"), len(flights)) == (None, 0)

    run(scenario)


def test_a_cancelled_follower_is_passed_over_and_the_others_are_served():
    async def scenario():
        flights = SingleFlight()
        flight = flights.lead(b"k", 0, 1, 100)
        waiters = [flight.join() for _ in range(3)]
        tasks = [asyncio.ensure_future(asyncio.wait_for(waiter, 10)) for waiter in waiters]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert [waiter.done() for waiter in waiters] == [False, True, False]
        flights.land(flight, OUTCOME)
        assert [await tasks[0], await tasks[2]] == [OUTCOME] * 2

    run(scenario)


@pytest.mark.parametrize("how", ["land", "fail", "abandon"])
def test_whoever_joined_before_the_end_learns_of_it_however_late_it_looks(how):
    async def scenario():
        flights = SingleFlight()
        flight = flights.lead(b"k", 0, 1, 100)
        waiter = flight.join()
        if how == "land":
            flights.land(flight, OUTCOME)
            assert await waiter == OUTCOME
        elif how == "fail":
            flights.fail(flight, EngineFailed("broken"))
            error = await waiter
            assert (type(error), str(error)) == (EngineFailed, "broken")
        else:
            flights.abandon(flight)
            assert await waiter is None
        assert len(flights) == 0

    run(scenario)


def test_an_error_that_no_follower_reads_is_not_reported_as_lost():
    """A follower that is cancelled in the turn of the failure never awaits its future."""

    async def scenario():
        lost = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
        flights = SingleFlight()
        flight = flights.lead(b"k", 0, 1, 100)
        waiter = flight.join()
        flights.fail(flight, EngineFailed("broken"))
        del waiter, flight
        await asyncio.sleep(0)
        assert lost == []

    run(scenario)


def test_of_followers_that_are_abandoned_one_leads_and_the_others_join_it():
    async def scenario():
        flights, led, order = SingleFlight(), [], []

        async def follow(name, waiter):
            while await waiter is None:
                flight = flights.find(b"k")
                if flight is None:
                    led.append(flights.lead(b"k", 0, 1, 100))
                    order.append(name)
                    return
                waiter = flight.join()
            order.append(f"{name} served")

        first = flights.lead(b"k", 0, 1, 100)
        tasks = [asyncio.create_task(follow(name, first.join())) for name in "abc"]
        flights.abandon(first)
        for _ in range(3):
            await asyncio.sleep(0)
        assert order == ["a"]
        assert flights.find(b"k") is led[0]
        flights.land(led[0], OUTCOME)
        await asyncio.gather(*tasks)
        assert order == ["a", "b served", "c served"]

    run(scenario)


@pytest.mark.parametrize("how", ["land", "abandon"])
def test_a_flight_that_ends_late_leaves_the_next_one_of_its_key_alone(how):
    async def scenario():
        flights = SingleFlight()
        old = flights.lead(b"k", 0, 1, 100)
        flights.abandon(old)
        new = flights.lead(b"k", 0, 1, 100)
        waiter = new.join()
        flights.land(old, OUTCOME) if how == "land" else flights.abandon(old)
        assert flights.find(b"k") is new
        assert not waiter.done()

    run(scenario)


def test_each_follower_has_an_error_of_its_own_without_the_frames_of_the_leader():
    async def scenario():
        flights = SingleFlight()
        flight = flights.lead(b"k", 0, 1, 100)
        waiters = [flight.join() for _ in range(2)]
        with pytest.raises(EngineFailed) as raised:
            raise EngineFailed("broken")
        flights.fail(flight, raised.value)
        first, second = await asyncio.gather(*waiters)
        assert len({id(error) for error in (first, second, raised.value)}) == 3
        assert (first.__traceback__, str(first), str(second)) == (None, "broken", "broken")

    run(scenario)
