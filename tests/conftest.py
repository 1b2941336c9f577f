"""Fixtures of the real things: a broker, a runtime, a server. Ports come from the system; nothing sleeps."""

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.processes import EDGE, running

#: How many examples a property is tried on. "quick" is for a developer who runs pytest after each change, "ci" for
#: `make test`, "soak" for `make soak`. "guards" is for copies that are broken on purpose: to shrink their failures would
#: take minutes, and nobody reads them. Machines are shared: no example has a time limit, and none is called too slow.
SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=5, **SHARED)
settings.register_profile("ci", max_examples=40, **SHARED)
settings.register_profile("soak", max_examples=2000, **SHARED)
settings.register_profile(
    "guards", max_examples=40, phases=(Phase.explicit, Phase.generate), derandomize=True, **SHARED
)
settings.load_profile(os.environ.get("EDGE_RUNTIME_TESTS", "quick"))

MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")


class Broker:
    """A mosquitto that can be stopped and started on its port."""

    def __init__(self, folder, port):
        self.port = port
        self.url = f"mqtt://127.0.0.1:{port}"
        self._config = folder / "mosquitto.conf"
        self._process = None
        self._configure(allow_anonymous=True)

    def _configure(self, *lines, allow_anonymous):
        everybody = "true" if allow_anonymous else "false"
        if os.geteuid() == 0:
            lines = ("user root", *lines)  # else it may not read what tests write
        rest = "".join(f"{line}\n" for line in lines)
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous {everybody}\nset_tcp_nodelay true\n{rest}"
        )

    def restart(self, *lines, allow_anonymous=True):
        """Start again with more lines in the configuration."""
        self.stop()
        self._configure(*lines, allow_anonymous=allow_anonymous)
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:  # ready when it accepts; the test's own time limit bounds this
            assert self._process.poll() is None, "mosquitto did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def passed_trials(request, tmp_path_factory):
    """The trial of the shipped edge bundle, made once per version of the runner and kept between runs."""
    from edge_runtime.bundles.folder import find_bundle, load_bundle
    from edge_runtime.loading.trial_record import FirstLoads

    runner = importlib.metadata.version("onnxruntime")
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    folder = cache.mkdir("trials") if cache else tmp_path_factory.mktemp("trials")
    path = folder / f"onnxruntime-{runner}.trials.json"
    bundle = load_bundle(find_bundle("commands"))
    first_loads = FirstLoads(path)
    if first_loads.report_of(bundle.digest) is None:
        first_loads.admit(bundle, threads=1, max_batch=bundle.manifest.batch.max)
    return path


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory, monkeypatch, passed_trials):
    """No test touches the state of the user who runs it, or tries the shipped bundle in a sandbox again."""
    home = tmp_path_factory.mktemp("state")
    for program in ("edge-runtime", "cloud-fallback"):
        (home / program).mkdir()
        shutil.copy(passed_trials, home / program / "versions.trials.json")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.fixture
def broker(tmp_path):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto mosquitto-clients")
    running = Broker(tmp_path, free_port())
    running.start()
    yield running
    running.stop()


@pytest.fixture
def config(tmp_path):
    """The file of a daemon that shares its addresses with nobody."""
    path = tmp_path / "edge.toml"
    path.write_text(f'[server]\nsocket = "{tmp_path}/e.sock"\ntcp = "127.0.0.1:0"\n')
    return path


@pytest.fixture
def daemon(config):
    with running(*EDGE, "serve", "--config", str(config)) as process:
        yield process


def pytest_terminal_summary(terminalreporter):
    """Say which guards of `tests/guards` were caught by a time-out only."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "caught by a time-out":
                terminalreporter.write_line(f"{name}: {value}")
