"""A caller's own deadline and priority never decide about another caller who waits for the same row."""

import asyncio
import random
import threading
import time

import pytest

from edge_runtime.core.errors import RefusalKind, Refused
from edge_runtime.core.escalation.decision import CloudUnavailable
from edge_runtime.core.messages import Reason
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.fake import FakeEngine
from tests.serving.fakes import NamedCloud, labels, named, rows_of, run, service_of, turns, until

SECOND = 10**9


class Scripted(NamedCloud):
    """Raises each of `failures` in turn, then answers; with `then_holds` not before the gate opens again."""

    then_holds = False

    def __init__(self, *failures, p95_ns=0):
        super().__init__(p95_ns=p95_ns)
        self.failures = list(failures)

    async def ask(self, model, request, *, deadline_ns):
        reply = await super().ask(model, request, deadline_ns=deadline_ns)
        if self.failures:
            if self.then_holds:
                self.gate.clear()
            raise CloudUnavailable(self.failures.pop(0), "as the test says")
        return reply


def within(seconds):
    """A deadline."""
    return time.monotonic_ns() + int(seconds * SECOND)


def ask(service, text=b"x@0.5", seconds=None, **parameters):
    """Ask in a task of its own."""
    deadline_ns = None if seconds is None else within(seconds)
    return asyncio.create_task(
        service.infer("named", None, rows_of(text, **parameters), deadline_ns=deadline_ns)
    )


def why(reply):
    """Origin and reason of a reply."""
    return reply.parameters["origin"], reply.parameters["reason"]


def computed(one):
    """Rows that the model ran."""
    return sum(rows * often for rows, often in one.runner.statistics.batch_sizes.items())


# Outcomes that depend on the deadline of the leader


@pytest.mark.parametrize("followers", [1, 4])
def test_a_leader_without_time_for_the_cloud_leaves_it_to_followers_that_have_the_time(followers):
    async def scenario():
        gate = threading.Event()
        one, cloud = named(FakeEngine(gate=gate)), NamedCloud(p95_ns=20 * SECOND)
        service = service_of(one, cloud)
        leader = ask(service, seconds=10)
        await turns()
        patient = [ask(service, seconds=60) for _ in range(followers)]
        await turns()
        gate.set()
        assert why(await leader) == ("local", "too_late")
        for follower in patient:
            reply = await follower
            assert (reply.parameters["reason"], labels(reply)) == ("unsure", [b"cloud x"])
        assert (computed(one), len(cloud.asked), len(service._flights)) == (1, 1, 0)
        await one.runner.close()

    run(scenario)


def test_a_leader_whose_time_ended_at_the_cloud_leaves_the_edges_answer_to_its_followers():
    async def scenario():
        one, cloud = named(), Scripted(Reason.CLOUD_LATE)
        cloud.gate.clear()
        service = service_of(one, cloud, cloud_timeout_s=30)
        leader = ask(service, seconds=10)
        await turns()
        patient = [ask(service, seconds=60) for _ in range(3)]
        await turns()
        cloud.gate.set()
        assert why(await leader) == ("local", "cloud_late")
        assert [labels(await follower) for follower in patient] == [[b"cloud x"]] * 3
        assert (computed(one), len(cloud.asked)) == (1, 2), "the model ran once; one follower asked for all"

    run(scenario)


def test_a_probe_that_was_denied_to_a_short_deadline_is_left_to_a_longer_one():
    async def scenario():
        cloud = Scripted(Reason.CLOUD_OPEN)
        cloud.gate.clear()
        service = service_of(named(), cloud, cloud_timeout_s=30)
        leader = ask(service, seconds=10)
        await turns()
        patient = ask(service, seconds=60)
        await turns()
        cloud.gate.set()
        assert why(await leader) == ("local", "cloud_open")
        assert why(await patient) == ("cloud", "unsure")

    run(scenario)


