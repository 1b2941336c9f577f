"""The programs under test, as a user starts them: a broker, a worker, a daemon, in a folder of their own."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
CLOUD_MODEL = HOME / "models" / "commands-cloud"
#: A first start tries its model in a child; on a busy machine that takes half a minute.
READY_S = 120.0
EDGE = "from edge_runtime.cli.main import main; main()"
CLOUD = "from cloud_fallback.cli import main; main()"
#: Words in a log that no healthy program writes.
ALARMS = ("Traceback", "never retrieved", "was destroyed but it is pending", "event=request_failed")


class NotReadyError(Exception):
    """A part did not start; the message says which and shows the end of its log."""


class Program:
    """One process and its log."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environment = os.environ | {
            "PYTHONPATH": str(HOME),
            "XDG_STATE_HOME": str(folder / f"state-{name}"),  # a model's versions are remembered by its name
            "XDG_RUNTIME_DIR": str(folder),
        }
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def resident_mb(self) -> float:
        """Memory of its own: anonymous pages, so that pages of files that are read late do not count."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
        raise NotReadyError(f"{self.name} has no memory any more; it ended with {self.code}.\n{self.tail()}")

    def send(self, number: signal.Signals) -> None:
        if self.code is None:
            self._process.send_signal(number)

    async def line(self, words: str, limit_s: float = READY_S) -> str:
        """The first line of the log with `words`. Raises NotReadyError."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(asyncio.timeout(limit_s))
                while True:
                    for line in self.log.read_text(errors="replace").splitlines():
                        if words in line:
                            return line
                    if self.code is not None:
                        break
                    await asyncio.sleep(0.05)
            except TimeoutError:
                pass
        raise NotReadyError(f"{self.name} did not get ready.\n{self.tail()}")

    async def ended(self, limit_s: float = 20.0) -> int | None:
        """The exit code, None where the program had to be killed."""
        for _ in range(int(limit_s / 0.05)):
            if self.code is not None:
                return self.code
            await asyncio.sleep(0.05)
        self.kill()
        return None

    def kill(self) -> None:
        if self.code is None:
            self._process.kill()
        self._process.wait()

    def tail(self, characters: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def alarms(self) -> list[str]:
        """Lines of the log that no healthy program writes."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in ALARMS)]


def broker(folder: Path, port: int) -> Program:
    """Start mosquitto. Raises NotReadyError where it is not installed."""
    program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        raise NotReadyError("mosquitto is not installed; run: sudo apt-get install mosquitto")
    config = folder / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n{user}")
    return Program("broker", [program, "-c", str(config)], folder)


def worker(folder: Path, port: int) -> Program:
    """Start the cloud tier, at a broker or at a link to it."""
    config = folder / "cloud.toml"
    config.write_text(f'broker = "mqtt://127.0.0.1:{port}"\nmodels = ["{CLOUD_MODEL}"]\nthreads = 1\n')
    command = [sys.executable, "-c", CLOUD, "serve", "--config", str(config)]
    return Program("worker", command, folder)


def daemon(folder: Path, name: str, *, model: str = "commands", broker_port: int | None = None) -> Program:
    """Start a daemon whose socket is `NAME.sock`; without a broker's port it has no cloud."""
    config = folder / f"{name}.toml"
    text = f'models = ["{model}"]\n[server]\nsocket = "{folder}/{name}.sock"\ntcp = "127.0.0.1:0"\n'
    text += "[cache]\nmax_bytes = 65536\n"  # full, and evicting, within the warm-up
    if broker_port is not None:
        text += f'[cloud]\nbroker = "mqtt://127.0.0.1:{broker_port}"\ntenant = "home"\ndevice = "soak"\n'
    config.write_text(text)
    return Program(name, [sys.executable, "-c", EDGE, "serve", "--config", str(config)], folder)


@contextlib.contextmanager
def none_left(programs: list[Program]) -> Iterator[None]:
    """Whatever happens, no process is left."""
    try:
        yield
    finally:
        for program in programs:
            program.send(signal.SIGCONT)
            program.kill()
