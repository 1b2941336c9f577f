"""Requests of many rows: one run, one reply; equal rows, flights of others, failures and cancels among them."""

import asyncio
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.core.errors import EngineFailed, InvalidRequest, RefusalKind, Refused
from edge_runtime.core.protocol import oip
from edge_runtime.core.scheduling.scheduler import QueueLimits
from edge_runtime.engines.fake import FakeEngine
from tests.serving.fakes import Disk, NamedCloud, labels, named, rows_of, run, service_of, turns, until


def computed(one):
    """Rows that the model ran."""
    return sum(rows * often for rows, often in one.runner.statistics.batch_sizes.items())


def test_the_rows_of_a_request_are_run_as_one_without_a_task_for_each():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=64, gate=gate))
        service = service_of(one)
        texts = [b"row%d@0.9" % i for i in range(32)]
        before = len(asyncio.all_tasks())
        asked = asyncio.create_task(service.infer("named", None, rows_of(*texts)))
        await until(lambda: one.runner.waiting == 0 and len(one.processor.prepared) == 32)
        assert len(asyncio.all_tasks()) - before <= 2, "the caller's, and none for each row"
        gate.set()
        reply = await asked
        assert labels(reply) == [b"row%d" % i for i in range(32)]
        assert one.runner.statistics.batch_sizes == {32: 1}
        await one.runner.close()

    run(scenario)


def test_rows_that_are_sure_unsure_cached_and_equal_come_back_in_their_places():
    async def scenario():
        cloud = NamedCloud()
        one = named()
        service = service_of(one, cloud)
        await service.infer("named", None, rows_of(b"known@0.9"))
        texts = (b"a@0.9", b"b@0.1", b"known@0.9", b"a@0.9", b"b@0.1", b"c@0.9")
        reply = await service.infer("named", None, rows_of(*texts))
        assert labels(reply) == [b"a", b"cloud b", b"known", b"a", b"cloud b", b"c"]
        assert reply.parameters["origin"] == "local,cloud,cache,local,cloud,local"
        assert (cloud.asked, computed(one), service.counters.coalesced) == ([b"b@0.1"], 4, 2)
        again = await service.infer("named", None, rows_of(*texts))
        assert again.parameters["origin"] == "cache"
        assert labels(again) == labels(reply)

    run(scenario)


def test_without_a_cache_equal_rows_are_computed_each():
    async def scenario():
        one = named()
        reply = await service_of(one, cache=False).infer("named", None, rows_of(b"a@0.9", b"a@0.9"))
        assert (labels(reply), computed(one)) == ([b"a", b"a"], 2)

    run(scenario)


def test_a_follower_of_an_early_row_does_not_wait_for_the_late_ones():
    async def scenario():
        early, late = threading.Event(), threading.Event()

        def answer(row):
            assert (late if row[0][0] < 0.9 else early).wait(15)
            return row

        one = named(FakeEngine(answer, max_batch=1), is_inline=False)
        service = service_of(one)
        leader = asyncio.create_task(service.infer("named", None, rows_of(b"early@0.95", b"late@0.85")))
        await turns(3)
        follower = asyncio.create_task(service.infer("named", None, rows_of(b"early@0.95")))
        await turns(3)
        early.set()
        assert labels(await follower) == [b"early"]
        assert not leader.done()
        assert (service.counters.coalesced, len(service._flights)) == (1, 1)
        late.set()
        assert labels(await leader) == [b"early", b"late"]
        await one.runner.close()

    run(scenario)


def test_rows_in_the_cloud_do_not_hold_up_those_that_are_done_here():
    async def scenario():
        cloud = NamedCloud()
        cloud.gate.clear()
        service = service_of(named(), cloud)
        leader = asyncio.create_task(service.infer("named", None, rows_of(b"sure@0.9", b"unsure@0.1")))
        await turns()
        assert (await service.infer("named", None, rows_of(b"sure@0.9"))).parameters["origin"] == "cache"
        assert not leader.done()
        cloud.gate.set()
        assert labels(await leader) == [b"sure", b"cloud unsure"]

    run(scenario)


