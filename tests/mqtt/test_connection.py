"""Staying connected, by a scripted broker in virtual time: windows, epochs, reasons, back-off. No socket, no waiting."""

import asyncio

import pytest

from edge_runtime.core.backoff import Backoff
from edge_runtime.core.errors import TooLarge
from edge_runtime.mqtt.client import Broker
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost
from edge_runtime.mqtt.envelope import Message
from edge_runtime.mqtt.fake import FakeBroker, FakeClient
from tests.virtual_time import run_virtual, settle

STATE = "er/v1/home/c/state"
RSP = "er/v1/home/c/rsp"


class Rig:
    """A connection to a scripted broker, up when the block begins."""

    def __init__(self, *, wait=True, draw=lambda: 0.5, **options):
        self.server = FakeBroker(
            receive_maximum=options.pop("receive_maximum", None),
            max_packet_bytes=options.pop("max_packet_bytes", None),
        )
        self.got, self.losses = [], []
        self._wait = wait
        self.link = Connection(
            Broker("mqtt://nowhere", "c"),
            subscriptions=options.pop("subscriptions", (RSP,)),
            state_topic=STATE,
            on_message=self.got.append,
            on_lost=lambda: self.losses.append(asyncio.get_running_loop().time()),
            backoff=Backoff(base_s=0.5, cap_s=30.0),
            draw=draw,
            new_client=self.server.new_client,
            **options,
        )

    @property
    def client(self):
        return self.server.client

    async def __aenter__(self):
        self.link.start()
        if self._wait:
            assert await self.link.wait_connected(1)
        else:
            await settle()
        return self

    async def __aexit__(self, *_):
        await self.link.close()


def in_rig(scenario, **options):
    async def limited():
        async with Rig(**options) as rig:
            await scenario(rig)

    run_virtual(limited)


def task(coroutine):
    return asyncio.create_task(coroutine)


def test_it_subscribes_and_then_says_online():
    async def scenario(rig):
        assert rig.client.filters == [RSP]
        assert rig.client.published == [Message(STATE, b"online", retain=True)]
        assert rig.client.options.state_topic == STATE
        assert (rig.link.is_connected, rig.link.last_error, rig.link.connects) == (True, "", 1)

    in_rig(scenario)


def test_without_subscriptions_it_is_up_at_once():
    async def scenario(rig):
        assert rig.client.filters == []
        assert rig.link.is_connected

    in_rig(scenario, subscriptions=())


def test_it_is_not_up_before_its_subscriptions_are_granted():
    async def scenario():
        async with Rig(wait=False) as rig:
            rig.server.connect_code = None
            rig.server.lose()
            await asyncio.sleep(1)
            events = rig.client._events
            rig.client._soon = lambda report: None  # the broker never answers the SUBSCRIBE
            events.on_accepted(None, None)
            await settle()
            assert not rig.link.is_connected
            with pytest.raises(LinkLost):
                await rig.link.publish(Message(RSP, b"x"))

    run_virtual(scenario)


def test_what_comes_is_handed_on_and_acknowledged_by_hand():
    async def scenario(rig):
        packet_id = rig.client.deliver(Message(RSP, b"x"))
        await settle()
        (received,) = rig.got
        assert (received.message.payload, rig.client.acknowledged) == (b"x", [])
        rig.link.acknowledge(received)
        assert rig.client.acknowledged == [packet_id]

    in_rig(scenario)


def test_a_retained_message_is_acknowledged_and_not_handed_on():
    async def scenario(rig):
        packet_id = rig.client.deliver(Message(RSP, b"planted", retain=True))
        await settle()
        assert (rig.got, rig.client.acknowledged) == ([], [packet_id])

    in_rig(scenario)


