"""The work that bodies cause: refused before it is done where it can be, and else shared with everybody on the loop."""

import asyncio
import gzip
import json
import zlib

import numpy as np
import pytest

from edge_runtime.core.errors import InvalidRequest, Refused, TooLarge
from edge_runtime.core.messages import InferReply, Signature, Tensor, TensorSpec
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.oip import LIMITS
from edge_runtime.server.bodies import Bodies
from edge_runtime.server.byte_budget import ByteBudget, Lease
from tests.server.fakes import ask, connect, fake_server, infer, read_answer, run
from tests.server.test_http11 import get

BODY_BYTES = 8 << 20


def open_signature(datatype, rank):
    return Signature((TensorSpec("x", datatype, (-1,) * rank),), (TensorSpec("y", "FP32", (-1,)),))


def json_body(datatype, shape, data):
    """A JSON body that is written by hand: a list of a million texts would cost the test more than the daemon."""
    head = f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{list(shape)},"data":'
    return head.encode() + data + b"}]}"


def binary_body(datatype, shape, raw):
    tensor = {
        "name": "x",
        "shape": list(shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + raw, len(head)


def flat(item, count):
    return b"[" + b",".join([item] * count) + b"]"


#: The largest bodies that are legal, each as unpleasant to decode as its kind allows.
WORST = {
    "numbers": (json_body("FP32", (1, 600_000), flat(b"0.1", 500_000 + 100_000)[: 2 << 20]), None, "FP32", 2),
    "short numbers": (json_body("INT8", (1, 1_000_000), flat(b"7", 1_000_000)), None, "INT8", 2),
    "nested numbers": (
        json_body("FP32", (1, 400_000, 1), b"[" + flat(b"[1]", 400_000) + b"]"),
        None,
        "FP32",
        3,
    ),
    "texts": (json_body("BYTES", (1, 250_000), flat(b'"abcd"', 250_000)), None, "BYTES", 2),
    "binary texts": (*binary_body("BYTES", (1, LIMITS.texts), b"\1\0\0\0x" * LIMITS.texts), "BYTES", 2),
    "bytes of truth": (*binary_body("BOOL", (1, 8_000_000), b"\1" * 8_000_000), "BOOL", 2),
}


async def turns_during(work):
    """How often the loop turned while `work` ran, and its result."""
    turns = 0

    async def tick():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.ensure_future(tick())
    try:
        return await work, turns
    finally:
        ticking.cancel()


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("coding", ["", "gzip"])
def test_the_largest_legal_bodies_are_decoded_in_steps(name, coding):
    body, json_length, datatype, rank = WORST[name]
    if name == "numbers":
        body = json_body("FP32", (1, 500_000), flat(b"0.1", 500_000))
    assert len(body) <= BODY_BYTES
    sent = gzip.compress(body, 1) if coding else body

    async def scenario():
        bodies, lease = Bodies(BODY_BYTES), Lease(ByteBudget(4 * BODY_BYTES))
        work = bodies.decode(sent, lease, coding, json_length, open_signature(datatype, rank))
        request, turns = await turns_during(work)
        (tensor,) = request.inputs
        count = int(np.prod(tensor.shape))
        # Numbers in binary are copied, and cost nothing for each; all others are touched one by one.
        least = {"BOOL": 1, "BYTES": count // 8192}.get(datatype, len(body) // 65_536)
        assert turns >= least

    run(scenario)


def test_large_bodies_take_turns_so_that_a_turn_of_the_loop_decodes_one_of_them():
    body, json_length, datatype, rank = WORST["binary texts"]

    async def scenario():
        bodies, budget = Bodies(BODY_BYTES), ByteBudget(64 * BODY_BYTES)
        works = [
            bodies.decode(body, Lease(budget), "", json_length, open_signature(datatype, rank))
            for _ in range(4)
        ]
        _, alone = await turns_during(works.pop())
        _, together = await turns_during(asyncio.gather(*works))
        assert together >= 2.5 * alone

    run(scenario)


def test_a_decoding_that_is_cancelled_lets_the_next_one_in():
    body, json_length, datatype, rank = WORST["binary texts"]

    async def scenario():
        bodies, budget = Bodies(BODY_BYTES), ByteBudget(64 * BODY_BYTES)

        def decode():
            return bodies.decode(body, Lease(budget), "", json_length, open_signature(datatype, rank))

        first, second, third = (asyncio.ensure_future(decode()) for _ in range(3))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        assert len((await third).inputs) == 1

    run(scenario)


@pytest.mark.parametrize("path", ["/v2/models/none/infer", "/v2/models/echo/infer"])
def test_two_million_texts_in_eight_kilobytes_are_refused_for_what_their_json_says(
    tmp_path, path, monkeypatch
):
    """8 MB of empty texts inflate from 8 kB. The model does not exist, or takes no such input."""
    tensor = {
        "name": "x",
        "shape": [1, 2_000_000],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": 8_000_000},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    body = gzip.compress(head + bytes(8_000_000))
    headers = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Encoding: gzip\r\n"
    raw = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
        + body
    )
    monkeypatch.setattr(oip, "reading_binary", None)  # no data is decoded

    async def scenario():
        async with fake_server(tmp_path) as (service, _, port):
            status, _, answer = await ask(port, raw)
            assert status == (404 if "none" in path else 413), answer
            assert service.calls == []

    run(scenario)


def test_health_is_answered_while_a_large_body_is_decoded(tmp_path, both_loops):
    texts = json.dumps(["abc"] * 1024)
    rows = [json_body("BYTES", (1024,), texts.encode()).replace(b'"x"', b'"text"')]
    rows += [infer("x" * 60_000).partition(b"\r\n\r\n")[2]]
    body = rows[0]

    async def scenario():
        async with fake_server(tmp_path) as (_, _, port):
            slow, fast = await connect(port), await connect(port)
            head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            slow[1].write(head.encode() + body)
            fast[1].write(get("/v2/health/live"))
            assert (await read_answer(fast[0]))[0] == 200
            assert (await read_answer(slow[0]))[0] == 200
            slow[1].close()
            fast[1].close()

    run(scenario)


def test_long_answers_are_encoded_in_steps_and_read_back_alike():
    values = np.arange(300_000, dtype=np.float32).reshape(3, 100_000) / 7

    async def scenario():
        reply = InferReply("m", "1", (Tensor("y", "FP32", values.shape, values),), id="a")
        (body, json_length), turns = await turns_during(Bodies(BODY_BYTES).encode(reply))
        assert json_length is None
        assert turns > 30
        tree = json.loads(body)["outputs"][0]
        np.testing.assert_array_equal(np.array(tree["data"], np.float32).reshape(tree["shape"]), values)
        assert json.loads(body)["id"] == "a"

    run(scenario)


@pytest.mark.parametrize(
    ("body", "coding", "error"),
    [
        (gzip.compress(b"{}")[:-1], "gzip", InvalidRequest),
        (gzip.compress(b"{}") + b"x", "gzip", InvalidRequest),
        (b"{}", "gzip", InvalidRequest),
        (b"", "gzip", InvalidRequest),
        (zlib.compress(b"{}")[2:], "deflate", InvalidRequest),
        (b"{}", "br", InvalidRequest),
        (b"{}", "gzip, gzip", InvalidRequest),
        (
            gzip.compress(bytes(BODY_BYTES + 1)),
            "gzip",
            TooLarge,
        ),  # for what it inflates to, not for what is in it
        (gzip.compress(bytes(BODY_BYTES)), "gzip", Refused),
    ],
)
def test_a_compressed_body_is_refused_where_it_is_corrupt_or_too_large(body, coding, error):
    async def scenario():
        lease = Lease(ByteBudget(BODY_BYTES if error is Refused else 4 * BODY_BYTES))
        with pytest.raises(error, match="inflates to more than" if error is TooLarge else None):
            await Bodies(BODY_BYTES).decode(body, lease, coding, None, open_signature("BYTES", 1))

    run(scenario)


@pytest.mark.parametrize("coding", ["GZIP", "x-gzip", "Gzip ", "DEFLATE", "Identity", ""])
def test_codings_are_known_in_any_case(coding):
    body = json_body("BYTES", (1,), b'["a"]')
    packed = {"g": gzip.compress, "x": gzip.compress, "d": zlib.compress}.get(coding.lower()[:1], bytes)(body)

    async def scenario():
        lease = Lease(ByteBudget(BODY_BYTES))
        request = await Bodies(BODY_BYTES).decode(packed, lease, coding, None, open_signature("BYTES", 1))
        assert request.inputs[0].data == (b"a",)

    run(scenario)
