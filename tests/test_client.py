"""The command line's client and the daemon's server understand each other, and no stranger."""

import asyncio
import contextlib
import os
import socket
import threading

import pytest

from edge_runtime.client import Client
from edge_runtime.config import Config
from edge_runtime.core.errors import (
    ConfigError,
    EdgeRuntimeError,
    InvalidRequest,
    RefusalKind,
    Refused,
    StorageError,
)
from edge_runtime.core.messages import InferRequest, OutputRequest, Tensor
from edge_runtime.runtime import Runtime
from edge_runtime.server import start_server
from tests.processes import cli


def texts(*words, **more):
    return InferRequest((Tensor("text", "BYTES", (len(words),), words),), **more)


def talking(path, scenario):
    """Run `scenario(client)` in a thread beside a real server on `path`."""

    async def limited():
        async with asyncio.timeout(60), Runtime.open(Config()) as runtime:
            server = await start_server(runtime, socket_path=path, tcp=None)
            try:
                await asyncio.to_thread(scenario, Client(path))
            finally:
                await server.close()

    asyncio.run(limited())


@pytest.mark.parametrize(
    "outputs", [(), (OutputRequest("intent", binary=False), OutputRequest("scores", binary=False))]
)
@pytest.mark.parametrize("rows", [1, 2, 200, 1024])
def test_the_largest_reply_of_mixed_rows_can_be_read(tmp_path, rows, outputs):
    def scenario(client):
        known = [f"text {i}".encode() for i in range(rows // 2)]
        if known:
            client.infer("commands", texts(*known, outputs=outputs))
        mixed = [
            word
            for pair in zip(known, (f"new {i}".encode() for i in range(rows)), strict=False)
            for word in pair
        ]
        reply = client.infer("commands", texts(*(mixed or [b"one"]), outputs=outputs))
        columns = {tensor.name: tensor for tensor in reply.outputs}
        assert set(columns) == ({"intent", "scores"} if outputs else {"intent", "confidence"})
        assert len(columns["intent"].data) == rows
        if rows == 1:
            assert reply.parameters["origin"] == "local"
        elif rows == 2:
            assert reply.parameters["origin"] == "cache,local"
        else:
            assert (reply.parameters["origin"], reply.parameters["origin_counts"]) == (
                "mixed",
                f"cache={rows // 2},local={rows // 2}",
            )

    talking(tmp_path / "e.sock", scenario)


def test_errors_of_the_daemon_are_raised_as_they_were_there(tmp_path):
    def scenario(client):
        assert client.is_alive()
        with pytest.raises(InvalidRequest, match="No such model"):
            client.infer("nope", texts(b"x"))
        with pytest.raises(Refused) as refused:
            client.infer("commands", texts(b"x", parameters={"deadline_ms": 0}))
        assert refused.value.kind is RefusalKind.LATE
        with pytest.raises(EdgeRuntimeError, match="No such path"):
            client.get("/nothing")

    talking(tmp_path / "e.sock", scenario)


@contextlib.contextmanager
def answering(path, answer):
    """Something on `path` that answers each request with the same bytes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(65_536)
                        peer.sendall(answer)
                        peer.shutdown(socket.SHUT_WR)
                        while peer.recv(65_536):  # to close with bytes unread would break the client's pipe
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "cannot be read"),
        (
            b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: x\r\nContent-Length: 2\r\n\r\n{}",
            "cannot be read",
        ),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", "status 500"),
        (b"nonsense", "does not answer"),
        (b"", "does not answer"),
    ],
)
def test_what_is_no_answer_of_a_daemon_is_one_sentence(tmp_path, answer, words):
    path = tmp_path / "e.sock"
    with answering(path, answer), pytest.raises(EdgeRuntimeError, match=words) as failure:
        Client(path, timeout_s=20).infer("commands", texts(b"x"))
    assert str(path) in str(failure.value)
    assert not isinstance(failure.value, InvalidRequest)  # it is not the caller's request that is wrong


STRANGER = 54_321


@pytest.fixture
def foreign(monkeypatch):
    """Gives a path to another user; where tests may not do that, they become another user themselves."""

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, STRANGER, STRANGER)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    return give


@pytest.fixture
def stranger(tmp_path):
    """A folder with a socket on which a stranger listens, and what it has read."""
    folder = tmp_path / "edge-runtime-1000"
    folder.mkdir(mode=0o700)
    heard = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "e.sock"))
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        heard.append(peer.recv(65_536))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield folder, heard
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.parametrize("whose", ["folder", "socket", "both"])
def test_nothing_is_sent_to_a_socket_of_another_user(stranger, foreign, whose):
    folder, heard = stranger
    if whose in ("folder", "both"):
        foreign(folder)
    if whose in ("socket", "both"):
        foreign(folder / "e.sock")
    client = Client(folder / "e.sock", timeout_s=20)
    for call in (
        client.is_alive,
        lambda: client.get("/status"),
        lambda: client.infer("commands", texts(b"secret")),
    ):
        with pytest.raises(StorageError, match=r"is not used: .* belongs to user"):
            call()
    assert heard == []


def test_a_folder_that_everybody_may_write_is_not_used(stranger):
    folder, heard = stranger
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="may be written by every user; run chmod o-w on it"):
        Client(folder / "e.sock", timeout_s=20).is_alive()
    assert heard == []
    folder.chmod(0o1777)  # as /tmp: nobody may exchange the entries of others
    assert not Client(folder / "e.sock", timeout_s=20).is_alive()
    assert len(heard) == 1


def test_a_link_that_another_user_made_is_not_followed(stranger, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make a link of another user")
    folder, heard = stranger
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert not Client(link / "e.sock", timeout_s=20).is_alive()
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(StorageError, match="belongs to user"):
        Client(link / "e.sock", timeout_s=20).is_alive()
    assert len(heard) == 1


@pytest.mark.parametrize("spoil", ["owner", "mode"])
def test_the_server_refuses_the_folder_that_the_client_would_refuse(tmp_path, foreign, spoil):
    folder = tmp_path / "edge-runtime-1000"
    folder.mkdir(mode=0o700)
    if spoil == "owner":
        foreign(folder)
    else:
        folder.chmod(0o777)

    async def scenario():
        with pytest.raises(ConfigError, match=r"\[server\] socket: .*e.sock cannot be used"):
            await start_server(None, socket_path=folder / "e.sock", tcp=None)

    asyncio.run(scenario())
    assert list(folder.iterdir()) == []


def test_the_command_line_tells_the_user_of_a_foreign_socket(stranger, foreign, tmp_path):
    folder, heard = stranger
    path = tmp_path / "edge.toml"
    path.write_text(f'[server]\nsocket = "{folder}/e.sock"\n')
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    foreign(folder)
    for command in (("ask", "--private", "my card number is 1234"), ("status",)):
        done = cli(*command, "--config", str(path))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error: [server] socket: {folder}/e.sock is not used" in done.stderr
    assert heard == []
