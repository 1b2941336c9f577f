"""paho on asyncio against a real broker: limits, words for failures, clean ends, both event loops, TLS."""

import asyncio
import gc
import ssl

import pytest
import trustme
import uvloop

from edge_runtime.core.backoff import Backoff
from edge_runtime.core.errors import TooLarge
from edge_runtime.mqtt.client import Broker
from edge_runtime.mqtt.connection import NO_SUBSCRIBERS, Connection, LinkLost
from edge_runtime.mqtt.envelope import Message
from tests.conftest import free_port
from tests.uplink.test_escalation import Listener, run, until

STATE = "er/v1/home/c/state"


def connection(url, on_message=lambda received: None, **more):
    return Connection(
        Broker(url, "c"),
        subscriptions=("er/v1/home/c/rsp",),
        state_topic=STATE,
        on_message=on_message,
        backoff=Backoff(base_s=0.02, cap_s=0.1),
        **more,
    )


def said(broker, topic):
    """What is retained on a topic, read by a stock client."""

    async def read():
        process = await asyncio.create_subprocess_exec(
            *("mosquitto_sub", "-V", "5", "-p", str(broker.port), "-t", topic, "-C", "1", "-W", "5"),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        return out.strip()

    return read()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_publishes_receives_and_says_goodbye_on_both_loops(broker, new_loop):
    async def scenario():
        got = asyncio.Queue()
        link = connection(broker.url, got.put_nowait)
        link.start()
        assert await link.wait_connected(10)
        assert await said(broker, STATE) == b"online"
        assert await link.publish(Message("er/v1/home/c/rsp", b"x" * 50_000)) == 0
        received = await got.get()
        assert received.message.payload == b"x" * 50_000
        link.acknowledge(received)
        assert await link.publish(Message("er/v1/home/nobody/rsp", b"x")) == NO_SUBSCRIBERS
        await link.close()
        assert await said(broker, STATE) == b"offline"
        async with Listener(broker) as other:  # a session kept behind would still count as a subscriber
            assert await other.connection.publish(Message("er/v1/home/c/rsp", b"x")) == NO_SUBSCRIBERS

    async def limited():
        async with asyncio.timeout(30):
            await scenario()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(limited())


def test_a_packet_above_the_brokers_limit_never_leaves(broker):
    broker.restart("max_packet_size 2000")

    async def scenario():
        link = connection(broker.url)
        link.start()
        assert await link.wait_connected(10)
        with pytest.raises(TooLarge):
            await link.publish(Message("er/v1/home/x/rsp", b"x" * 1990))
        assert await link.publish(Message("er/v1/home/x/rsp", b"x" * 1900)) == NO_SUBSCRIBERS
        assert link.connects == 1
        await link.close()

    run(scenario)


def test_every_publish_of_a_burst_is_confirmed_with_a_window_of_one(broker):
    broker.restart("max_inflight_messages 1")

    async def scenario():
        got = []
        link = connection(broker.url, got.append)
        link.start()
        assert await link.wait_connected(10)
        burst = [link.publish(Message("er/v1/home/x/rsp", b"%d" % i)) for i in range(200)]
        assert set(await asyncio.gather(*burst)) == {NO_SUBSCRIBERS}
        await link.close()

    run(scenario)


def test_nobody_at_the_address_is_said_in_words_and_mended_by_a_start(broker):
    broker.stop()

    async def scenario():
        link = connection(broker.url)
        link.start()
        await until(lambda: "refused" in link.last_error)
        with pytest.raises(LinkLost):
            await link.publish(Message("er/v1/home/x/rsp", b"x"))
        broker.start()
        assert await link.wait_connected(10)
        await link.close()

    run(scenario)


def test_a_broker_that_wants_a_password_is_understood(broker):
    broker.restart(allow_anonymous=False)

    async def scenario():
        link = connection(broker.url)
        link.start()
        await until(lambda: "authoris" in link.last_error or "password" in link.last_error)
        assert not link.is_connected
        await link.close()

    run(scenario)


def test_a_port_that_says_nothing_is_given_up():
    async def scenario():
        held = []
        server = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
        link = connection(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}", connect_s=0.05)
        link.start()
        await until(lambda: "does not answer" in link.last_error)
        await link.close()
        for writer in held:
            writer.close()
        server.close()

    run(scenario)


def test_garbage_from_the_broker_is_survived():
    async def scenario():
        async def talk(_, writer):
            writer.write(b"\x20\xff\xff\xff\xff\xff garbage")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        link = connection(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        link.start()
        await until(lambda: link.last_error not in ("", "not connected yet"))
        assert not link.is_connected
        await link.close()
        server.close()

    run(scenario)


def test_closing_before_anything_answered_is_quick():
    async def scenario():
        link = connection(f"mqtt://127.0.0.1:{free_port()}")
        link.start()
        await link.close()
        await link.close()

    run(scenario)


def test_a_packet_that_paho_refuses_ends_that_connection_alone(broker):
    """The broker accepts U+FEFF in a property and paho does not."""

    async def scenario():
        got = asyncio.Queue()
        link = connection(broker.url, got.put_nowait)
        link.start()
        assert await link.wait_connected(10)
        async with Listener(broker) as other:
            await other.connection.publish(Message("er/v1/home/c/rsp", b"x", user=(("\ufeff", "x"),)))
            await until(lambda: link.connects == 2)
            await other.connection.publish(Message("er/v1/home/c/rsp", b"good"))
            assert (await got.get()).message.payload == b"good"
        await link.close()

    run(scenario)


CONNACK, SUBACK = b"\x20\x03\x00\x00\x00", b"\x90\x04\x00\x01\x00\x01"


def scripted(packets):
    """A server that accepts one connection and its subscription, and then sends `packets`."""

    async def talk(reader, writer):
        await reader.readuntil(b"offline")  # the end of our CONNECT, its will
        writer.write(CONNACK)
        await reader.readuntil(b"er/v1/home/c/rsp")  # of our SUBSCRIBE
        writer.write(SUBACK + packets)
        await reader.read()
        writer.close()

    return talk


def test_a_packet_at_which_paho_raises_does_not_end_the_event_loop(caplog):
    """A topic that is no UTF-8; brokers refuse it, a hostile one may send it."""

    async def scenario():
        server = await asyncio.start_server(scripted(b"\x30\x05\x00\x01\xff\x00x"), "127.0.0.1", 0)
        link = connection(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        link.start()
        await until(lambda: link.connects >= 2)
        await link.close()
        server.close()

    run(scenario)
    assert "what could not be read (UnicodeDecodeError)" in caplog.text
    assert "Exception in callback" not in caplog.text


def test_several_packets_in_one_tls_record_are_all_read(tmp_path):
    """Nothing comes after the record, so no selector would wake for what is left of it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    publishes = [b"\x30\x05\x00\x01t\x00%d" % i for i in range(5)]

    async def scenario():
        got = asyncio.Queue()
        server = await asyncio.start_server(scripted(b"".join(publishes)), "127.0.0.1", 0, ssl=context)
        url = f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        link = Connection(
            Broker(url, "c", ca_file=str(tmp_path / "ca.pem")),
            subscriptions=("er/v1/home/c/rsp",),
            state_topic=STATE,
            on_message=got.put_nowait,
        )
        link.start()
        assert await link.wait_connected(10)
        async with asyncio.timeout(3):
            assert [(await got.get()).message.payload for _ in publishes] == [b"0", b"1", b"2", b"3", b"4"]
        await link.close()
        server.close()
        await server.wait_closed()

    run(scenario)


# paho leaves the socket of a failed handshake to the collector, which closes it.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_tls_with_a_certificate_of_ones_own(broker, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    broker.restart(f"certfile {tmp_path}/cert.pem", f"keyfile {tmp_path}/key.pem")
    url = f"mqtts://127.0.0.1:{broker.port}"

    def link(on_message=lambda received: None, **more):
        return Connection(
            Broker(url, "c", **more),
            subscriptions=("er/v1/home/c/rsp",),
            state_topic=STATE,
            on_message=on_message,
            backoff=Backoff(base_s=0.02, cap_s=0.1),
        )

    async def scenario():
        got = asyncio.Queue()
        trusting = link(got.put_nowait, ca_file=str(tmp_path / "ca.pem"))
        trusting.start()
        assert await trusting.wait_connected(10)
        for i in range(20):  # several messages within one TLS record, and one across many
            await trusting.publish(Message("er/v1/home/c/rsp", b"%d" % i * 3000))
        for i in range(20):
            received = await got.get()
            assert received.message.payload == b"%d" % i * 3000
            trusting.acknowledge(received)
        await trusting.close()
        stranger = link()
        stranger.start()
        await until(lambda: "certificate" in stranger.last_error.lower())
        assert not stranger.is_connected
        await stranger.close()

    run(scenario)
    gc.collect()
