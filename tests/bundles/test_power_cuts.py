"""What ran is remembered through a kill at any moment: there is no way back to an older version by pulling the plug."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest

from edge_runtime.bundles import signing
from edge_runtime.bundles.folder import sign_bundle
from edge_runtime.config import load_config
from edge_runtime.core.errors import BundleError
from edge_runtime.runtime import Runtime
from tests.loading.test_model import DOUBLE, tensor_bundle

#: Opens a runtime and is killed by what replaces a function, at its call or after it.
PROGRAM = """
import asyncio, os, pathlib, signal, sys
from edge_runtime.storage import record_file
from edge_runtime.config import load_config
from edge_runtime.runtime import Runtime

async def opened():
    async with Runtime.open(load_config(pathlib.Path(sys.argv[1]))):
        print("open")

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

real = record_file.write_durably
def kill_after_writing(name):
    def write(path, content):
        real(path, content)
        if path.name == name:
            kill()
    record_file.write_durably = write

exec(sys.argv[2])
asyncio.run(opened())
"""


class Device:
    def __init__(self, folder):
        self.private, public = signing.generate()
        (folder / "own.pub").write_bytes(public)
        self.bundle, self.record, self.config = (
            folder / "tiny",
            folder / "state" / "v.json",
            folder / "edge.toml",
        )
        self.config.write_text(
            f'models = ["{self.bundle}"]\n[server]\ntcp = "off"\nsocket = "off"\n'
            f'[trust]\nkeys = ["{folder}/own.pub"]\nrecord = "{self.record}"\n'
        )

    def install(self, version):
        tensor_bundle(self.bundle, DOUBLE, version=version)
        sign_bundle(self.bundle, self.private)

    def start(self):
        async def opened():
            async with Runtime.open(load_config(self.config)) as runtime:
                return runtime.status()["models"][0]["version"]

        return asyncio.run(opened())

    def start_and_be_killed(self, how):
        command = [sys.executable, "-c", PROGRAM, str(self.config), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path)


def test_a_version_that_was_recorded_and_never_served_counts(device):
    device.install("4")
    assert device.start() == "4"
    device.install("5")
    device.start_and_be_killed("kill_after_writing('v.json')")
    device.install("4")
    with pytest.raises(BundleError, match="version 5 has run"):
        device.start()
    device.install("5")
    assert device.start() == "5"


def test_a_kill_before_the_record_is_in_place_leaves_the_former_one(device):
    device.install("4")
    device.start()
    before = device.record.read_bytes()
    device.install("5")
    device.start_and_be_killed(
        "replace = pathlib.Path.replace\npathlib.Path.replace = lambda path, to: kill() if to.name == 'v.json' else replace(path, to)"
    )
    assert device.record.read_bytes() == before
    device.install("3")
    with pytest.raises(BundleError, match="version 4 has run"):
        device.start()
    device.install("5")
    assert device.start() == "5"


def test_a_kill_after_a_probe_keeps_its_result(device):
    device.install("1")
    device.start_and_be_killed("kill_after_writing('v.trials.json')")
    (entry,) = json.loads(device.record.with_suffix(".trials.json").read_bytes()).values()
    assert entry["report"]["max_batch"] == 8
    assert not device.record.exists()
    assert device.start() == "1"
