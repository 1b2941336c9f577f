"""The HTTP server with the real runtime behind it: protocol, attacks, stock clients, disconnects."""

import asyncio
import contextlib
import gc
import json
import random
import shutil
import stat

import pytest

from edge_runtime.config import Config, ServerSettings
from edge_runtime.core.errors import ConfigError
from edge_runtime.runtime import Runtime
from edge_runtime.server import start_server
from edge_runtime.server.limits import HttpLimits
from tests.server.test_http11 import MALFORMED

BODY = json.dumps(
    {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["turn the lights off"]}]}
).encode()


@contextlib.asynccontextmanager
async def served(tmp_path, limits=None):
    async with Runtime.open(Config(server=ServerSettings(tcp="off"))) as runtime:
        server = await start_server(
            runtime, socket_path=tmp_path / "run" / "e.sock", tcp=("127.0.0.1", 0), limits=limits
        )
        try:
            yield runtime, server, int(server.addresses[1].rpartition(":")[2])
        finally:
            await server.close()


def run(scenario):
    async def limited():
        async with asyncio.timeout(50):
            await scenario()

    asyncio.run(limited())


def post(path="/v2/models/commands/infer", body=BODY, headers=""):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


async def exchange(port, raw, pieces=1):
    """Send bytes, whole or in pieces; return (status, closed?, body) of the first answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        step = -(-len(raw) // pieces)
        for at in range(0, len(raw), step):
            writer.write(raw[at : at + step])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(fields["content-length"]))
        return int(head.split()[1]), fields.get("connection") == "close", body
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def get(path, headers=""):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode("latin-1")


GOOD = [
    (get("/v2"), b"edge-runtime"),
    (get("/v2/health/live"), b"true"),
    (get("/v2/health/ready"), b"true"),
    (get("/v2/models/commands"), b"BYTES"),
    (get("/v2/models/commands/ready"), b"true"),
    (get("/v2/models/commands/config"), b"TYPE_STRING"),
    (get("/v2/models/commands/stats"), b"inference_stats"),
    (get("/v2/models/stats"), b"inference_stats"),
    (post("/v2/repository/index", b""), b"READY"),
    (get("/metrics"), b"edge_requests_seconds_count"),
    (get("/status"), b"uptime_s"),
    (post(), b"smart_home"),
]


@pytest.mark.parametrize("pieces", [1, 7, 10**6])
def test_every_resource_answers(tmp_path, pieces):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            for raw, expected in GOOD:
                status, closed, body = await exchange(port, raw, pieces)
                assert (status, closed) == (200, False), raw
                assert expected in body

    run(scenario)


def text(shape=(1,), data="x", datatype="BYTES", name="text", **more):
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


BAD = [
    (post("/v2/models/nope/infer"), 404),
    (post("/v2/models/commands/versions/99/infer"), 404),
    (post("/v2/models/..%2f/infer"), 404),
    (get("/v2/models/commands/infer"), 405),
    (b"OPTIONS /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (get("/nothing"), 404),
    (post("/v2/repository/models/commands/load"), 501),
    (post(body=b"{"), 400),
    (post(body=b"[" * 100_000), 400),
    (post(body=b'{"x":' * 100_000), 400),
    (post(body=b'{"inputs":' + b"[" * 100_000), 400),
    (post(body=b"{}"), 400),
    (post(body=text(data=["a", "b"])), 400),
    (post(body=text(shape=[0], data=[])), 400),
    (post(body=text(shape=[-1], data=["a"])), 400),
    (post(body=text(shape=[2**32, 2**32], data=["a"])), 413),
    (post(body=text(datatype="FP32", data=[1.5])), 400),
    (post(body=text(datatype="INT8", data=[10**30])), 400),
    (post(body=text(datatype="NOPE", data=["a"])), 400),
    (post(body=text(name="words", data=["a"])), 400),
    (post(body=text(data=[[255, 254]])), 400),
    (post(body=text(data=["a" * 5000])), 413),
    (post(body=text(data=["a"], outputs=[{"name": "nope"}])), 400),
    (post(body=text(data=["a"], parameters={"private": "yes"})), 400),
    (post(body=text(data=["a"], parameters={"timeout": -1})), 400),
    (post(headers="Inference-Header-Content-Length: 999999\r\n"), 400),
    (post(headers="Inference-Header-Content-Length: x\r\n"), 400),
    (post(headers="Content-Encoding: br\r\n"), 400),
    (post(headers="Content-Encoding: gzip\r\n"), 400),
]


def test_bad_input_gets_its_status_in_one_sentence_and_the_daemon_goes_on(tmp_path):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            for raw, expected in (*BAD, *MALFORMED):
                status, _, body = await exchange(port, raw)
                assert status == expected, (raw[:120], body)
                sentence = json.loads(body)["error"]
                assert sentence
                assert "Traceback" not in sentence
            assert (await exchange(port, post()))[0] == 200

    run(scenario)


def absolute(raw):
    return raw.replace(b" /v2", b" http://localhost:8080/v2", 1)


#: What the standards say is to be ignored, or read otherwise than by the letter.
LIBERAL = [
    post(headers="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
    absolute(post()),
    post(headers="X-Caller: J\xfcrgen\r\nContent-Type: text/\xe9\r\n"),
    post(headers="Content-Type: a\r\nContent-Type: b\r\nAccept-Encoding: br\r\nTE: trailers\r\n"),
    post(headers="Content-Encoding: Identity\r\n"),
    post(body=text(data=["a"], id=None, parameters=None, outputs=None)),
    post(body=text(data=["a"], parameters={"timeout": 0})),
    post(body=text(data=["a"], parameters={"timeout": None, "unknown": [1], "priority": None})),
    post(body=text(data=["a"], outputs=[{"name": "intent", "parameters": None}])),
    post(body=text(data=["a"], future={"a": 1})),
    b"\r\n" + post(),
]


def test_what_the_standards_say_to_ignore_is_ignored(tmp_path):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            for raw in LIBERAL:
                status, closed, body = await exchange(port, raw)
                assert (status, closed) == (200, False), (raw[:200], body)

    run(scenario)


def test_requests_leave_nothing_for_the_garbage_collector(tmp_path):
    """The daemon runs it rarely, since requests leave no cycles behind: here is the test of that belief."""
    number = iter(range(10**6))

    def fresh(count=1, **more):
        data = [f"what is the weather on day {next(number)}" for _ in range(count)]
        return post(body=text(shape=[count], data=data, **more))

    kinds = [
        fresh,
        lambda: fresh(64),
        post,
        lambda: fresh(parameters={"timeout": 1}),
        lambda: post(body=text(data=["a" * 5000])),
        lambda: post(body=b"{"),
        lambda: post("/v2/models/nope/infer"),
    ]

    async def scenario():
        async with served(tmp_path) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for kind in kinds:
                found = []
                for count in (5, 40):
                    gc.collect()
                    gc.disable()
                    try:
                        for _ in range(count):
                            writer.write(kind())
                            head = await reader.readuntil(b"\r\n\r\n")
                            await reader.readexactly(
                                int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                            )
                    finally:
                        gc.enable()
                    found.append(gc.collect())
                assert found[1] <= found[0] + 20, kind()  # it does not grow with the requests
            writer.close()

    run(scenario)


def test_endless_headers_are_cut_off(tmp_path):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            status, closed, _ = await exchange(port, b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 200_000, 50)
            assert (status, closed) == (431, True)

    run(scenario)


@pytest.mark.parametrize("chunk", [b"1\r\na\r\n" * 400_000, b"1;" + b"x" * 400_000, b"0" * 200_000])
def test_chunks_of_mostly_framing_are_cut_off(tmp_path, chunk):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            raw = b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
            status, closed, _ = await exchange(port, raw, 50)
            assert (status, closed) == (400, True)

    run(scenario)


def test_trailers_never_reach_the_headers(tmp_path):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            raw = (
                b"POST /v2/models/commands/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                + f"{len(BODY):x}".encode() + b"\r\n" + BODY + b"\r\n0\r\nOrigin: http://evil.example\r\n\r\n"
            )  # fmt: skip
            assert (await exchange(port, raw))[0] == 200

    run(scenario)


def test_pipelined_answers_keep_their_order(tmp_path):
    async def scenario():
        async with served(tmp_path) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(post(body=text(data=["hi"], id=f"n{i}")) for i in range(20)))
            for i in range(20):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                assert json.loads(await reader.readexactly(length))["id"] == f"n{i}"
            writer.close()

    run(scenario)


def test_half_of_32_callers_leave_and_the_others_get_their_own_answers(tmp_path):
    texts = {"turn the lights off": "smart_home", "flip a coin": "flip_coin", "tell me a joke": "tell_joke"}
    rng = random.Random(7)

    async def caller(port, leaves, i):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        question, intent = list(texts.items())[i % 3]
        for round_number in range(10):
            body = text(data=[question], id=f"{i}-{round_number}", parameters={"cache": False})
            raw = post(body=body)
            if leaves and round_number == rng.randrange(10):
                writer.write(raw[: rng.randrange(1, len(raw) + 1)])
                writer.transport.abort()
                return None
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            reply = json.loads(await reader.readexactly(length))
            assert reply["id"] == f"{i}-{round_number}"
            assert reply["outputs"][0]["data"] == [intent]
        writer.close()
        return 10

    async def scenario():
        async with served(tmp_path) as (_, _, port):
            done = await asyncio.gather(*(caller(port, i % 2 == 1, i) for i in range(32)))
            assert done[::2] == [10] * 16

    run(scenario)


def test_the_socket_is_private_replaced_when_stale_and_refused_when_in_use(tmp_path):
    async def scenario():
        async with served(tmp_path) as (runtime, _, _):
            path = tmp_path / "run" / "e.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            with pytest.raises(ConfigError, match="already listens"):
                await start_server(runtime, socket_path=path, tcp=None)
            with pytest.raises(ConfigError, match="loopback"):
                await start_server(runtime, socket_path=None, tcp=("0.0.0.0", 0))
            plain = tmp_path / "file"
            plain.write_text("mine")
            with pytest.raises(ConfigError, match="not a socket"):
                await start_server(runtime, socket_path=plain, tcp=None)
            assert plain.read_text() == "mine"

    run(scenario)


def test_a_slow_peer_is_closed_by_the_sweep_and_others_are_served(tmp_path):
    async def scenario():
        limits = HttpLimits(header_s=0.0)
        async with served(tmp_path, limits) as (_, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /v2 HT")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408")
            writer.close()
            assert (await exchange(port, post()))[0] == 200

    run(scenario)


def test_draining_finishes_what_runs_and_turns_the_rest_away(tmp_path):
    """The request is in the engine's hands when the drain begins, and its answer is read after the drain."""

    async def scenario():
        async with served(tmp_path) as (runtime, server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            infer, begun, gate = runtime.service.infer, asyncio.Event(), asyncio.Event()

            async def held_back(*arguments, **more):
                begun.set()
                await gate.wait()
                return await infer(*arguments, **more)

            runtime.service.infer = held_back
            writer.write(post())
            await begun.wait()
            await server.close_ingress()
            drained = asyncio.ensure_future(server.drain(5))
            await asyncio.sleep(0)
            assert not drained.done()
            gate.set()
            assert await drained
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port)
            writer.close()

    run(scenario)


