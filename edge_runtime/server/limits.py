"""What peers may cost: each number is a cap that is checked before the parser or the allocator sees the bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bytes, counts and seconds. llhttp, the parser, has no limits of its own (10 MB headers pass it)."""

    line_bytes: int = 4 << 10
    header_bytes: int = 16 << 10  # all headers of a request with the request line
    one_header_bytes: int = 8 << 10
    headers: int = 64
    body_bytes: int = 8 << 20
    chunk_overhead_bytes: int = 64 << 10  # beyond twice the body: extensions, tiny chunks, trailers
    pipelined: int = 64
    #: Bodies and answers of all connections together.
    buffer_bytes: int = 64 << 20
    #: Open connections of each listener. Each costs about 6 kB while it is idle.
    connections: int = 256
    #: Beyond them: connections that are answered with 503, or asked for their health.
    spare_connections: int = 32
    #: A connection must have been idle for so long before it is closed in favour of a new one.
    idle_before_shed_s: float = 5.0
    header_s: float = 5.0
    body_s: float = 60.0
    body_stall_s: float = 10.0  # without another 1 KiB of a body
    idle_s: float = 75.0
    write_s: float = 30.0  # without the peer reading anything
    linger_s: float = (
        2.0  # after the last answer: what still arrives is swallowed, so that the answer is not lost
    )