def test_a_stale_acknowledgement_never_goes_to_the_new_connection():
    """The same packet id is another message there, which nobody has dealt with."""

    async def scenario(rig):
        first = rig.client.deliver(Message(RSP, b"of the first connection"))
        await settle()
        rig.server.lose()
        await settle()
        assert await rig.link.wait_connected(10)
        assert rig.client.deliver(Message(RSP, b"of the second")) == first
        await settle()
        stale, current = rig.got
        rig.link.acknowledge(stale)
        assert [client.acknowledged for client in rig.server.clients] == [[], []]
        rig.link.acknowledge(current)
        assert [client.acknowledged for client in rig.server.clients] == [[], [first]]

    in_rig(scenario)


def test_a_late_report_of_an_old_client_changes_nothing():
    async def scenario(rig):
        old = rig.client._events
        rig.server.lose()
        await settle()
        assert await rig.link.wait_connected(10)
        old.on_message(Message(RSP, b"late"), 7, 1)
        old.on_lost("late")
        await settle()
        assert rig.got == []
        assert rig.link.is_connected
        assert rig.link.last_error == ""

    in_rig(scenario)


def test_publishers_share_the_brokers_window_but_for_one_place():
    async def scenario(rig):
        rig.server.confirms = False
        tasks = [task(rig.link.publish(Message(RSP, b"%d" % i))) for i in range(4)]
        await settle()
        # Three places were announced; one is kept for the state message.
        assert [m.payload for m in rig.client.published[1:]] == [b"0", b"1"]
        rig.client.confirm(next(iter(rig.client.withheld)))
        await settle()
        assert [m.payload for m in rig.client.published[1:]] == [b"0", b"1", b"2"]
        rig.server.confirms = True
        for packet_id in list(rig.client.withheld):
            rig.client.confirm(packet_id)
        assert await asyncio.gather(*tasks) == [0, 0, 0, 0]

    in_rig(scenario, receive_maximum=3)


def test_our_own_window_holds_where_the_broker_announces_none():
    async def scenario(rig):
        rig.server.confirms = False
        tasks = [task(rig.link.publish(Message(RSP, b"%d" % i))) for i in range(4)]
        await settle()
        assert len(rig.client.published) == 1 + 2
        for one in tasks:
            one.cancel()

    in_rig(scenario, window=3)


def test_a_cancelled_publisher_keeps_its_place_until_the_puback():
    async def scenario(rig):
        rig.server.confirms = False
        first, second = task(rig.link.publish(Message(RSP, b"1"))), task(rig.link.publish(Message(RSP, b"2")))
        await settle()
        first.cancel()
        await settle()
        assert [m.payload for m in rig.client.published[1:]] == [b"1"]
        rig.client.confirm(next(iter(rig.client.withheld)))
        await settle()
        assert [m.payload for m in rig.client.published[1:]] == [b"1", b"2"]
        second.cancel()

    in_rig(scenario, receive_maximum=2)


def test_a_publisher_cancelled_in_the_queue_takes_no_place():
    async def scenario(rig):
        rig.server.confirms = False
        first, second, third = [task(rig.link.publish(Message(RSP, b"%d" % i))) for i in range(3)]
        await settle()
        second.cancel()
        await settle()
        rig.client.confirm(next(iter(rig.client.withheld)))
        await settle()
        assert [m.payload for m in rig.client.published[1:]] == [b"0", b"2"]
        assert await first == 0
        third.cancel()

    in_rig(scenario, receive_maximum=2)


def test_all_who_wait_for_a_lost_connection_learn_of_it_and_nothing_is_sent_on_the_next():
    async def scenario(rig):
        rig.server.confirms = False
        tasks = [task(rig.link.publish(Message(RSP, b"%d" % i))) for i in range(6)]
        await settle()
        rig.server.confirms = True
        rig.server.lose("connection lost")
        await settle()
        assert await rig.link.wait_connected(10)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [LinkLost] * 6
        assert "connection lost" in str(results[0])
        assert rig.client.published == [Message(STATE, b"online", retain=True)]
        assert await rig.link.publish(Message(RSP, b"new")) == 0

    in_rig(scenario, receive_maximum=3)