def test_the_first_failing_row_ends_the_request_and_lets_go_of_the_others():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, fail_on=(1,), gate=gate))
        service = service_of(one)
        texts = [b"row%d@0.9" % i for i in range(5)]
        asked = asyncio.create_task(service.infer("named", None, rows_of(*texts)))
        await turns()
        followers = [asyncio.create_task(service.infer("named", None, rows_of(text))) for text in texts]
        await turns()
        gate.set()
        with pytest.raises(EngineFailed):
            await asked
        results = await asyncio.gather(*followers, return_exceptions=True)
        assert isinstance(results[0], EngineFailed), "its own row failed, in the leader's flight"
        assert [labels(result) for result in results[1:]] == [[b"row%d" % i] for i in range(1, 5)]
        assert computed(one) <= 5, "at most one of the leader's other rows had begun"
        assert (len(service._flights), one.runner.waiting) == (0, 0)
        await one.runner.close()

    run(scenario)


def test_a_row_without_room_ends_the_request_at_once_and_its_rows_leave_the_queue():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 3))
        service = service_of(one)
        busy = asyncio.create_task(service.infer("named", None, rows_of(b"busy@0.9")))
        await until(lambda: one.runner.waiting == 0 and len(one.processor.prepared) == 1)
        with pytest.raises(Refused) as refused:
            await service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(6)]))
        assert refused.value.kind is RefusalKind.FULL
        assert (one.runner.waiting, len(service._flights)) == (0, 1)
        gate.set()
        await busy
        await one.runner.close()

    run(scenario)


def test_rows_without_room_are_spilled_and_the_others_stay():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 3))
        cloud = NamedCloud()
        service = service_of(one, cloud)
        busy = asyncio.create_task(service.infer("named", None, rows_of(b"busy@0.9")))
        await until(lambda: one.runner.waiting == 0 and len(one.processor.prepared) == 1)
        asked = asyncio.create_task(
            service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(5)]))
        )
        await until(lambda: len(cloud.asked) == 2)
        gate.set()
        reply = await asked
        assert labels(reply) == [b"row0", b"row1", b"row2", b"cloud row3", b"cloud row4"]
        assert reply.parameters["reason"] == "confident,confident,confident,overloaded,overloaded"
        await busy
        await one.runner.close()

    run(scenario)


