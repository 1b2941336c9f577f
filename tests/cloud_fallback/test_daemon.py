"""The worker as a process: build, run, drain."""

import signal
import subprocess

import pytest

from tests.processes import CLOUD, running, until_line


@pytest.fixture
def config(tmp_path, broker):
    path = tmp_path / "cloud.toml"
    path.write_text(f'broker = "{broker.url}"\nmodels = ["commands"]\nworker = "w1"\n')
    return path


def test_the_worker_says_when_it_is_ready_and_drains_at_sigterm(config, broker):
    with running(*CLOUD, "serve", "--config", str(config), ready="") as worker:
        assert until_line(worker, "ready:") == f"ready: commands at {broker.url}\n"
        worker.send_signal(signal.SIGTERM)
        until_line(worker, "event=draining")
        until_line(worker, "event=stopped")
        assert worker.wait(20) == 0


def test_sigterm_ends_a_worker_that_never_found_its_broker(config, broker):
    broker.stop()
    with running(*CLOUD, "serve", "--config", str(config), ready="refused") as worker:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0


def test_a_configuration_is_checked_with_the_files_it_names(tmp_path):
    path = tmp_path / "cloud.toml"
    for text, code, words in (
        ('models = ["commands"]', 0, "ok: "),
        ('models = ["commands"]\npassword_file = "/nowhere"', 2, "/nowhere cannot be read"),
        ('models = ["./nowhere"]', 2, "nowhere"),
    ):
        path.write_text(text)
        done = subprocess.run(
            [*CLOUD, "config", "check", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code
        assert words in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("serve", "--config", "/nonexistent.toml"), 2, "cannot be read"),
        (("serve", "--broker", "http://x"), 2, "expected mqtt://HOST"),
        (("config", "check", "/nonexistent.toml"), 2, "cannot be read"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, code, words):
    done = subprocess.run([*CLOUD, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_that_cannot_be_used_ends_the_worker_with_its_reason(config, tmp_path):
    config.write_text(f'models = ["{tmp_path}/nowhere"]\n')
    done = subprocess.run(
        [*CLOUD, "serve", "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
