"""A client that can misbehave: HTTP/1.1 by hand on asyncio streams."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tools.soak.account import Asked

MAX_HEAD_BYTES = 64 << 10


class NoAnswerError(Exception):
    """The connection ended before a whole answer; the message says how far it came."""


def infer(asked: Asked, *, cache: bool = True, **parameters: object) -> bytes:
    """The bytes of an inference request."""
    if asked.is_private:
        parameters["private"] = True
    if not cache:
        parameters["cache"] = False
    tree = {
        "id": asked.id,
        "inputs": [
            {"name": "text", "shape": [len(asked.texts)], "datatype": "BYTES", "data": list(asked.texts)}
        ],
        "parameters": parameters,
    }
    return post(json.dumps(tree).encode())


def post(body: bytes, length: int | None = None) -> bytes:
    """A request with this body, or with the beginning of one that is `length` bytes long."""
    return (
        b"POST /v2/models/commands/infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
    ) + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Connection:
    """One connection; `address` is the path of a Unix socket or HOST:PORT."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closed: Callable[[], None]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._closed = closed
        self.is_open = True

    @classmethod
    async def open(cls, address: str, closed: Callable[[], None] = lambda: None) -> "Connection":
        """Connect; `closed` is called once this side has closed. Raises OSError."""
        if address.startswith("/"):
            return cls(*await _open_unix(address), closed)
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=MAX_HEAD_BYTES), closed)

    async def ask(self, request: bytes) -> tuple[int, Any]:
        """Send and read one answer. Raises NoAnswerError."""
        await self.send(request)
        return await self.read()

    async def send(self, request: bytes) -> None:
        """Raises NoAnswerError if the peer has gone."""
        try:
            self._writer.write(request)
            await self._writer.drain()
        except OSError:  # an answer may lie in the buffer all the same; `read` says
            pass

    async def read(self) -> tuple[int, Any]:
        """Status and body, decoded if it is JSON; interim answers are passed over. Raises NoAnswerError."""
        while (answer := await self._read_one())[0] < 200:
            pass
        return answer

    async def _read_one(self) -> tuple[int, Any]:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError as error:
            self.close()
            raise NoAnswerError(
                f"the connection ended after {len(error.partial)} bytes of an answer"
            ) from None
        except OSError as error:
            self.close()
            raise NoAnswerError(str(error)) from None
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(status_line.split()[1]), decoded(headers.get("content-type", ""), body)

    def half_close(self) -> None:
        """Say that nothing more comes from here."""
        self._writer.write_eof()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._writer.transport.abort()
            self._closed()


async def _open_unix(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and wait while the listener's backlog is full.

    A connect that blocks would wait by itself. One that does not gets EAGAIN there, which asyncio takes for a connection in
    progress, and gives out a socket that is connected to nothing.
    """
    while True:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_HEAD_BYTES)
        try:
            writer.get_extra_info("socket").getpeername()
        except OSError:
            writer.transport.abort()
            await asyncio.sleep(0.02)
        else:
            return reader, writer


def decoded(kind: str, body: bytes) -> Any:
    return json.loads(body) if kind.startswith("application/json") else body