def test_the_brokers_reason_code_is_returned():
    async def scenario(rig):
        assert await rig.link.publish(Message("er/v1/home/nobody/rsp", b"x")) == NO_SUBSCRIBERS
        rig.server.publish_code = lambda message: 0x87
        assert await rig.link.publish(Message(RSP, b"x")) == 0x87

    in_rig(scenario)


def test_a_packet_above_the_limit_is_not_sent_and_takes_no_place():
    async def scenario(rig):
        for _ in range(3):
            with pytest.raises(TooLarge, match="accepts 2000"):
                await rig.link.publish(Message(RSP, b"x" * 1990))
        assert await rig.link.publish(Message(RSP, b"x" * 1900)) == 0

    in_rig(scenario, max_packet_bytes=2000, receive_maximum=2)


def test_a_socket_that_is_gone_gives_the_place_back():
    async def scenario(rig):
        rig.client.is_open = False
        for _ in range(3):
            with pytest.raises(LinkLost):
                await rig.link.publish(Message(RSP, b"x"))

    in_rig(scenario, receive_maximum=2)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"connect_code": 0x86}, "password"),
        ({"connect_code": 0x85}, "client id"),
        (
            {"subscribe_code": lambda topic: 0x87},
            f"refused the subscription to {RSP}: the broker does not authorise",
        ),
        ({"unreachable": "no route"}, "connecting failed: no route"),
        ({"connect_code": None}, "does not answer"),
    ],
)
def test_why_there_is_no_connection_is_told_in_words(script, words):
    async def scenario():
        rig = Rig()
        for name, value in script.items():
            setattr(rig.server, name, value)
        rig.link.start()
        assert not await rig.link.wait_connected(6)
        assert words in rig.link.last_error
        assert not rig.link.is_connected
        await rig.link.close()

    run_virtual(scenario)


def attempts(script, seconds):
    """How often a connection with the longest possible back-off tries in `seconds`."""
    tried = []

    async def scenario():
        rig = Rig(draw=lambda: 0.999)
        for name, value in script.items():
            setattr(rig.server, name, value)
        rig.link.start()
        await asyncio.sleep(seconds)
        tried.append(len(rig.server.clients))
        await rig.link.close()

    run_virtual(scenario)
    return tried[0]


def test_where_a_person_must_act_it_tries_seldom_and_else_by_the_length_of_the_outage():
    assert (
        attempts({"connect_code": 0x88}, 10) == 12
    )  # each 0.5 s for 2 s, then after a quarter of the outage
    assert attempts({"unreachable": "refused"}, 100) == 22
    assert attempts({"connect_code": 0x86}, 10) == 1  # after 30 s, the cap


@pytest.mark.parametrize("out_s", [0.3, 2.0, 10.0])
def test_after_a_short_outage_it_is_back_within_three_seconds(out_s):
    """Whatever the draws of the back-off are, and however often it tried."""

    async def scenario():
        for draw in (0.05, 0.3, 0.999):
            async with Rig(draw=lambda draw=draw: draw) as rig:
                await asyncio.sleep(60)
                rig.server.unreachable = "connection refused"
                rig.server.lose()
                await asyncio.sleep(out_s)
                rig.server.unreachable = ""
                assert await rig.link.wait_connected(max(0.5, out_s / 4) + 0.01)

    run_virtual(scenario)


def test_a_silent_broker_is_given_up():
    async def scenario(rig):
        rig.client.is_alive = False
        await asyncio.sleep(1.1)
        assert "silent" in rig.link.last_error
        assert not rig.link.is_connected
        assert await rig.link.wait_connected(10)
        assert rig.link.connects == 2

    in_rig(scenario)


def test_the_first_reason_is_kept():
    async def scenario(rig):
        rig.client._events.on_disconnected(0x8B)
        rig.client._events.on_lost("connection lost")
        assert "shutting down" in rig.link.last_error

    in_rig(scenario)


