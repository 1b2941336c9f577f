"""What MQTT adds to a body: digests by RFC 9530, the size of a packet, caps."""

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.mqtt.envelope import Message, pack, unpack

BODY = b'{"inputs": [' + b" " * 1000 + b"]}"


def message(digest, payload=b"body"):
    return Message("t", payload, user=(("Content-Digest", digest),))


def digest_of(payload, algorithm="sha256"):
    return base64.b64encode(hashlib.new(algorithm, payload).digest()).decode()


def test_a_compressed_body_carries_the_digest_of_what_is_sent():
    packed = pack("t", BODY, None, correlation=b"", expiry_s=None)
    assert dict(packed.user)["Content-Encoding"] == "zstd"
    assert dict(packed.user)["Content-Digest"] == f"sha-256=:{digest_of(packed.payload)}:"
    assert unpack(packed) == (BODY, None)


@pytest.mark.parametrize("at", [0, 5, 20, -1])
def test_a_flipped_byte_is_found(at):
    packed = pack("t", BODY, None, correlation=b"", expiry_s=None)
    payload = bytearray(packed.payload)
    payload[at] ^= 1
    with pytest.raises(InvalidRequest):
        unpack(Message("t", bytes(payload), user=packed.user))


@pytest.mark.parametrize(
    "digest",
    [
        f"sha-256=:{digest_of(b'body')}:",
        f"  sha-256=:{digest_of(b'body')}: ",
        f"sha-512=:{digest_of(b'body', 'sha512')}:, sha-256=:{digest_of(b'body')}:",
        f"sha-512=:{digest_of(b'another', 'sha512')}:",  # of an algorithm that is not read
        hashlib.sha256(b"body").hexdigest(),  # of an earlier release
    ],
)
def test_digests_that_are_accepted(digest):
    assert unpack(message(digest)) == (b"body", None)


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "00",
        "sha-256",
        "sha-256=",
        "sha-256=::",
        f"sha-256={digest_of(b'body')}",
        f"sha-256=:{digest_of(b'another')}:",
        f"sha-512=:{digest_of(b'body', 'sha512')}:, sha-256=:{digest_of(b'another')}:",
        hashlib.sha256(b"another").hexdigest(),
        hashlib.sha256(b"body").hexdigest().upper(),
        f"sha-256=:{digest_of(b'body')}:,",
    ],
)
def test_digests_that_are_refused(digest):
    with pytest.raises(InvalidRequest, match="Content-Digest"):
        unpack(message(digest))


def test_a_digest_of_an_earlier_release_is_of_the_plain_body():
    packed = pack("t", BODY, None, correlation=b"", expiry_s=None)
    former = tuple(
        (k, hashlib.sha256(BODY).hexdigest() if k == "Content-Digest" else v) for k, v in packed.user
    )
    assert unpack(Message("t", packed.payload, user=former)) == (BODY, None)


@given(
    st.text(st.characters(max_codepoint=0x2FF, exclude_characters="\0"), max_size=40),
    st.binary(max_size=300),
    st.sampled_from(["", "application/json", "application/octet-stream"]),
    st.sampled_from([b"", b"i" * 16]),
    st.sampled_from([None, 1, 600]),
    st.lists(st.tuples(st.text("aé", max_size=20), st.text("bß", max_size=20)), max_size=3),
)
def test_the_size_of_a_packet_is_never_above_what_is_said_and_near_it(
    topic, payload, kind, correlation, expiry_s, user
):
    properties = Properties(PacketTypes.PUBLISH)
    if kind:
        properties.ContentType = kind
        properties.PayloadFormatIndicator = 1
    if correlation:
        properties.CorrelationData = correlation
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    for pair in user:
        properties.UserProperty = pair
    packed = 2 + len(topic.encode()) + 2 + len(properties.pack()) + len(payload)
    packed += 1 + (1 if packed < 128 else 2)
    said = Message(topic, payload, kind, correlation, expiry_s, tuple(user)).packet_bytes
    assert packed <= said <= packed + 24
