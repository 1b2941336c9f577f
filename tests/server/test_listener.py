"""Where the server listens: what is announced works, what another one put there stays."""

import asyncio
import json
import socket
import urllib.request

import pytest

from edge_runtime.core.errors import ConfigError
from edge_runtime.server import start_server
from edge_runtime.server.sockets import BACKLOG, accept_all, bind_loopback, bind_unix
from tests.server.fakes import FakeApplication, fake_server, run


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.2",
        "localhost",
        pytest.param("::1", marks=IPV6),
        pytest.param("0:0:0:0:0:0:0:1", marks=IPV6),
    ],
)
def test_every_announced_address_answers(host, both_loops):
    def get(address):
        with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=20) as answer:
            return json.loads(answer.read())

    async def scenario():
        server = await start_server(FakeApplication(), socket_path=None, tcp=(host, 0))
        try:
            assert server.addresses
            assert len({address.rpartition(":")[2] for address in server.addresses}) == 1  # one port for all
            for address in server.addresses:
                assert await asyncio.to_thread(get, address) == {"ready": True}
        finally:
            await server.close()

    run(scenario)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.invalid", "", "1.2.3"])
def test_other_addresses_are_refused(host):
    async def scenario():
        with pytest.raises(ConfigError, match=r"loopback|cannot be used"):
            await start_server(FakeApplication(), socket_path=None, tcp=(host, 0))

    run(scenario)


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def scenario():
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be used"):
                await start_server(FakeApplication(), socket_path=tmp_path / "s", tcp=("127.0.0.1", port))
            assert not (tmp_path / "s").exists()

        run(scenario)


def test_a_server_removes_its_own_socket_and_no_successor_of_it(tmp_path, both_loops):
    async def scenario():
        path = tmp_path / "fake.sock"
        async with fake_server(tmp_path):
            path.unlink()
            successor = bind_unix(path)
        assert path.exists()
        successor.close()
        path.unlink()
        async with fake_server(tmp_path):
            assert path.exists()
        assert not path.exists()

    run(scenario)


def test_what_waits_in_the_kernel_is_accepted_to_the_last():
    (listening,) = bind_loopback(["127.0.0.1"], "127.0.0.1", 0)
    listening.listen(BACKLOG)
    listening.setblocking(False)
    address = listening.getsockname()
    peers = [socket.create_connection(address) for _ in range(20)]
    accepted = accept_all(listening)
    assert len(accepted) == 20
    assert accept_all(listening) == []
    for one in (*peers, *accepted, listening):
        one.close()