def test_a_defect_in_a_decision_ends_its_request_and_not_the_runner():
    async def scenario():
        class Defective(NamedCloud):
            def link_state(self, model):
                raise ZeroDivisionError

        one = named()
        service = service_of(one, Defective())
        with pytest.raises(ZeroDivisionError):
            await service.infer("named", None, rows_of(b"a@0.1", b"b@0.1"))
        assert len(service._flights) == 0
        assert labels(await service_of(one).infer("named", None, rows_of(b"a@0.1", b"c@0.9"))) == [b"a", b"c"]

    run(scenario)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_cancelled_every_other_request_gets_each_row_right(seed):
    """Requests of one to six rows with equal rows among and inside them; some are cancelled, some rows escalate."""

    async def scenario():
        rng = random.Random(seed)
        cloud = NamedCloud()
        cloud.gate.clear()
        one = named(FakeEngine(max_batch=rng.choice((1, 2, 8))), is_inline=rng.random() < 0.7)
        service = service_of(one, cloud)
        texts = [b"a@0.9", b"b@0.1", b"c@0.9", b"d@0.2", b"e@0.9"]
        wanted = {text: (b"cloud " if b"@0.9" not in text else b"") + text[:1] for text in texts}
        requests = [[rng.choice(texts) for _ in range(rng.randrange(1, 7))] for _ in range(12)]
        askers = []
        for request in requests:
            askers.append(asyncio.create_task(service.infer("named", None, rows_of(*request))))
            await turns(rng.randrange(3))
        cancelled = set()
        for _ in range(rng.randrange(1, 9)):
            await turns(rng.randrange(4))
            victim = rng.randrange(len(askers))
            if not askers[victim].done():
                cancelled.add(victim)
                askers[victim].cancel()
        cloud.gate.set()
        results = await asyncio.gather(*askers, return_exceptions=True)
        for i, (request, result) in enumerate(zip(requests, results, strict=True)):
            if i in cancelled:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert labels(result) == [wanted[text] for text in request]
        assert len(service._flights) == 0
        assert one.runner.waiting == 0
        await one.runner.close()
        assert {task.get_name() for task in asyncio.all_tasks() if "row" in task.get_name()} == set()

    run(scenario)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_the_rows_of_others_are_answered_or_fail_for_their_own_sake(seed):
    """A model that fails on some batches: a request fails only by a row of its own, and nothing is left behind."""

    async def scenario():
        rng = random.Random(seed)
        engine = FakeEngine(max_batch=1, fail_on=sorted(rng.sample(range(1, 12), 4)))
        one = named(engine)
        service = service_of(one)
        requests = [
            [b"%c@0.9" % rng.choice(b"abcdef") for _ in range(rng.randrange(1, 5))] for _ in range(10)
        ]
        askers = [
            asyncio.create_task(service.infer("named", None, rows_of(*request))) for request in requests
        ]
        results = await asyncio.gather(*askers, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, EngineFailed):
                assert labels(result) == [text[:1] for text in request]
        assert any(isinstance(result, EngineFailed) for result in results)
        assert (len(service._flights), one.runner.waiting) == (0, 0)
        while len(engine.batch_sizes) < 12:  # past the last failure
            await asyncio.gather(
                service.infer("named", None, rows_of(b"%d@0.9" % len(engine.batch_sizes))),
                return_exceptions=True,
            )
        again = await service.infer("named", None, rows_of(*[b"%c@0.9" % c for c in b"abcdef"]))
        assert labels(again) == [b"%c" % c for c in b"abcdef"]

    run(scenario)


def test_where_the_disk_is_read_first_each_row_goes_its_own_way():
    async def scenario():
        disk, cloud = Disk(), NamedCloud()
        await service_of(named(row_ns=10**9), cloud, disk).infer("named", None, rows_of(b"a@0.9", b"b@0.1"))
        assert len(disk.kept) == 2
        one = named(row_ns=10**9)
        service = service_of(one, cloud, disk)
        disk.asked = 0
        reply = await service.infer("named", None, rows_of(b"a@0.9", b"b@0.1", b"new@0.9", b"new@0.1"))
        assert labels(reply) == [b"a", b"cloud b", b"new", b"cloud new"]
        assert reply.parameters["origin"] == "cache,cache,local,cloud"
        assert disk.asked == 4, "each row once, also before the cloud"
        assert (computed(one), len(service._flights)) == (2, 0)

    run(scenario)


# A threshold that moves


def test_a_moving_threshold_neither_empties_the_cache_nor_churns_the_memo():
    async def scenario():
        one, cloud = named(threshold=0.8), NamedCloud()
        service = service_of(one, cloud)
        texts = [b"row%d@%.2f" % (i, i / 10 + 0.05) for i in range(10)]
        await service.infer("named", None, rows_of(*texts))
        entries, ran, asked = len(service.cache.memory), computed(one), list(cloud.asked)
        assert (entries, ran, len(asked)) == (10, 10, 8)
        (prefix,) = service._prefixes.values()
        for threshold in (0.5, 0.1, 0.79, 0.8, 0.0):
            info = replace(one.info, accept_threshold=threshold)
            service.replace_model(replace(one, info=info))
            reply = await service.infer("named", None, rows_of(*texts))
            assert reply.parameters["origin"] == "cache"
        assert (len(service.cache.memory), computed(one), cloud.asked) == (entries, ran, asked)
        assert list(service._prefixes.values()) == [prefix]
        # Above what was kept as sure: those two are escalated now, and the model does not run again.
        service.replace_model(replace(one, info=replace(one.info, accept_threshold=0.99)))
        reply = await service.infer("named", None, rows_of(*texts))
        assert labels(reply)[8:] == [b"cloud row8", b"cloud row9"]
        assert (len(service.cache.memory), computed(one), len(cloud.asked)) == (entries, ran, 10)
        reply = await service.infer("named", None, rows_of(*texts))
        assert (reply.parameters["origin"], reply.parameters["reason"]) == ("cache", "unsure")

    run(scenario)


