"""The soak notices what it looks for: each promise is broken here once."""

import asyncio
import json
import signal
import sys

import pytest

from tools.soak import __main__ as program
from tools.soak import callers as callers_module
from tools.soak import system
from tools.soak.account import Account, Asked, Known, growth
from tools.soak.callers import KINDS, Callers
from tools.soak.connection import Connection, get
from tools.soak.faults import KINDS as FAULTS
from tools.soak.faults import LONGEST_S, PER_CYCLE, planned
from tools.soak.link import Link
from tools.soak.report import Report, in_words

KNOWN = {
    "hi": Known(("greeting", 0.9), (("greeting", 0.95),)),
    "hm": Known(("what_song", 0.4), (("greeting", 0.5), ("greeting", 0.45))),
}


def reply(*rows, name="q1", origin="local"):
    return {
        "id": name,
        "parameters": {"origin": origin},
        "outputs": [
            {"name": "intent", "data": [label for label, _ in rows]},
            {"name": "confidence", "data": [confidence for _, confidence in rows]},
        ],
    }


def judged(asked, status, answer):
    account = Account()
    account.answered("single", asked, status, answer, KNOWN)
    return account


@pytest.mark.parametrize(
    ("texts", "status", "answer"),
    [
        (["hi"], 200, reply(("greeting", 0.9))),
        (["hi"], 200, reply(("greeting", 0.9000001))),
        (["hi"], 200, reply(("greeting", 0.95), origin="cloud")),
        (["hi"], 200, reply(("greeting", 0.95), origin="cache")),
        (["hm"], 200, reply(("greeting", 0.45), origin="cloud")),
        (["hi", "hm"], 200, reply(("greeting", 0.9), ("greeting", 0.5), origin="local,cloud")),
        (["hi"], 429, {"error": "full"}),
        (["hi"], 504, {"error": "late"}),
    ],
)
def test_a_right_answer_keeps_every_promise(texts, status, answer):
    assert not judged(Asked("q1", texts), status, answer).breaches


@pytest.mark.parametrize(
    ("promise", "asked", "status", "answer"),
    [
        ("no answer with a foreign id", Asked("q1", ["hi"]), 200, reply(("greeting", 0.9), name="q2")),
        ("no wrong intent", Asked("q1", ["hi"]), 200, reply(("what_song", 0.9))),
        ("no wrong intent", Asked("q1", ["hi"]), 200, reply(("greeting", 0.8))),
        ("no wrong intent", Asked("q1", ["hi"]), 200, reply(("greeting", 0.95))),  # the cloud's, said to be local
        ("no wrong intent", Asked("q1", ["hm", "hi"]), 200, reply(("greeting", 0.9), ("what_song", 0.4))),
        ("a private text stays on the device", Asked("q1", ["hi"], True), 200, reply(("greeting", 0.95), origin="cloud")),
        ("each row has its answer", Asked("q1", ["hi", "hm"]), 200, reply(("greeting", 0.9))),
        ("a valid request is answered or refused", Asked("q1", ["hi"]), 500, {"error": "failed"}),
        ("a valid request is answered or refused", Asked("q1", ["hi"]), 400, {"error": "no"}),
        ("a refusal says why", Asked("q1", ["hi"]), 503, {}),
    ],
)  # fmt: skip
def test_a_wrong_answer_breaks_its_promise(promise, asked, status, answer):
    account = judged(asked, status, answer)
    assert promise in account.breaches
    assert account.examples[promise]


@pytest.mark.parametrize(
    ("series", "warm", "expected"),
    [
        ([50, 100, 100, 100, 104], 1, 0.04),
        ([50, 100, 104, 109, 110, 111, 111], 1, 0.067),
        ([50, 100, 100, 300, 100, 300, 100, 100], 1, 0.0),  # readings in a moment of work
        ([50, 60, 70, 100, 100, 100], 3, 0.0),
        ([50, 100], 1, 0.0),
    ],
)
def test_growth_compares_the_end_with_the_end_of_the_warm_up(series, warm, expected):
    assert growth(series, warm) == pytest.approx(expected, abs=0.001)


def test_growing_memory_breaks_a_promise_and_shows_in_words():
    report = Report(0, Account(), memory_mb={"daemon": [50, 100, 110, 120], "worker": [9, 10, 10, 10]})
    assert report.holds
    report.conclude()
    assert list(report.account.breaches) == ["memory is flat"]
    assert "daemon grew" in in_words(report)
    assert not json.loads(json.dumps(report.as_json()))["holds"]


def test_each_pair_of_cycles_has_every_fault():
    import random

    found = [fault for cycle in (4, 5) for fault in planned(cycle, random.Random(0))]
    assert sorted(kind for kind, _ in found) == sorted(FAULTS)
    assert all(0 < seconds <= LONGEST_S for _, seconds in found)
    assert len(found) == 2 * PER_CYCLE


