# ruff: noqa: ASYNC110, ASYNC220, ASYNC221 - faults are made one at a time, and nobody waits for this loop meanwhile
"""Break the link between a device and its workers in every way that was met, and time how long callers notice.

    python -m tools.link_faults                    all faults, about three minutes
    python -m tools.link_faults stall killed       some of them
    python -m tools.link_faults --json route

A real broker (mosquitto) and real worker processes, whose engine copies its input; one device in this process, whose
callers give the cloud two seconds. Faults:

    stall     the broker is frozen for 8 s under 30 requests of four callers a second
    killed    one of two workers is killed (SIGKILL); one caller asks six times a second
    frozen    one of two workers is frozen (SIGSTOP) for 30 s; one caller asks six times a second
    alone     the only worker is frozen; one request every 3 s, eight times; then it goes on
    restart   the broker is away for 0.3, 2 and 10 s
    hurry     twenty callers give 5 ms to a healthy cloud, then five patient ones ask
    route     the route to the broker dies silently for 30 s under traffic (in a network of its own: needs `unshare`, `ip`)
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cloud_fallback.config import CloudConfig
from cloud_fallback.worker import Loaded, Worker
from edge_runtime.core.escalation.decision import CloudUnavailable
from edge_runtime.core.messages import InferRequest, Signature, Tensor, TensorSpec
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.model_runner import ModelRunner
from edge_runtime.uplink.uplink import Uplink

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
REQUEST = InferRequest((Tensor("x", "FP32", (1, 2), np.float32([[1, 2]])),))
TIMEOUT_S = 2.0
MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")


async def work(url: str, name: str) -> None:
    """Be a worker until SIGTERM."""
    processor = Tensors(SIGNATURE, version="1")
    runner = ModelRunner("echo", processor, FakeEngine(), is_inline=True)
    model = SimpleNamespace(
        name="echo", version="1", processor=processor, info=SimpleNamespace(signature=SIGNATURE)
    )
    worker = Worker(
        CloudConfig(broker=url, worker=name, models=("echo",)),
        "",
        {"echo": Loaded(model, runner)},  # type: ignore[arg-type] - what the worker reads of a model
    )
    worker.connection.start()
    await worker.wait_ready(30)
    print("ready", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await worker.drain()
    await runner.close()


class Broker:
    """A mosquitto that can be stopped, started and frozen."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.5:{self.port}"
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.5\nallow_anonymous true\nset_tcp_nodelay true\n"
            + ("user root\n" if os.geteuid() == 0 else "")
        )
        self.start()

    def start(self) -> None:
        if MOSQUITTO is None:
            sys.exit("link_faults: mosquitto is not installed; run: apt-get install mosquitto")
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            try:
                socket.create_connection(("127.0.0.5", self.port), 1).close()
            except OSError:
                if self.process.poll() is not None:
                    sys.exit("link_faults: mosquitto did not start")
            else:
                return

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class Device:
    """An uplink and what its callers met."""

    def __init__(self, url: str) -> None:
        settings = SimpleNamespace(
            broker=url, tenant="home", timeout_s=TIMEOUT_S, username="", password_file="", ca_file="", cert_file="",
            key_file="",
        )  # fmt: skip
        self.uplink = Uplink(settings, device="d1")
        self.answered = 0
        self.fell_back: dict[str, int] = {}
        self.slowest_s = 0.0

    async def ask(self, timeout_s: float = TIMEOUT_S) -> bool:
        began_ns = time.monotonic_ns()
        try:
            await self.uplink.ask("echo", REQUEST, deadline_ns=began_ns + int(timeout_s * 1e9))
        except CloudUnavailable as failure:
            self.fell_back[failure.reason.value] = self.fell_back.get(failure.reason.value, 0) + 1
            return False
        finally:
            self.slowest_s = max(self.slowest_s, (time.monotonic_ns() - began_ns) / 1e9)
        self.answered += 1
        return True

    async def until_answered(self, every_s: float = 0.05) -> float:
        """Seconds until the cloud answers a caller again; callers come every so often."""
        began_s = time.monotonic()
        while not await self.ask():
            await asyncio.sleep(every_s)
        return round(time.monotonic() - began_s, 2)

    def met(self) -> dict[str, object]:
        return {
            "answered": self.answered,
            "fell_back": self.fell_back,
            "slowest_s": round(self.slowest_s, 2),
            "resent": self.uplink.counters["resent"],
        }


@asynccontextmanager
async def link(
    folder: Path, workers: int
) -> AsyncIterator[tuple[Broker, list[subprocess.Popen[str]], Device]]:
    """A broker, workers that are ready, and a device that has been answered."""
    broker = Broker(folder)
    programs = []
    try:
        for number in range(workers):
            command = [sys.executable, "-m", "tools.link_faults", "--worker", broker.url, f"w{number}"]
            programs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for program in programs:
            assert program.stdout is not None
            await asyncio.to_thread(program.stdout.readline)
        device = Device(broker.url)
        await device.uplink.start()
        await device.uplink.wait_connected(10)
        for _ in range(10):
            await device.ask()
        device.answered, device.fell_back, device.slowest_s = 0, {}, 0.0
        try:
            yield broker, programs, device
        finally:
            await device.uplink.close()
    finally:
        for program in programs:
            program.send_signal(signal.SIGCONT)
            program.terminate()
            program.wait()
            if program.stdout is not None:
                program.stdout.close()
        broker.stop()