@pytest.mark.parametrize("reason", [Reason.CLOUD_LATE, Reason.CLOUD_ABSENT, Reason.CLOUD_FAILED])
def test_a_failure_that_more_time_could_not_prevent_is_everybodys(reason):
    """The cloud had all the time that the configuration gives: nobody waits it out again for the same row."""

    async def scenario():
        one, cloud = named(), Scripted(reason, reason)
        cloud.gate.clear()
        service = service_of(one, cloud, cloud_timeout_s=2)
        leader = ask(service, seconds=10)
        await turns()
        others = [ask(service, seconds=60) for _ in range(3)]
        await turns()
        cloud.gate.set()
        assert {why(await asker) for asker in (leader, *others)} == {("local", reason.value)}
        assert len(cloud.asked) == 1

    run(scenario)


def test_a_follower_with_no_more_time_than_the_leader_has_the_edges_answer_and_no_refusal():
    async def scenario():
        gate = threading.Event()
        one, cloud = named(FakeEngine(gate=gate)), NamedCloud(p95_ns=20 * SECOND)
        service = service_of(one, cloud)
        askers = [ask(service, seconds=10 + i) for i in range(3)]
        await turns()
        gate.set()
        assert [why(await asker) for asker in askers] == [("local", "too_late")] * 3
        assert (computed(one), cloud.asked) == (1, [])
        await one.runner.close()

    run(scenario)


def test_a_follower_whose_time_ends_while_another_asks_again_has_the_edges_answer():
    """The leader has 5 s and ends at once, since the cloud says that it is late; the third waits for its own time."""

    async def scenario():
        cloud = Scripted(Reason.CLOUD_LATE)
        cloud.then_holds = True
        cloud.gate.clear()
        service = service_of(named(), cloud, cloud_timeout_s=30)
        leader = ask(service, seconds=5)
        await turns()
        second = ask(service, seconds=60)
        third = ask(service, seconds=5.02)
        await turns()
        cloud.gate.set()
        assert why(await leader) == ("local", "cloud_late")
        await until(lambda: len(cloud.asked) == 2)
        assert not second.done()
        assert why(await third) == ("local", "cloud_late")
        cloud.gate.set()
        assert why(await second) == ("cloud", "unsure")
        assert len(service._flights) == 0

    run(scenario)


def test_a_stale_answer_for_want_of_time_is_the_leaders_own():
    async def scenario():
        gate = threading.Event()
        gate.set()
        one, cloud = named(FakeEngine(gate=gate)), NamedCloud()
        service = service_of(one, cloud, ttl_ns=1)
        assert why(await ask(service)) == ("cloud", "unsure")  # expired at once
        cloud.p95_ns = 20 * SECOND
        gate.clear()
        leader = ask(service, seconds=10)
        await turns()
        patient = ask(service, seconds=60)
        await turns()
        gate.set()
        assert why(await leader) == ("cache", "stale")
        assert why(await patient) == ("cloud", "unsure")
        await one.runner.close()

    run(scenario)


def test_what_a_leader_decided_for_itself_is_not_kept_for_others():
    async def scenario():
        one, cloud = named(), NamedCloud(p95_ns=20 * SECOND)
        service = service_of(one, cloud)
        assert why(await ask(service, seconds=10)) == ("local", "too_late")
        assert why(await ask(service, seconds=60)) == ("cloud", "unsure")

    run(scenario)


def test_a_refused_leader_leaves_its_followers_their_own_deadlines():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), latency_profile=((1, 10**9),))
        service = service_of(one)
        busy = ask(service, b"busy@0.9")
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        hurried = ask(service, b"x@0.9", seconds=0.5)  # a row takes a second
        patient = [ask(service, b"x@0.9", seconds=60) for _ in range(2)]
        with pytest.raises(Refused) as refused:
            await hurried
        assert refused.value.kind is RefusalKind.LATE
        gate.set()
        assert [labels(await asker) for asker in (busy, *patient)] == [[b"busy"], [b"x"], [b"x"]]
        await one.runner.close()

    run(scenario)


# The place in the queue