def test_each_connection_that_ends_is_reported_once():
    async def scenario(rig):
        for n in range(1, 4):
            rig.server.lose()
            rig.server.lose()
            await settle()
            assert len(rig.losses) == n
            assert await rig.link.wait_connected(60)

    in_rig(scenario)


def test_a_stable_connection_resets_the_back_off_and_short_ones_name_the_likely_cause():
    async def scenario(rig):
        for _ in range(5):
            await asyncio.sleep(60)
            rig.server.lose()
            await settle()
            assert "same client id" not in rig.link.last_error
            assert await rig.link.wait_connected(0.3)  # the first delay, half of 0.5 s
        began_s = asyncio.get_running_loop().time()
        for _ in range(40):
            rig.server.lose()
            await settle()
            lost = rig.link.last_error
            assert await rig.link.wait_connected(60)
        assert "same client id" in lost
        assert asyncio.get_running_loop().time() - began_s > 60  # not in a tight loop

    in_rig(scenario)


def test_unsubscribing_waits_for_the_broker_but_not_for_ever():
    async def scenario(rig):
        await rig.link.unsubscribe()
        assert rig.client.filters == []
        rig.client._soon = lambda report: None
        began_s = asyncio.get_running_loop().time()
        await rig.link.unsubscribe(timeout_s=2.0)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(2.0)

    in_rig(scenario)


def test_closing_says_offline_and_disconnects_once():
    async def scenario(rig):
        await rig.link.close()
        await rig.link.close()
        assert rig.client.published[-1] == Message(STATE, b"offline", retain=True)
        assert rig.client.is_disconnected
        assert not rig.client.is_open
        assert not rig.link.is_connected
        await asyncio.sleep(100)
        assert len(rig.server.clients) == 1

    in_rig(scenario)


def test_closing_does_not_wait_long_for_a_broker_that_confirms_nothing():
    async def scenario(rig):
        rig.server.confirms = False
        began_s = asyncio.get_running_loop().time()
        await rig.link.close()
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(1.0)
        assert rig.client.is_disconnected

    in_rig(scenario)


def test_a_publisher_still_waiting_when_the_connection_is_closed_is_freed():
    async def scenario(rig):
        rig.server.confirms = False
        waiting = task(rig.link.publish(Message(RSP, b"x")))
        await settle()
        await rig.link.close()
        with pytest.raises(LinkLost):
            await waiting

    in_rig(scenario)


def test_closing_while_it_backs_off_is_quick():
    async def scenario():
        rig = Rig()
        rig.server.unreachable = "no route"
        rig.link.start()
        await asyncio.sleep(30)
        began_s = asyncio.get_running_loop().time()
        await rig.link.close()
        assert asyncio.get_running_loop().time() == began_s

    run_virtual(scenario)


def test_a_missing_confirmation_ends_the_connection_and_its_window_comes_back():
    """The broker drops the PUBACKs of a stall and is well again: without an end the places are gone for good."""

    async def scenario(rig):
        rig.server.confirms = False
        lost = [task(rig.link.publish(Message(RSP, b"%d" % i))) for i in range(2)]
        await settle()
        rig.server.confirms = True
        blocked = task(rig.link.publish(Message(RSP, b"waits for a place")))
        await asyncio.sleep(4)
        assert not blocked.done()
        await asyncio.sleep(3)
        assert "did not confirm" in (await asyncio.gather(*lost, return_exceptions=True))[0].args[0]
        with pytest.raises(LinkLost):
            await blocked
        assert await rig.link.wait_connected(10)
        assert await asyncio.gather(*(rig.link.publish(Message(RSP, b"x")) for _ in range(9))) == [0] * 9

    in_rig(scenario, receive_maximum=3)


def test_confirmations_that_come_in_time_never_end_it():
    async def scenario(rig):
        rig.server.confirms = False
        for _ in range(20):
            waiting = task(rig.link.publish(Message(RSP, b"x")))
            await asyncio.sleep(4.5)
            rig.client.confirm(next(iter(rig.client.withheld.keys() - {1})))
            assert await waiting == 0
        assert rig.link.connects == 1

    in_rig(scenario)


