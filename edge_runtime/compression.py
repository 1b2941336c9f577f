"""The only door to zstandard: whole frames in, whole frames out, with the caps the library does not keep itself.

The one-shot decompressor ignores its own size and window limits whenever a frame declares its size, and
drops trailing bytes in silence, so every limit is checked here against the frame's header first.
"""

import threading

import zstandard

from edge_runtime.core.errors import InvalidRequest, TooLarge

_MAGIC = b"\x28\xb5\x2f\xfd"
_UNKNOWN_SIZE = 2**64 - 1
_KIB = 1024


class _Reused(threading.local):
    """One decompressor per thread: it is not thread-safe, and a new one costs ten times a small frame."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_reused = _Reused()


def compress(data: bytes, level: int = 19) -> bytes:
    """Return one frame that declares its size. Level 3 suits messages, 19 what is written once."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(data)


def decompress(data: bytes, *, max_bytes: int, max_window_bytes: int) -> bytes:
    """Return the plain bytes of exactly one frame that declares a size of 1..`max_bytes`.

    Raises TooLarge where the declared size or window passes its limit, and InvalidRequest for anything
    else than one whole plain frame: no declared size, a dictionary, a skippable or second frame, trailing
    bytes, damage. Nothing is allocated before the header is found good.
    """
    if data[:4] != _MAGIC:
        raise InvalidRequest("the data is not a zstd frame; compress it as one plain frame")
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError:
        raise InvalidRequest(
            "the header of the zstd frame is damaged or cut off; send the frame again"
        ) from None
    if frame.content_size in (0, _UNKNOWN_SIZE):
        raise InvalidRequest("the zstd frame is empty or does not declare its size; write the content size")
    if frame.content_size > max_bytes:
        raise TooLarge(
            f"the zstd frame declares {frame.content_size} bytes; at most {max_bytes} are accepted"
        )
    if frame.window_size > max_window_bytes:
        raise TooLarge(
            f"the zstd frame needs a window of {frame.window_size // _KIB} KiB; "
            f"at most {max_window_bytes // _KIB} KiB are accepted"
        )
    if frame.dict_id != 0:
        raise InvalidRequest("the zstd frame needs a dictionary; compress without one")
    try:
        plain = _reused.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        raise InvalidRequest("the zstd frame is damaged, cut off, or followed by other bytes") from None
    if len(plain) != frame.content_size:
        raise InvalidRequest("the zstd frame holds another size than it declares")
    return plain