@pytest.mark.parametrize(
    ("crowd", "urgent"),
    [({"priority": "low"}, {"priority": "high"}), ({"seconds": 60}, {"seconds": 9})],
    ids=["priority", "deadline"],
)
def test_a_more_urgent_follower_does_not_wait_in_the_place_of_its_leader(crowd, urgent):
    """Rows are told apart by their confidence, 0.91 being the one that leader and followers ask for."""

    async def scenario():
        gate, order = threading.Event(), []

        def answer(row):
            order.append(round(float(row[0][0]), 2))
            return row

        # What a row is said to cost keeps the low ones from ageing while this test runs.
        one = named(FakeEngine(answer, max_batch=1, gate=gate), latency_profile=((1, SECOND),))
        service = service_of(one, timeout_s=90)
        askers = [ask(service, b"busy@0.9")]
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        askers += [ask(service, b"other%d@0.8" % i, **crowd) for i in range(4)]
        await turns(3)
        askers.append(ask(service, b"x@0.91", **crowd))
        await turns(3)
        askers += [ask(service, b"x@0.91", **urgent) for _ in range(3)]
        await turns()
        gate.set()
        results = await asyncio.gather(*askers)
        assert [labels(reply) for reply in results[5:]] == [[b"x"]] * 4
        assert order[:2] == [0.9, 0.91]
        assert order.count(0.91) <= 2, "those that are equally urgent share one run"
        assert (len(service._flights), one.runner.waiting) == (0, 0)
        await one.runner.close()

    run(scenario)


def test_a_less_urgent_follower_waits_for_the_leader_as_ever():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate))
        service = service_of(one)
        askers = [
            ask(service, b"x@0.9", seconds=60, priority=priority) for priority in ("high", "normal", "low")
        ]
        await turns()
        assert service.counters.coalesced == 2
        gate.set()
        assert [labels(await asker) for asker in askers] == [[b"x"]] * 3
        assert computed(one) == 1
        await one.runner.close()

    run(scenario)


def test_a_more_urgent_follower_takes_the_flight_if_that_lands_first():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate))
        service = service_of(one)
        leader = ask(service, b"x@0.9", priority="low")
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        urgent = ask(service, b"x@0.9", priority="high")
        await until(lambda: one.runner.waiting == 1)
        # The flight lands in the turn in which its batch ends, before the urgent row can begin.
        one.runner._scheduler.engine_down(0)
        gate.set()
        assert labels(await leader) == [b"x"]
        assert labels(await urgent) == [b"x"]
        await turns()
        assert (one.runner.waiting, len(service._flights), service.counters.coalesced) == (0, 0, 1)
        await one.runner.close()

    run(scenario)


def test_a_more_urgent_follower_without_room_of_its_own_still_has_the_flight():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 9, tenant_max_waiting=1))
        service = service_of(one)
        leader = ask(service, b"x@0.9", priority="low")
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        waiting = ask(service, b"other@0.9", priority="high")
        await until(lambda: one.runner.waiting == 1)
        urgent = ask(service, b"x@0.9", priority="high")
        await turns()
        assert not urgent.done()
        gate.set()
        assert [labels(await asker) for asker in (leader, waiting, urgent)] == [[b"x"], [b"other"], [b"x"]]
        assert one.runner.statistics.refused == {"quota": 1}
        await one.runner.close()

    run(scenario)


@pytest.mark.parametrize("holds", [False, True], ids=["the cloud is quick", "the cloud takes its time"])
@pytest.mark.parametrize("first", ["leader", "urgent"])
def test_a_leader_and_a_more_urgent_follower_ask_the_cloud_once_whoever_is_computed_first(first, holds):
    async def scenario():
        gate = threading.Event()
        one, cloud = named(FakeEngine(max_batch=1, gate=gate), latency_profile=((1, SECOND),)), NamedCloud()
        service = service_of(one, cloud, timeout_s=90)
        if first == "urgent":  # the leader's row waits in the queue, and the urgent one before it
            busy = ask(service, b"busy@0.9")
            await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        if holds:
            cloud.gate.clear()
        askers = [ask(service, priority="low")]
        await turns()
        askers += [ask(service, priority="high"), ask(service, priority="high")]
        await turns()
        gate.set()
        if holds:
            await until(lambda: one.runner.waiting == 0 and computed(one) == 2 + (first == "urgent"))
            await turns(30)
            cloud.gate.set()
        assert [labels(await asker) for asker in askers] == [[b"cloud x"]] * 3
        assert (len(cloud.asked), len(service._flights)) == (1, 0)
        if first == "urgent":
            await busy
        await one.runner.close()

    run(scenario)