def test_large_messages_have_the_time_of_a_slow_link():
    async def scenario(rig):
        rig.server.confirms = False
        waiting = task(rig.link.publish(Message(RSP, bytes(100_000))))
        await asyncio.sleep(15)
        assert rig.link.connects == 1
        await asyncio.sleep(5)
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], LinkLost)

    in_rig(scenario)


def test_what_was_confirmed_is_no_longer_on_its_way():
    async def scenario(rig):
        for _ in range(20):
            await rig.link.publish(Message(RSP, bytes(100_000)))
        rig.server.confirms = False
        waiting = task(rig.link.publish(Message(RSP, b"small")))
        await asyncio.sleep(7)
        assert waiting.done()
        assert isinstance(waiting.exception(), LinkLost)

    in_rig(scenario)


def test_time_in_which_this_process_did_not_run_is_not_the_brokers():
    async def scenario(rig):
        rig.server.confirms = False
        waiting = task(rig.link.publish(Message(RSP, b"x")))
        await asyncio.sleep(1.5)
        asyncio.get_running_loop().now_s += 3600  # suspended; the PUBACK waits in the socket
        await asyncio.sleep(1.5)
        assert rig.link.is_connected
        for packet_id in list(rig.client.withheld):
            rig.client.confirm(packet_id)
        assert await waiting == 0

    in_rig(scenario)


def test_each_connection_that_comes_up_is_reported():
    async def scenario(rig):
        ups = []
        rig.link._report_up = lambda: ups.append(rig.link.is_connected)
        for _ in range(3):
            rig.server.lose()
            await settle()
            assert await rig.link.wait_connected(60)
        assert ups == [True, True, True]

    in_rig(scenario)


def test_a_further_subscription_returns_its_code_and_harms_nothing():
    async def scenario(rig):
        assert await rig.link.subscribe("a/b") == 1
        assert rig.client.filters == [RSP, "a/b"]
        rig.server.subscribe_code = lambda topic: 0x87
        assert await rig.link.subscribe("c") == 0x87
        assert rig.link.is_connected
        rig.client._soon = lambda report: None  # the broker does not answer
        waiting = task(rig.link.subscribe("d"))
        await settle()
        rig.client._events.on_lost("connection lost")
        with pytest.raises(LinkLost):
            await waiting

    in_rig(scenario)


@pytest.mark.parametrize("turns", range(6))
def test_a_cancelled_close_leaves_nothing_running(turns):
    """Cancelled at each of its turns of the event loop, while the broker keeps the confirmation of "offline" back."""

    async def scenario():
        rig = Rig()
        await rig.__aenter__()
        rig.server.confirms = False
        closing = task(rig.link.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await settle()
        running = {t.get_name() for t in asyncio.all_tasks()}
        if turns > 0:  # cancelled before its first turn, a task has done nothing
            assert "mqtt-connection" not in running
            assert (rig.client.is_open, rig.client.is_disconnected, rig.link.is_connected) == (
                False,
                True,
                False,
            )
        await rig.link.close()
        assert "mqtt-connection" not in {t.get_name() for t in asyncio.all_tasks()}

    run_virtual(scenario)


def test_closing_twice_at_once_is_closing_once():
    async def scenario(rig):
        await asyncio.gather(rig.link.close(), rig.link.close())
        assert rig.client.is_disconnected
        assert "mqtt-connection" not in {t.get_name() for t in asyncio.all_tasks()}

    in_rig(scenario)


def test_an_attempt_to_connect_that_hangs_ends_with_the_close():
    async def scenario():
        rig = Rig()

        async def hang(client):
            await asyncio.get_running_loop().create_future()

        original = FakeClient.open
        FakeClient.open = hang
        try:
            rig.link.start()
            await settle()
            began_s = asyncio.get_running_loop().time()
            await rig.link.close()
            assert asyncio.get_running_loop().time() == began_s
        finally:
            FakeClient.open = original

    run_virtual(scenario)