def test_a_cached_answer_that_is_escalated_is_in_flight_for_others():
    async def scenario():
        one, cloud = named(threshold=0.5), NamedCloud()
        service = service_of(one, cloud)
        await service.infer("named", None, rows_of(b"a@0.7"))
        service.replace_model(replace(one, info=replace(one.info, accept_threshold=0.9)))
        cloud.gate.clear()
        askers = [asyncio.create_task(service.infer("named", None, rows_of(b"a@0.7"))) for _ in range(3)]
        await turns()
        assert (cloud.asked, service.counters.coalesced, len(service._flights)) == ([b"a@0.7"], 2, 1)
        askers[0].cancel()
        await turns()
        cloud.gate.set()
        results = await asyncio.gather(*askers, return_exceptions=True)
        assert [labels(result) for result in results[1:]] == [[b"cloud a"]] * 2
        assert (len(cloud.asked), computed(one)) == (2, 1)

    run(scenario)


def test_a_cached_answer_is_degraded_while_the_cloud_it_now_wants_is_away_and_stays_kept():
    async def scenario():
        one, cloud = named(threshold=0.5), NamedCloud()
        service = service_of(one, cloud)
        await service.infer("named", None, rows_of(b"a@0.7"))
        service.replace_model(replace(one, info=replace(one.info, accept_threshold=0.9)))
        cloud.is_connected = False
        for _ in range(2):
            reply = await service.infer("named", None, rows_of(b"a@0.7"))
            assert (reply.parameters["origin"], reply.parameters["reason"]) == ("cache", "link_down")
            assert reply.parameters["degraded"] is True
        service.replace_model(one)
        reply = await service.infer("named", None, rows_of(b"a@0.7"))
        assert (reply.parameters["origin"], reply.parameters["reason"]) == ("cache", "confident")
        assert computed(one) == 1

    run(scenario)


def test_where_answers_are_fused_an_escalated_hit_runs_the_model_for_its_scores():
    async def scenario():
        one, cloud = named(threshold=0.5, fusion_version="1"), NamedCloud()
        service = service_of(one, cloud)
        await service.infer("named", None, rows_of(b"a@0.7"))
        service.replace_model(replace(one, info=replace(one.info, accept_threshold=0.9)))
        reply = await service.infer("named", None, rows_of(b"a@0.7"))
        assert labels(reply) == [b"fused a cloud a"]
        assert computed(one) == 2

    run(scenario)


def test_private_rows_never_share_a_flight_or_an_answer_with_others():
    async def scenario():
        cloud = NamedCloud()
        service = service_of(named(), cloud)
        private = service.infer("named", None, rows_of(b"a@0.1", b"b@0.9", private=True))
        public = service.infer("named", None, rows_of(b"a@0.1", b"b@0.9"))
        private, public = await asyncio.gather(private, public)
        assert (labels(private), labels(public)) == ([b"a", b"b"], [b"cloud a", b"b"])
        assert cloud.asked == [b"a@0.1"]
        assert private.parameters["reason"] == "private,confident"

    run(scenario)


def test_embeddings_of_many_rows_are_stacked_in_order():
    """One row is stacked without numpy's stack: shape and type must be the same."""

    async def scenario():
        service = service_of(named())
        for count in (1, 3):
            reply = await service.infer("named", None, rows_of(*[b"r%d@0.9" % i for i in range(count)]))
            confidence = reply.outputs[1]
            assert (confidence.datatype, confidence.shape) == ("FP32", (count,))
            assert confidence.data.dtype == np.float32
            assert confidence.data.shape == (count,)

    run(scenario)


def test_parameters_that_callers_make_up_fill_the_memo_of_key_prefixes_to_its_bound_only():
    async def scenario():
        service = service_of(named())
        for i in range(300):
            await service.infer("named", None, rows_of(b"a@0.9", made_up=i))
        assert len(service._prefixes) <= 256

    run(scenario)


