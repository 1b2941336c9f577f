"""The capped door to zstandard."""

import threading

import pytest
import zstandard

from edge_runtime.compression import compress, decompress
from edge_runtime.core.errors import InvalidRequest, TooLarge

CAPS = {"max_bytes": 1 << 20, "max_window_bytes": 1 << 20}


def test_round_trip_at_the_cap():
    plain = bytes(range(256)) * 4096
    assert decompress(compress(plain, 3), **CAPS) == plain
    with pytest.raises(TooLarge):
        decompress(compress(plain + b"x", 3), **CAPS)


@pytest.mark.parametrize(
    "data", [b"", b"\x28\xb5\x2f\xfd", b"plain text", bytes(100), b"\x28\xb5\x2f\xfd" + bytes(30)]
)
def test_nonsense_is_refused(data):
    with pytest.raises(InvalidRequest):
        decompress(data, **CAPS)


def test_each_flip_is_refused_or_harmless():
    plain = b"turn the kitchen lights off " * 40
    frame = compress(plain)
    for at in range(len(frame)):
        for bit in range(8):
            try:
                out = decompress(frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :], **CAPS)
            except InvalidRequest:
                continue
            assert len(out) <= CAPS["max_bytes"]


def test_an_empty_frame_is_refused():
    with pytest.raises(InvalidRequest):
        decompress(compress(b""), **CAPS)


def test_a_dictionary_is_refused():
    trained = zstandard.ZstdCompressionDict(b"turn the kitchen lights off" * 20, dict_type=0)
    trained = zstandard.train_dictionary(512, [b"turn the %d lights off %d" % (i, i * 7) for i in range(500)])
    frame = zstandard.ZstdCompressor(dict_data=trained).compress(b"turn the 5 lights off")
    with pytest.raises(InvalidRequest, match="dictionary"):
        decompress(frame, **CAPS)


def test_threads_do_not_share_a_decompressor():
    plain = [bytes([i]) * 100_000 for i in range(4)]
    frames = [compress(p, 3) for p in plain]
    wrong = []

    def work(i):
        wrong.extend(1 for _ in range(50) if decompress(frames[i], **CAPS) != plain[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
