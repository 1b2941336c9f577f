"""Starts broker, cloud worker and daemon, asks varied commands with and without the cloud, and stops it all.

Everything is real: each process is the one a user would start, on ports the system chose, in a folder
that is removed at the end.
"""

import contextlib
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.cli.intent import describe, intent_of
from edge_runtime.client import Client
from edge_runtime.core.errors import EdgeRuntimeError
from edge_runtime.core.messages import InferRequest, Tensor

COMMANDS = (
    "turn the lights off",
    "set an alarm for seven tomorrow morning",
    "what is the weather like in oslo",
    "play some jazz",
    "how much money is in my savings account",
    "remind me to call mum at six",
    "add milk and eggs to my shopping list",
    "what time is it in tokyo",
    "translate good night into italian",
    "book a table for four at an italian place",
    "how many calories are in a banana",
    "is my flight on time",
    "make the music louder",
    "what song is this",
    "tell me a joke",
    "flip a coin",
    "freeze my bank account",
    "i lost my luggage, what now",
    "the thing with my card happened again",
    "could you sort out that plastic for me",
    "how do i get there without the motorway",
    "why did they turn me down at the shop",
    "it is far too quiet in here",
    "what did i owe them again",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], log: Path, ready: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """A process, once its log shows `ready`; ended with SIGTERM."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        if ready is not None:
            wait_for(lambda: ready.encode() in log.read_bytes(), process, log)
        yield process
    finally:
        stop(process)


def credentials(folder: Path, username: str) -> str:
    """Make a user of the broker; return the lines with which a program logs in, or none without mosquitto's tools.

    A device that anybody could answer keeps no answer of the cloud in its cache.
    """
    program = shutil.which("mosquitto_passwd")
    if program is None:
        return ""
    password, passwords = folder / f"{username}.password", folder / "passwords"
    password.write_text(secrets.token_urlsafe())
    passwords.touch()
    subprocess.run([program, "-b", str(passwords), username, password.read_text()], check=True)
    passwords.chmod(0o644)  # mosquitto gives up root before it reads the file
    folder.chmod(0o711)
    return f'username = "{username}"\npassword_file = "{password}"\n'


def stop(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def wait_for(
    condition: "object",
    process: subprocess.Popen[bytes] | None,
    log: Path | None,
    limit_s: float = 90,  # a first start tries its model in a child
) -> None:
    assert callable(condition)
    ends = time.monotonic() + limit_s
    while not condition():
        if (process is not None and process.poll() is not None) or time.monotonic() > ends:
            text = log.read_text(errors="replace")[-2000:] if log is not None else ""
            raise SystemExit(f"demo: a part did not get ready.\n{text}")
        select.select([], [], [], 0.05)


def ask(client: Client, text: str) -> dict[str, object]:
    request = InferRequest((Tensor("text", "BYTES", (1,), (text.encode(),)),))
    answer: dict[str, object] = intent_of(client.infer("commands", request))
    return answer


def ask_all(title: str, client: Client) -> list[dict[str, object]]:
    print(f"\n{title}\n{'-' * len(title)}")
    answers = []
    for text in COMMANDS:
        answer = ask(client, text)
        answers.append(answer)
        print(f"{text:45} {describe(answer)}", flush=True)
    counts: dict[str, int] = {}
    for answer in answers:
        word = f"{answer['origin']}{' (degraded)' if answer['degraded'] else ''}"
        counts[word] = counts.get(word, 0) + 1
    print("=> " + ", ".join(f"{count} from {word}" for word, count in sorted(counts.items())))
    return answers


def main() -> int:
    broker_program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
    home = Path(__file__).resolve().parent.parent
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(prefix="edge-demo-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        port = free_port()
        edge = folder / "edge.toml"
        text = f'[server]\nsocket = "{folder}/edge.sock"\ntcp = "off"\n'
        if broker_program:
            text += f'[cloud]\nbroker = "mqtt://127.0.0.1:{port}"\ntenant = "home"\ndevice = "demo"\n'
            text += credentials(folder, "demo")
        edge.write_text(text)
        broker = None
        if broker_program:
            settings = folder / "mosquitto.conf"
            cloud_credentials = credentials(folder, "worker")
            admission = f"password_file {folder}/passwords" if cloud_credentials else "allow_anonymous true"
            settings.write_text(f"listener {port} 127.0.0.1\n{admission}\nset_tcp_nodelay true\n")
            broker = stack.enter_context(
                running([broker_program, "-c", str(settings)], folder / "broker.log", "running")
            )
            cloud = folder / "cloud.toml"
            cloud.write_text(
                f'broker = "mqtt://127.0.0.1:{port}"\nmodels = ["{home / "models" / "commands-cloud"}"]\n'
                + cloud_credentials
            )
            stack.enter_context(
                running(
                    [str(bin_folder / "cloud-fallback"), "serve", "--config", str(cloud)],
                    folder / "cloud.log",
                    "ready:",
                )
            )
        stack.enter_context(
            running(
                [str(bin_folder / "edge-runtime"), "serve", "--config", str(edge)],
                folder / "edge.log",
                "ready:",
            )
        )
        client = Client(folder / "edge.sock")
        if broker is None:
            print("No MQTT broker is installed: showing the local part only.")
            ask_all("Offline, no cloud configured", client)
        else:
            wait_for(lambda: _cloud(client)["connected"], None, folder / "edge.log")
            first = ask_all(
                "With the cloud: sure answers stay on the device, hard ones are escalated", client
            )
            ask_all("The same again: served from the cache", client)
            stop(broker)
            wait_for(lambda: not _cloud(client)["connected"], None, folder / "edge.log")
            stack.enter_context(restarted_cache(bin_folder, edge, folder))
            offline = ask_all(
                "Broker stopped: everything is answered locally, hard ones degraded",
                Client(folder / "off.sock"),
            )
            assert any(answer["origin"] == "cloud" for answer in first)
            assert all(answer["origin"] == "local" for answer in offline)
            assert any(answer["degraded"] for answer in offline)
    print("\nAll parts are stopped.")
    return 0


@contextlib.contextmanager
def restarted_cache(bin_folder: Path, edge: Path, folder: Path) -> Iterator[None]:
    """A second daemon with an empty cache, so that the offline answers are really computed."""
    offline = folder / "offline.toml"
    offline.write_text(edge.read_text().replace("edge.sock", "off.sock"))
    command = [str(bin_folder / "edge-runtime"), "serve", "--config", str(offline)]
    with running(command, folder / "offline.log", "ready:"):
        yield


def _cloud(client: Client) -> dict[str, object]:
    cloud: dict[str, object] = client.get("/status")["cloud"]
    return cloud


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgeRuntimeError as error:
        sys.exit(f"demo: {error}")
