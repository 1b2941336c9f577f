"""What one peer may cost: each number is a cap that is checked before the parser or the allocator sees the bytes."""

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
    unix_connections: int = 256
    tcp_connections: int = 64
    header_s: float = 5.0
    body_s: float = 60.0
    idle_s: float = 75.0
    write_s: float = 30.0
