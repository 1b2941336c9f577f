"""One soak from its first process to its last: quiet answers, capacity, cycles of faults under load, the end under load."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from signal import SIGTERM

from examples.demo import free_port
from tools.soak import system
from tools.soak.account import Account, Asked, origins_of
from tools.soak.callers import ROWS_PER_CALLER, Callers
from tools.soak.connection import Connection, NoAnswerError, get, infer
from tools.soak.faults import Faults, planned
from tools.soak.link import Link
from tools.soak.report import Report
from tools.soak.texts import known_texts

OVERLOAD = 2.0
CYCLE_S = 15.0
CAPACITY_S = 3.0
#: The callers that measure capacity: they keep to the device, which is never idle and refuses little.
MEASURED, AT_ONCE = ("private", "bulk"), 2
#: The cap of a link's back-off, and what a breaker rests.
CLOUD_BACK_S = 30.0
PROBE_S = 0.25
END_S = 20.0


async def soak(folder: Path, seconds: float, seed: int, say: Callable[[str], None]) -> Report:
    """Soak for about `seconds` of traffic, three cycles at least; programs and their logs live in `folder`.

    Raises NotReadyError where a part cannot be started, ValueError where a quiet part gives no answer.
    """
    report = Report(seed, Account())
    async with _system(folder, say) as (parts, links, known):
        daemon = parts["daemon"]
        ready = await daemon.line("ready:")
        addresses = (str(folder / "daemon.sock"), ready.rpartition("http://")[2])
        callers = Callers(addresses, known, report.account, seed)
        per_s = await _measure(callers, report)
        say(f"capacity {report.capacity_rows_s:.0f} rows/s; {per_s:.0f} callers/s are twice as much")
        cycles = max(3, round(seconds / CYCLE_S))
        report.warm = max(1, cycles // 5)
        probes = asyncio.create_task(_probe(callers), name="probes")
        faults = Faults(parts, *links, callers)
        for cycle in range(cycles):
            await _cycle(cycle, callers, faults, per_s, report)
            await _rest(addresses[0], callers, parts, known, report)
            memory = ", ".join(f"{name} {series[-1]:.1f} MB" for name, series in report.memory_mb.items())
            broken = sum(report.account.breaches.values())
            say(f"cycle {cycle + 1}/{cycles}: {memory}; {report.account.rows_answered} rows; broken {broken}")
        await _stop_under_load(callers, per_s, parts, report)
        probes.cancel()
        await asyncio.gather(probes, return_exceptions=True)
        callers.pool.close()
    for part in parts.values():
        for line in part.alarms():
            report.account.breach("no log tells of a defect", f"{part.name}: {line}")
    report.held_back = callers.held_back
    report.single_s, report.health_s, report.lag_s = callers.single_s, callers.health_s, callers.lag_s
    report.conclude()
    return report


@contextlib.asynccontextmanager
async def _system(folder: Path, say: Callable[[str], None]) -> AsyncIterator[tuple]:
    """Broker, worker and daemon, the links between them, and what they answer when nothing else runs."""
    port = free_port()
    programs: list[system.Program] = []
    edge_link, worker_link = Link(port), Link(port)
    try:
        with system.none_left(programs):
            say("starting broker, worker and daemon")
            programs.append(broker := system.broker(folder, port))
            await broker.line("running")
            programs.append(worker := system.worker(folder, await worker_link.open()))
            programs.append(alone := system.daemon(folder, "cloud-alone", model=str(system.CLOUD_MODEL)))
            programs.append(daemon := system.daemon(folder, "daemon", broker_port=await edge_link.open()))
            for program in (worker, alone, daemon):
                await program.line("ready:")
            await _until_cloud(folder / "daemon.sock")
            known = await known_texts(folder / "daemon.sock", folder / "cloud-alone.sock")
            alone.send(SIGTERM)
            await alone.ended()
            yield {"broker": broker, "worker": worker, "daemon": daemon}, (edge_link, worker_link), known
    finally:
        await edge_link.close()
        await worker_link.close()


async def _until_cloud(socket: Path) -> None:
    while True:
        connection = await Connection.open(str(socket))
        _, status = await connection.ask(get("/status"))
        connection.close()
        if status["cloud"]["connected"]:
            return
        await asyncio.sleep(0.1)


async def _measure(callers: Callers, report: Report) -> float:
    """Rows per second of the device alone; returns the rate of callers that ask for twice as many."""
    await callers.in_turn(MEASURED, 1.0, AT_ONCE)
    started, rows = asyncio.get_running_loop().time(), report.account.rows_answered
    await callers.in_turn(MEASURED, CAPACITY_S, AT_ONCE)
    took_s = asyncio.get_running_loop().time() - started
    report.capacity_rows_s = (report.account.rows_answered - rows) / took_s
    return OVERLOAD * report.capacity_rows_s / ROWS_PER_CALLER


async def _probe(callers: Callers) -> None:
    while True:
        await callers.health()
        await callers.pause(PROBE_S)


async def _cycle(cycle: int, callers: Callers, faults: Faults, per_s: float, report: Report) -> None:
    """Some seconds of overload with faults one after the other."""
    chance = random.Random(f"{report.seed} {cycle}")
    loop = asyncio.get_running_loop()
    started, asked, answered = loop.time(), report.account.rows_asked, report.account.rows_answered
    traffic = asyncio.create_task(callers.at_rate(per_s, CYCLE_S), name="traffic")
    for kind, seconds in planned(cycle, chance):
        await asyncio.sleep(0.5)
        await faults.run(kind, seconds)
        report.faults[kind] += 1
    await traffic
    report.seconds += loop.time() - started
    await callers.finish()
    report.rows_asked += report.account.rows_asked - asked
    report.rows_answered += report.account.rows_answered - answered


async def _rest(
    address: str, callers: Callers, parts: dict[str, system.Program], known: dict, report: Report
) -> None:
    """Nobody asks: nothing waits, the cloud answers again, memory is what is kept for good."""
    loop = asyncio.get_running_loop()
    callers.pool.close()
    started = loop.time()
    unsure = [text for text in known if len(known[text].cloud) > 1]
    origin, number = "", 0
    while origin != "cloud" and loop.time() - started < CLOUD_BACK_S:
        asked = Asked(f"rest{number}", [unsure[number % len(unsure)]])
        connection = await Connection.open(address)
        try:
            status, reply = await connection.ask(infer(asked, cache=False))
        except NoAnswerError as error:
            report.account.breach("each caller has an answer", f"at rest: {error}")
            break
        connection.close()
        report.account.rows_asked += 1
        report.account.answered("at rest", asked, status, reply, known)
        origin = origins_of(reply, 1)[0]
        number += 1
        await asyncio.sleep(0.1)
    if origin == "cloud":
        report.cloud_back_s.append(loop.time() - started)
    else:
        report.account.breach(
            "the cloud is asked again after the faults", f"{CLOUD_BACK_S:.0f} s later: {origin}"
        )
    connection = await Connection.open(address)
    _, status = await connection.ask(get("/status"))
    connection.close()
    for model in status["models"]:
        if model["waiting"]:
            report.account.breach("nothing waits at rest", f"{model['name']}: {model['waiting']} rows")
    await asyncio.sleep(0.5)
    for name in ("daemon", "worker"):
        report.memory_mb.setdefault(name, []).append(parts[name].resident_mb())


async def _stop_under_load(
    callers: Callers, per_s: float, parts: dict[str, system.Program], report: Report
) -> None:
    """SIGTERM while callers ask: what was sent before is answered, and both tiers end with 0."""
    loop = asyncio.get_running_loop()
    traffic = asyncio.create_task(callers.at_rate(per_s, 3.0), name="traffic")
    await asyncio.sleep(2.0)
    callers.stops_at = loop.time()
    parts["daemon"].send(SIGTERM)
    await traffic
    await callers.finish()
    parts["worker"].send(SIGTERM)
    for name in ("daemon", "worker"):
        code = await parts[name].ended(END_S)
        if code != 0:
            report.account.breach("SIGTERM ends with 0", f"{name}: {'killed' if code is None else code}")
