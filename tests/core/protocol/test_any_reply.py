"""Which of the two a body is: a reply or an error."""

import pytest

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.messages import InferReply, Tensor
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.any_reply import ErrorReply, decode_any_reply

REPLY = InferReply("m", "1", (Tensor("y", "BYTES", (1,), (b'{"error"',)),))


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "full", "reason": "full", "retry_after_ms": 5}',
        b'\n\t {"reason":"full","retry_after_ms":5,"error":"full"}',
        b'{\n  "error" : "full", "reason":"full", "retry_after_ms":5, "id": null, "more": [1]}',
        b'{"model_name":"m","outputs":[],"error":"full","reason":"full","retry_after_ms":5}',
    ],
)
def test_an_error_is_known_by_its_member_wherever_it_stands(body):
    reply = decode_any_reply(body, None)
    assert isinstance(reply, ErrorReply)
    assert reply.message == "full"
    assert (reply.fields["reason"], reply.fields["retry_after_ms"]) == ("full", 5)


def test_a_reply_that_speaks_of_errors_is_a_reply():
    assert decode_any_reply(*oip.encode_reply(REPLY)).outputs[0].data == (b'{"error"',)


def test_a_binary_reply_is_never_an_error():
    binary = InferReply("m", "1", (Tensor("y", "BYTES", (1,), (b"x",)),), binary_outputs=frozenset({"y"}))
    body, length = oip.encode_reply(binary)
    assert length is not None
    assert decode_any_reply(body, length).outputs[0].data == (b"x",)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"error"', b'{"error": 5}', b'{"error": null}', b"[" * 60_000, b"\xff",
     b'{"error": "x"}' + b" " * (3 << 20)],
)  # fmt: skip
def test_what_is_neither_is_invalid(body):
    with pytest.raises(InvalidRequest):
        decode_any_reply(body, None)
