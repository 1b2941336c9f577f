"""What peers may cost: each number is a cap that is checked before the parser or the allocator sees the bytes."""

from dataclasses import dataclass

from edge_runtime.config import ServerSettings

_DEFAULTS = ServerSettings()


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bytes, counts and seconds. llhttp, the parser, has no limits of its own (10 MB headers pass it)."""

    line_bytes: int = 4 << 10
    header_bytes: int = 16 << 10  # all headers of a request with the request line
    one_header_bytes: int = 8 << 10
    headers: int = 64
    body_bytes: int = _DEFAULTS.max_body_bytes
    chunk_overhead_bytes: int = 64 << 10  # beyond twice the body: extensions, tiny chunks, trailers
    pipelined: int = _DEFAULTS.max_pipelined
    #: Bodies and answers of all connections together.
    buffer_bytes: int = _DEFAULTS.buffer_bytes
    #: Open connections of each listener. Each costs about 6 kB while it is idle.
    connections: int = _DEFAULTS.max_connections
    #: Beyond them: connections that are answered with 503, or asked for their health.
    spare_connections: int = 32
    #: A connection must have been idle for so long before it is closed in favour of a new one.
    idle_before_shed_s: float = 5.0
    header_s: float = _DEFAULTS.header_s
    body_s: float = _DEFAULTS.body_s
    body_stall_s: float = 10.0  # without another 1 KiB of a body
    idle_s: float = _DEFAULTS.idle_s
    write_s: float = _DEFAULTS.write_s  # without the peer reading anything
    linger_s: float = (
        2.0  # after the last answer: what still arrives is swallowed, so that the answer is not lost
    )


def limits_of(settings: ServerSettings) -> HttpLimits:
    """The limits that an operator has set."""
    return HttpLimits(
        body_bytes=settings.max_body_bytes,
        pipelined=settings.max_pipelined,
        buffer_bytes=settings.buffer_bytes,
        connections=settings.max_connections,
        header_s=settings.header_s,
        body_s=settings.body_s,
        idle_s=settings.idle_s,
        write_s=settings.write_s,
    )
