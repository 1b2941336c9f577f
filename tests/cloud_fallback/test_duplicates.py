"""What a worker knows of the requests it has seen."""

from cloud_fallback.duplicates import Duplicates, key_of
from edge_runtime.mqtt.envelope import Message

TOPIC = "er/v1/home/me/req/commands"


def test_topic_id_and_body_make_the_request():
    first = Message(TOPIC, b"body", correlation=b"i" * 16)
    assert key_of(first) == key_of(Message(TOPIC, b"body", correlation=b"i" * 16, expiry_s=3))
    for other in (
        Message(TOPIC + "x", b"body", correlation=b"i" * 16),
        Message(TOPIC, b"bodz", correlation=b"i" * 16),
        Message(TOPIC, b"body", correlation=b"j" * 16),
    ):
        assert key_of(other) != key_of(first)


def test_a_message_without_a_proper_id_is_always_new():
    known = Duplicates()
    for correlation in (b"", b"short", b"x" * 60_000):
        key = key_of(Message(TOPIC, b"body", correlation=correlation))
        assert key is None
        known.begin(key)
        known.end(key, Message("t", b"reply"), 0)
        assert (len(known), known.is_running(key), known.reply_to(key, 0)) == (0, False, None)


def test_a_request_runs_and_then_has_its_reply():
    known, key, reply = Duplicates(), ("t", b"i", b"d"), Message("t", b"reply")
    assert (known.is_running(key), known.reply_to(key, 0)) == (False, None)
    known.begin(key)
    assert (known.is_running(key), known.reply_to(key, 0)) == (True, None)
    known.end(key, reply, 0)
    assert (known.is_running(key), known.reply_to(key, 0)) == (False, reply)


def test_without_a_reply_the_request_is_forgotten():
    known, key = Duplicates(), ("t", b"i", b"d")
    known.begin(key)
    known.end(key, None, 0)
    assert (known.is_running(key), len(known), known.size_bytes) == (False, 0, 0)


def test_memory_is_bounded_in_bytes_and_the_newest_stay():
    known = Duplicates(max_bytes=100_000)
    for number in range(1000):
        key = ("t", b"%d" % number, b"")
        known.begin(key)
        known.end(key, Message("t", bytes(number * 13 % 9000)), number)
        assert known.size_bytes <= 100_000
    kept = [n for n in range(1000) if known.reply_to(("t", b"%d" % n, b""), 1000)]
    assert kept == list(range(kept[0], 1000))
    assert len(known) == len(kept) > 10


def test_a_small_reply_costs_more_than_its_text():
    """Ninety thousand empty replies are no empty memory."""
    known = Duplicates(max_bytes=100_000)
    for number in range(1000):
        known.end(("t", b"%d" % number, b""), Message("t", b""), 0)
    assert len(known) < 150


def test_what_is_forgotten_gives_its_bytes_back():
    known = Duplicates()
    for number in range(10):
        known.end(("t", b"%d" % number, b""), Message("t", b"reply"), number * 60_000_000_000)
    assert known.reply_to(("t", b"0", b""), 600_000_000_000) is not None
    assert known.reply_to(("t", b"0", b""), 600_000_000_001) is None
    assert len(known) == 9
    assert known.reply_to(("t", b"9", b""), 10**15) is None
    assert (len(known), known.size_bytes) == (0, 0)


def test_a_reply_that_comes_again_is_counted_once():
    known, key = Duplicates(), ("t", b"i", b"d")
    for _ in range(5):
        known.end(key, Message("t", b"reply"), 0)
    once = known.size_bytes
    known.end(key, Message("t", b"reply"), 0)
    assert (len(known), known.size_bytes) == (1, once)
