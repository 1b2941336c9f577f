"""Bodies <-> messages without holding up the event loop: large ones are inflated, decoded and encoded in steps.

Between two steps the loop serves others. Large bodies take turns, one at a time: however many there are, a health check
waits for one step and not for one step of each. Small bodies, nearly all of them, do not come here: the routes decode
them at once.
"""

import asyncio
import zlib
from collections.abc import Iterator

from edge_runtime.core.errors import InvalidRequest, RefusalKind, Refused, TooLarge
from edge_runtime.core.messages import InferReply, InferRequest, Signature
from edge_runtime.core.protocol import oip
from edge_runtime.server.byte_budget import Lease
from edge_runtime.serving.steps import run_steps

#: A body up to this size takes less than 2 ms whatever it holds.
SMALL_BODY_BYTES = 16 << 10
#: What zlib inflates in one step: 1 to 3 ms.
_INFLATE_BYTES = 1 << 20
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class Bodies:
    """The codec of one server, and the turn of its large bodies."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._turn = asyncio.Lock()

    async def decode(
        self,
        body: bytes | bytearray,
        lease: Lease,
        coding: str,
        json_length: int | None,
        signature: Signature,
    ) -> InferRequest:
        """Return the request in a body. Raises InvalidRequest and its kin; Refused where memory is short.

        `coding` is the value of Content-Encoding, `lease` the request's, which grows by what the body inflates to.
        """
        coding = coding.strip().lower()
        if coding in ("", "identity"):
            async with self._turn:
                return await run_steps(oip.decoding_request(body, json_length, signature))
        if coding not in _WINDOWS:
            raise InvalidRequest("This Content-Encoding is not offered; send gzip, deflate or plain.")
        async with self._turn:
            plain = bytearray()
            for part in _inflated(body, _WINDOWS[coding], self._limit_bytes):
                plain += part
                if not lease.resize(len(body) + len(plain)):
                    raise Refused(
                        RefusalKind.FULL, "The daemon has no room for the inflated body; retry later.", 1.0
                    )
                await asyncio.sleep(0)
            return await run_steps(oip.decoding_request(plain, json_length, signature))

    async def encode(self, reply: InferReply) -> tuple[bytes, int | None]:
        """Return the body of a reply and the length of its JSON part. Raises EngineFailed, Unsupported."""
        async with self._turn:
            return await run_steps(oip.encoding_reply(reply))


def _inflated(body: bytes | bytearray, window: int, limit_bytes: int) -> Iterator[bytes]:
    """The inflated body in parts. Raises InvalidRequest, and TooLarge as soon as it passes the limit."""
    inflate = zlib.decompressobj(window)
    rest, size = bytes(body), 0
    try:
        while not inflate.eof and (rest or size == 0):
            part = inflate.decompress(rest, _INFLATE_BYTES)
            rest = inflate.unconsumed_tail
            size += len(part)
            if size > limit_bytes:
                raise TooLarge(
                    f"The body inflates to more than {limit_bytes} bytes ([server] max_body_bytes)."
                )
            yield part
            if not part:
                break
    except zlib.error:
        raise InvalidRequest("The compressed body is corrupt.") from None
    if not inflate.eof or inflate.unused_data:
        raise InvalidRequest("The compressed body is truncated or has trailing bytes.")