@pytest.mark.parametrize("name", ["private", "cache"])
@pytest.mark.parametrize("value", ["true", 1, 0.0])
def test_a_flag_that_is_neither_true_nor_false_is_refused(name, value):
    async def scenario():
        with pytest.raises(InvalidRequest, match=f"Parameter {name} must be true or false"):
            await service_of(named()).infer("named", None, rows_of(b"a@0.9", **{name: value}))

    run(scenario)


@pytest.mark.parametrize(("is_authenticated", "asked"), [(True, 1), (False, 2)])
def test_an_answer_that_anybody_could_have_sent_is_not_kept(is_authenticated, asked):
    async def scenario():
        cloud = NamedCloud()
        cloud.is_authenticated = is_authenticated
        service = service_of(named(), cloud)
        for _ in range(2):
            assert labels(await service.infer("named", None, rows_of(b"x@0.1"))) == [b"cloud x"]
        assert len(cloud.asked) == asked

    run(scenario)


def test_two_hundred_rows_that_differ_in_reason_are_told_within_what_a_reader_accepts():
    async def scenario():
        service = service_of(named(FakeEngine(max_batch=64)), NamedCloud())
        texts = [b"row%d@%s" % (i, b"0.9" if i % 2 else b"0.1") for i in range(200)]
        reply = await service.infer("named", None, rows_of(*texts))
        assert reply.parameters["reason"] == "mixed"
        assert reply.parameters["reason_counts"] == "unsure=100,confident=100"
        assert reply.parameters["origin_counts"] == "cloud=100,local=100"
        body, json_length = oip.encode_reply(reply)
        assert oip.decode_reply(body, json_length).parameters == reply.parameters

    run(scenario)


def test_of_several_errors_in_one_turn_the_first_is_that_of_the_request():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=1, gate=gate), limits=QueueLimits(1, 1))
        service = service_of(one)
        busy = asyncio.create_task(service.infer("named", None, rows_of(b"busy@0.9")))
        await until(lambda: one.runner.waiting == 0 and len(one.processor.prepared) == 1)
        with pytest.raises(Refused):  # the second row has no room, the third cannot be prepared
            await service.infer("named", None, rows_of(b"a@0.9", b"b@0.9", b"c@no number"))
        with pytest.raises(EngineFailed):
            await service.infer("named", None, rows_of(b"c@no number", b"a@0.9", b"b@0.9"))
        gate.set()
        await busy
        await one.runner.close()

    run(scenario)


def test_equal_rows_of_a_request_need_no_task_each():
    async def scenario():
        gate = threading.Event()
        one = named(FakeEngine(max_batch=64, gate=gate))
        service = service_of(one)
        before = len(asyncio.all_tasks())
        asked = asyncio.create_task(service.infer("named", None, rows_of(*[b"same@0.9"] * 32)))
        await until(lambda: one.runner.waiting == 0 and one.processor.prepared)
        assert len(asyncio.all_tasks()) - before <= 2
        gate.set()
        assert labels(await asked) == [b"same"] * 32
        assert (computed(one), service.counters.coalesced) == (1, 31)
        await one.runner.close()

    run(scenario)


def test_others_have_turns_while_the_keys_of_many_long_rows_are_made():
    async def scenario():
        one = named(FakeEngine(max_batch=64))
        turns_at = []

        def canonical(question):
            until_ns = time.monotonic_ns() + 1_000_000
            while time.monotonic_ns() < until_ns:
                pass
            turns_at.append(ticks)
            return question

        one.processor.canonical = canonical
        ticks, service = 0, service_of(one)
        asked = asyncio.create_task(
            service.infer("named", None, rows_of(*[b"row%d@0.9" % i for i in range(30)]))
        )
        while not asked.done():
            await asyncio.sleep(0)
            ticks += 1
        assert labels(asked.result()) == [b"row%d" % i for i in range(30)]
        assert len(set(turns_at)) >= 8, "30 ms of work, two at a time"

    run(scenario)