def test_a_more_urgent_follower_asks_the_cloud_while_its_leader_waits_in_the_queue():
    async def scenario():
        leaders_turn, order = threading.Event(), []

        def answer(row):
            order.append(row)
            if len(order) == 1:
                assert gate.wait(15)
            if len(order) == 3:  # busy, then the urgent one, then the leader
                assert leaders_turn.wait(15)
            return row

        gate = threading.Event()
        one, cloud = (
            named(FakeEngine(answer, max_batch=1), is_inline=False, latency_profile=((1, SECOND),)),
            NamedCloud(),
        )
        service = service_of(one, cloud, timeout_s=90)
        busy = ask(service, b"busy@0.9")
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        leader = ask(service, priority="low")
        await turns()
        urgent = ask(service, priority="high")
        await turns()
        gate.set()
        assert why(await urgent) == ("cloud", "unsure")
        assert not leader.done()
        leaders_turn.set()
        assert labels(await leader) == [b"cloud x"]
        assert len(cloud.asked) == 1, "what the cloud said meanwhile was kept"
        await busy
        await one.runner.close()

    run(scenario)


@pytest.mark.parametrize("victim", ["leader", "urgent"])
def test_of_a_leader_and_a_more_urgent_follower_each_is_cancelled_alone(victim):
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate))
        service = service_of(one)
        busy = ask(service, b"busy@0.9")
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        askers = {"leader": ask(service, b"x@0.9", priority="low")}
        await turns()
        askers["urgent"] = ask(service, b"x@0.9", priority="high")
        await turns()
        assert one.runner.waiting == 2
        follower = ask(service, b"x@0.9", priority="high")
        await turns()
        askers.pop(victim).cancel()
        await turns()
        gate.set()
        (left,) = askers.values()
        assert [labels(await asker) for asker in (left, follower, busy)] == [[b"x"], [b"x"], [b"busy"]]
        assert (len(service._flights), one.runner.waiting) == (0, 0)
        await one.runner.close()

    run(scenario)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_priorities_and_deadlines_everybody_gets_the_row_it_asked_for(seed):
    async def scenario():
        rng = random.Random(seed)
        cloud = Scripted(*rng.choices([Reason.CLOUD_LATE, Reason.CLOUD_OPEN, Reason.CLOUD_FAILED], k=2))
        cloud.gate.clear()
        gate = threading.Event()
        one = named(FakeEngine(max_batch=rng.choice((1, 2, 8)), gate=gate))
        service = service_of(one, cloud, cloud_timeout_s=30)
        texts = [b"a@0.9", b"b@0.1", b"c@0.9", b"d@0.2"]
        askers = []
        for _ in range(16):
            request = [rng.choice(texts) for _ in range(rng.choice((1, 1, 1, 3)))]
            task = asyncio.create_task(
                service.infer(
                    "named",
                    None,
                    rows_of(*request, priority=rng.choice(("high", "normal", "low"))),
                    deadline_ns=within(rng.choice((20, 25, 40, 60))),
                )
            )
            askers.append((request, task))
            await turns(rng.randrange(3))
            if rng.random() < 0.1:
                gate.set()
        for _ in range(rng.randrange(6)):
            rng.choice(askers)[1].cancel()
            await turns(rng.randrange(3))
        gate.set()
        cloud.gate.set()
        results = await asyncio.gather(*(task for _, task in askers), return_exceptions=True)
        for (request, task), result in zip(askers, results, strict=True):
            if task.cancelled():
                continue
            for text, label in zip(request, labels(result), strict=True):
                assert label.removeprefix(b"cloud ") == text[:1]
        assert (len(service._flights), one.runner.waiting) == (0, 0)
        await one.runner.close()
        assert len(asyncio.all_tasks()) == 1

    run(scenario)


# Spend


def test_rows_that_share_an_answer_of_the_cloud_are_answered_each_and_asked_once():
    async def scenario():
        cloud = NamedCloud()
        cloud.gate.clear()
        service = service_of(named(), cloud)
        askers = [ask(service) for _ in range(4)]
        twice = asyncio.create_task(service.infer("named", None, rows_of(b"x@0.5", b"x@0.5")))
        await turns()
        cloud.gate.set()
        await asyncio.gather(*askers, twice)
        assert service.counters.outcomes == {("named", "cloud", "unsure"): 6}
        assert (len(cloud.asked), service.counters.coalesced) == (1, 5)

    run(scenario)