def test_tritonclient_gets_right_answers_in_json_and_binary(tmp_path):
    http = pytest.importorskip("tritonclient.http")
    import numpy as np

    def ask(port):
        with http.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.is_server_live()
            assert client.is_model_ready("commands")
            assert client.get_model_metadata("commands")["inputs"][0]["name"] == "text"
            answers = []
            for binary in (False, True):
                question = http.InferInput("text", [2], "BYTES")
                question.set_data_from_numpy(
                    np.array([b"turn the lights off", b"flip a coin"], object), binary_data=binary
                )
                wanted = [http.InferRequestedOutput(n, binary_data=binary) for n in ("intent", "confidence")]
                result = client.infer("commands", [question], outputs=wanted)
                assert result.as_numpy("confidence").dtype == np.float32
                answers.append(
                    [raw if isinstance(raw, bytes) else raw.encode() for raw in result.as_numpy("intent")]
                )
            return answers

    async def scenario():
        async with served(tmp_path) as (_, _, port):
            for answer in await asyncio.to_thread(ask, port):
                assert answer == [b"smart_home", b"flip_coin"]

    run(scenario)


def test_curl_gets_the_right_answer_in_json_and_binary(tmp_path):
    """As the README has it: curl -d sends no JSON content type, and that is fine."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install curl")

    async def curl(*words):
        process = await asyncio.create_subprocess_exec(
            *("curl", "-s", "--fail", "--max-time", "20", *words), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out

    async def scenario():
        async with served(tmp_path) as (_, _, port):
            url = f"http://127.0.0.1:{port}/v2/models/commands/infer"
            assert json.loads(await curl(url, "-d", BODY.decode()))["outputs"][0]["data"] == ["smart_home"]
            over_socket = await curl(
                "--unix-socket", str(tmp_path / "run" / "e.sock"), "http://localhost/v2/health/ready"
            )
            assert json.loads(over_socket)
            command = b"flip a coin"
            raw = len(command).to_bytes(4, "little") + command
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES"}
            tensor["parameters"] = {"binary_data_size": len(raw)}
            head = json.dumps({"inputs": [tensor]}).encode()
            (tmp_path / "body").write_bytes(head + raw)
            length = f"Inference-Header-Content-Length: {len(head)}"
            reply = await curl(url, "-H", length, "--data-binary", f"@{tmp_path}/body")
            assert json.loads(reply)["outputs"][0]["data"] == ["flip_coin"]

    run(scenario)