class Daemon:
    """Answers as it is told: `answer` makes the bytes of a reply of a request's tree; None closes without one."""

    def __init__(self, answer):
        self.answer, self.tasks = answer, []

    async def ended(self):
        await asyncio.gather(*self.tasks)

    async def serve(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
                answer = self.answer(await reader.readexactly(length))
                if answer is None:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


def http(tree, status=200):
    body = json.dumps(tree).encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def right(body):
    if not body:
        return http({})  # it lives
    try:
        tree = json.loads(body)
        texts = tree["inputs"][0]["data"]
    except (ValueError, LookupError, TypeError):
        return http({"error": "malformed"}, 400)
    verdicts = [KNOWN[text].local for text in texts]
    return http(reply(*verdicts, name=tree["id"]))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(callers_module, "SLOW_S", 0.01)


def asked_of(tmp_path, answer, kinds=tuple(KINDS), count=3):
    """The account of callers of each kind, `count` times, at a daemon with these answers."""
    account = Account()

    async def scenario():
        daemon = Daemon(answer)
        path = str(tmp_path / "d.sock")
        server = await asyncio.start_unix_server(daemon.serve, path)
        callers = Callers((path, path), KNOWN, account, seed=0)
        for kind in kinds:
            for _ in range(count):
                callers.start(kind)
        await callers.finish()
        await callers.health()
        callers.pool.close()
        server.close()
        await daemon.ended()

    asyncio.run(scenario())
    return account


def test_callers_of_every_kind_are_content_with_right_answers(tmp_path):
    account = asked_of(tmp_path, right)
    assert not account.breaches
    assert {kind for kind, _ in account.endings} == set(KINDS)
    assert account.endings["pipelined", "answered"] == 9


@pytest.mark.parametrize(
    ("promise", "answer"),
    [
        ("each caller has an answer", lambda body: None),
        ("a daemon that runs says that it lives", lambda body: right(body) if body else http({}, 503)),
        ("no answer with a foreign id", lambda body: right(body.replace(b'"q', b'"x'))),
        ("an invalid request is refused", lambda body: http(reply(("greeting", 0.9)))),
    ],
)
def test_callers_notice_what_a_daemon_does_wrong(tmp_path, promise, answer):
    assert promise in asked_of(tmp_path, answer).breaches


def test_a_caller_without_an_answer_in_time_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(callers_module, "ANSWER_S", 0.05)
    account = asked_of(tmp_path, lambda body: b"", kinds=("single", "half-closed"), count=1)
    assert account.breaches["each caller has an answer"] == 2


def test_after_the_signal_only_what_was_sent_before_has_a_claim(tmp_path):
    account = Account()

    async def scenario():
        arrived, go = asyncio.Event(), asyncio.Event()

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            arrived.set()
            await go.wait()
            writer.transport.abort()

        path = str(tmp_path / "d.sock")
        server = await asyncio.start_unix_server(serve, path)
        callers = Callers((path, path), KNOWN, account, seed=0)
        callers.start("single")
        await arrived.wait()
        callers.stops_at = asyncio.get_running_loop().time()
        callers.start("single")
        go.set()
        await callers.finish()
        server.close()

    asyncio.run(scenario())
    assert account.endings == {("single", "no answer"): 1, ("single", "came after the end"): 1}
    assert account.breaches == {"each caller has an answer": 1}


def test_a_link_can_be_cut_and_fall_silent():
    async def scenario():
        daemon = Daemon(lambda body: http({}))
        server = await asyncio.start_server(daemon.serve, "127.0.0.1", 0)
        link = Link(server.sockets[0].getsockname()[1])
        address = f"127.0.0.1:{await link.open()}"
        connection = await Connection.open(address)
        assert (await connection.ask(get("/")))[0] == 200
        link.stall()
        await connection.send(get("/"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(connection.read())), 0.05)
        link.mend()
        assert (await reading)[0] == 200
        link.cut()
        with pytest.raises(callers_module.NoAnswerError):
            await connection.ask(get("/"))
        with pytest.raises((callers_module.NoAnswerError, OSError)):
            await (await Connection.open(address)).ask(get("/"))
        link.mend()
        connection = await Connection.open(address)
        assert (await connection.ask(get("/")))[0] == 200
        connection.close()
        await link.close()
        server.close()
        await daemon.ended()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_program_is_watched_frozen_and_ended(tmp_path):
    async def scenario():
        code = "import time; print('ready: yes', flush=True); print('Traceback (made up)', flush=True); time.sleep(60)"
        part = system.Program("part", [sys.executable, "-c", code], tmp_path)
        with system.none_left([part]):
            assert await part.line("ready:") == "ready: yes"
            assert await part.line("made up")
            assert part.alarms() == ["Traceback (made up)"]
            assert part.resident_mb() > 1
            part.send(signal.SIGSTOP)
            assert part.code is None
        assert part.code == -signal.SIGKILL
        silent = system.Program("silent", [sys.executable, "-c", "print('no')"], tmp_path)
        with pytest.raises(system.NotReadyError, match="silent did not get ready"):
            await silent.line("ready:")

    asyncio.run(scenario())


@pytest.mark.parametrize(("promise", "code"), [(None, 0), ("no wrong intent", 1)])
def test_the_exit_code_tells_whether_the_promises_were_kept(monkeypatch, capsys, promise, code):
    async def soak(folder, seconds, seed, say):
        report = Report(seed, Account(), seconds=seconds)
        if promise:
            report.account.breach(promise, "made up")
        return report

    monkeypatch.setattr(program, "soak", soak)
    assert program.main(["--duration", "5", "--seed", "7", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["holds"] is (code == 0)
    assert program.main(["--duration", "5"]) == code
    assert capsys.readouterr().out.rstrip().endswith("kept" if code == 0 else "broken")


def test_without_a_broker_there_is_no_soak(monkeypatch, capsys):
    monkeypatch.setattr(system.shutil, "which", lambda *_, **__: None)
    assert program.main([]) == 2
    assert "apt-get install mosquitto" in capsys.readouterr().err