async def stall(folder: Path) -> dict[str, object]:
    async with link(folder, 1) as (broker, _, device):
        broker.process.send_signal(signal.SIGSTOP)
        callers = []
        for _ in range(30):
            callers.append(asyncio.create_task(device.ask()))
            await asyncio.sleep(8 / 30)
        broker.process.send_signal(signal.SIGCONT)
        first_s = await device.until_answered()
        await asyncio.gather(*callers)
        return {"first_answer_after_s": first_s, **device.met()}


async def _one_of_two(folder: Path, number: signal.Signals, seconds: float) -> dict[str, object]:
    async with link(folder, 2) as (_, workers, device):
        workers[0].send_signal(number)
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            await device.ask()
            await asyncio.sleep(1 / 6)
        return device.met()


async def killed(folder: Path) -> dict[str, object]:
    return await _one_of_two(folder, signal.SIGKILL, 10)


async def frozen(folder: Path) -> dict[str, object]:
    return await _one_of_two(folder, signal.SIGSTOP, 30)


async def alone(folder: Path) -> dict[str, object]:
    async with link(folder, 1) as (_, workers, device):
        workers[0].send_signal(signal.SIGSTOP)
        waited = []
        for _ in range(8):
            began_s = time.monotonic()
            await device.ask()
            waited.append(round(time.monotonic() - began_s, 2))
            await asyncio.sleep(3)
        why_not = device.uplink.status()["why_not"]
        workers[0].send_signal(signal.SIGCONT)
        return {
            "callers_waited_s": waited,
            "status": why_not,
            "first_answer_after_s": await device.until_answered(),
        }


async def restart(folder: Path) -> dict[str, object]:
    after = {}
    for away_s in (0.3, 2.0, 10.0):
        async with link(folder, 1) as (broker, _, device):
            await asyncio.sleep(11)  # connections are stable, as they are in the field
            broker.stop()
            await asyncio.sleep(away_s)
            broker.start()
            after[f"away_{away_s:g}_s"] = await device.until_answered()
    return {"first_answer_after_s": after}


async def hurry(folder: Path) -> dict[str, object]:
    async with link(folder, 1) as (_, workers, device):
        workers[0].send_signal(signal.SIGSTOP)
        for _ in range(20):
            await device.ask(0.005)
        workers[0].send_signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        patient = [await device.ask() for _ in range(5)]
        return {"patient_answered": sum(patient), "late_replies": device.uplink.counters["late_reply"]}


async def route(folder: Path) -> dict[str, object]:
    """Packets of the broker to this side vanish; a rule of the network's routing drops them."""
    rule = ["from", "127.0.0.5", "to", "127.0.0.1", "blackhole", "pref", "10"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "rule", "add", "pref", "100", "lookup", "local"], check=True)
    subprocess.run(["ip", "rule", "del", "pref", "0"], check=True)
    async with link(folder, 1) as (_, _, device):
        subprocess.run(["ip", "rule", "add", *rule], check=True)
        began_s = time.monotonic()
        lost_s = None
        while time.monotonic() - began_s < 30:
            await device.ask()
            if lost_s is None and not device.uplink.link_state().is_connected:
                lost_s = round(time.monotonic() - began_s, 1)
            await asyncio.sleep(0.25)
        subprocess.run(["ip", "rule", "del", *rule], check=True)
        return {
            "noticed_after_s": lost_s,
            **device.met(),
            "first_answer_after_s": await device.until_answered(),
        }


FAULTS: dict[str, Callable[[Path], Awaitable[dict[str, object]]]] = {
    "stall": stall, "killed": killed, "frozen": frozen, "alone": alone, "restart": restart, "hurry": hurry,
    "route": route,
}  # fmt: skip


def in_own_network(fault: str) -> dict[str, object]:
    """Run a fault in a network namespace, where rules may be made."""
    command = ["unshare", "-rn", sys.executable, "-m", "tools.link_faults", "--json", "--here", fault]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1] if done.stderr else "unshare failed"}
    found: dict[str, object] = json.loads(done.stdout)[fault]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.link_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="which; without one, all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        asyncio.run(work(*given.worker))
        return
    unknown = [fault for fault in given.faults if fault not in FAULTS]
    if unknown:
        parser.error(f"unknown fault {unknown[0]}; there are {', '.join(FAULTS)}")
    results = {}
    for fault in given.faults or FAULTS:
        if fault == "route" and not given.here:
            results[fault] = in_own_network(fault)
        else:
            with tempfile.TemporaryDirectory(prefix="link-") as folder:
                results[fault] = asyncio.run(FAULTS[fault](Path(folder)))
        if not given.json:
            print(f"{fault:8} {json.dumps(results[fault])}", flush=True)
    if given.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
