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


def test_a_message_without_an_id_is_always_new():
    known = Duplicates()
    key = key_of(Message(TOPIC, b"body"))
    assert key is None
    known.begin(key)
    known.end(key, Message("t", b"reply"))
    assert (len(known), known.is_running(key), known.reply_to(key)) == (0, False, None)


def test_a_request_runs_and_then_has_its_reply():
    known, key, reply = Duplicates(), ("t", b"i", b"d"), Message("t", b"reply")
    assert (known.is_running(key), known.reply_to(key)) == (False, None)
    known.begin(key)
    assert (known.is_running(key), known.reply_to(key)) == (True, None)
    known.end(key, reply)
    assert (known.is_running(key), known.reply_to(key)) == (False, reply)


def test_without_a_reply_the_request_is_forgotten():
    known, key = Duplicates(), ("t", b"i", b"d")
    known.begin(key)
    known.end(key, None)
    assert (known.is_running(key), len(known)) == (False, 0)


def test_memory_is_bounded_and_the_newest_stay():
    known = Duplicates(max_known=3)
    for number in range(10):
        known.begin(("t", b"%d" % number, b""))
        known.end(("t", b"%d" % number, b""), Message("t", b"reply"))
        assert len(known) <= 3
    assert [n for n in range(10) if known.reply_to(("t", b"%d" % n, b""))] == [7, 8, 9]
