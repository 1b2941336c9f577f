"""The sandboxed load and the quarantine: once, within limits, the result remembered, and no child left behind."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnx import helper

from edge_runtime.bundles import isolated_child
from edge_runtime.bundles.folder import find_bundle, load_bundle
from edge_runtime.bundles.stoppable import run_stoppable
from edge_runtime.cli.main import main
from edge_runtime.config import (
    BatchSettings,
    Config,
    LimitSettings,
    ServerSettings,
    TrustSettings,
    load_config,
)
from edge_runtime.core.errors import BundleError, ConfigError
from edge_runtime.loading import sandbox
from edge_runtime.loading.model import load_model
from edge_runtime.loading.prepare import prepare
from edge_runtime.loading.quarantine import Quarantine
from edge_runtime.loading.sandbox import Ended, Limits, SandboxedLoad
from edge_runtime.loading.self_test import measure_latency_profile
from edge_runtime.runtime import Runtime
from tests.loading.hard_models import children, endless_loop, memory_bomb
from tests.loading.test_model import DOUBLE, tensor_bundle

pytestmark = pytest.mark.skipif(not sandbox.is_possible(), reason="this system cannot limit a child")
SHORT = Limits(cpu_s=1, wall_s=50)
NEVER = Limits(cpu_s=3600, wall_s=3600.0)  # a child that is not killed hangs the test
QUIET = ServerSettings(tcp="off", socket="off")


@pytest.fixture(autouse=True)
def no_child_stays():
    before = set(children())
    yield
    assert set(children()) <= before


@pytest.fixture
def no_child_starts(monkeypatch):
    """Call it, and from then on no child starts."""
    return lambda: monkeypatch.setattr(sys, "executable", "/nonexistent/python")


@pytest.fixture
def tiny(tmp_path):
    return tensor_bundle(tmp_path / "tiny", DOUBLE)


def refused(folder, quarantine, words):
    with pytest.raises(BundleError, match=words) as caught:
        load_model(folder, quarantine=quarantine)
    assert "\n" not in str(caught.value)
    assert str(folder.parent) not in str(caught.value)
    return str(caught.value)


def test_a_bundle_is_probed_once_and_its_figures_are_kept(tiny, tmp_path, no_child_starts):
    record = tmp_path / "state" / "trials.json"
    first = load_model(tiny, quarantine=Quarantine(record))
    no_child_starts()
    again = load_model(tiny, quarantine=Quarantine(record))
    assert again.memory_bytes == first.memory_bytes
    assert 1_000_000 < first.memory_bytes < 100_000_000  # a session costs ONNX Runtime about 10 MB
    refused(tiny, Quarantine(None), "could not be started")  # and a record that is off remembers nothing


@pytest.mark.parametrize(
    "changed",
    [
        lambda entries, digest: entries[digest].update(runner="onnxruntime 0.1"),
        lambda entries, digest: entries[digest].update(max_batch=4),
        lambda entries, digest: entries[digest].update(threads=0),
        lambda entries, digest: entries[digest]["report"].update(memory_bytes=-1),
        lambda entries, digest: entries.update({"other": entries.pop(digest)}),
    ],
)
def test_another_runner_or_bundle_or_a_larger_batch_is_probed_again(tiny, tmp_path, changed, no_child_starts):
    record = tmp_path / "trials.json"
    model = load_model(tiny, quarantine=Quarantine(record))
    entries = json.loads(record.read_bytes())
    changed(entries, model.digest)
    record.write_text(json.dumps(entries))
    no_child_starts()
    refused(tiny, Quarantine(record), "could not be started")


def test_a_smaller_batch_has_passed_with_the_larger(tiny, tmp_path, no_child_starts):
    record = tmp_path / "trials.json"
    load_model(tiny, quarantine=Quarantine(record))
    no_child_starts()
    assert load_model(tiny, max_batch=2, quarantine=Quarantine(record)).max_batch == 2


def test_a_damaged_file_is_logged_and_an_unwritable_one_stops_nobody(tiny, tmp_path, caplog):
    record = tmp_path / "trials.json"
    record.write_bytes(b'{"x": {"runner": 1}}')
    load_model(tiny, quarantine=Quarantine(record))
    assert "quarantine_file_reset" in caplog.text
    assert json.loads(record.read_bytes())
    (tmp_path / "file").write_text("")
    load_model(tiny, quarantine=Quarantine(tmp_path / "file" / "trials.json"))
    assert "quarantine_file_not_saved" in caplog.text


def test_results_of_two_processes_add_up(tiny, tmp_path):
    record = tmp_path / "trials.json"
    one, other = Quarantine(record), Quarantine(record)
    second = tensor_bundle(tmp_path / "second", DOUBLE, name="second")
    digests = {load_model(tiny, quarantine=one).digest, load_model(second, quarantine=other).digest}
    assert json.loads(record.read_bytes()).keys() == digests
    (digest, kept) = sorted(digests)
    one.release(digest)
    assert json.loads(record.read_bytes()).keys() == {kept}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_results_that_another_user_wrote_are_refused(tiny, tmp_path):
    record = tmp_path / "trials.json"
    load_model(tiny, quarantine=Quarantine(record))
    os.chown(record, 65534, 65534)
    with pytest.raises(ConfigError, match=r"\[trust\] record: trials\.json belongs to user 65534"):
        Quarantine(record)


def test_the_record_does_not_grow_for_ever(tiny, tmp_path):
    record = tmp_path / "trials.json"
    model = load_model(tiny, quarantine=Quarantine(record))
    (entry,) = json.loads(record.read_bytes()).values()
    record.write_text(json.dumps({f"{i:064x}": entry for i in range(64)}))
    load_model(tiny, quarantine=Quarantine(record))
    kept = json.loads(record.read_bytes())
    assert len(kept) == 64
    assert model.digest in kept


def test_two_failures_are_a_quarantine_until_the_release(tmp_path, no_child_starts):
    folder, record = memory_bomb(tmp_path / "bomb"), tmp_path / "trials.json"
    for _ in range(2):
        refused(folder, Quarantine(record), r"failed its first load: the model needed more than \d+ MB")
    no_child_starts()
    words = refused(
        folder,
        Quarantine(record, release_command="edge-runtime models verify --again"),
        "failed its first load 2",
    )
    assert "needed more than" in words
    assert "edge-runtime models verify --again" in words
    quarantine = Quarantine(record)
    quarantine.release(load_bundle(folder).digest)
    for forgetful in (quarantine, Quarantine(record, ignores_file=True), Quarantine(record, memory_mb=1)):
        refused(folder, forgetful, "could not be started")  # so it would be, if children started


def test_verify_again_releases_from_quarantine(tmp_path, tiny):
    config = tmp_path / "edge.toml"
    config.write_text(f'[trust]\nunsigned = true\nrecord = "{tmp_path}/versions.json"\n')
    digest = load_bundle(tiny).digest
    quarantine = Quarantine(tmp_path / "versions.trials.json")
    load_model(tiny, quarantine=quarantine)
    entries = json.loads((tmp_path / "versions.trials.json").read_bytes())
    entries[digest] |= {"report": None, "failures": ["crashed", "crashed"]}
    (tmp_path / "versions.trials.json").write_text(json.dumps(entries))

    def run(*words):
        return CliRunner().invoke(main, ["models", *words, str(tiny), "--config", str(config)])

    shown = run("show")
    assert (shown.exit_code, "verify --again" in shown.output) == (1, True)
    assert run("verify").exit_code == 0  # the signature and digests are well
    assert run("verify", "--again").exit_code == 0
    assert run("show").exit_code == 0


def test_a_refusal_of_our_own_checks_is_not_held_against_a_bundle(tmp_path):
    unfit = tensor_bundle(tmp_path / "unfit", DOUBLE, processing={"kind": "tensors", "version": "9"})
    for _ in range(3):
        refused(unfit, Quarantine(tmp_path / "trials.json"), "update the runtime")


def test_an_endless_model_is_ended_by_its_processor_time(tmp_path):
    folder = endless_loop(tmp_path / "endless")
    refused(folder, Quarantine(None, limits=SHORT), "used more than 1 s of processor time")


def test_memory_that_the_system_has_and_the_limit_forbids_is_refused(tmp_path):
    folder = memory_bomb(tmp_path / "bomb", side=2**13)  # 256 MiB
    refused(folder, Quarantine(None, limits=Limits(memory_bytes=100 << 20)), "needed more than 105 MB")


def test_a_silent_model_is_ended_by_the_clock(tmp_path):
    folder = endless_loop(tmp_path / "endless")
    refused(folder, Quarantine(None, limits=Limits(wall_s=0.2)), r"did not answer within 0\.2 s")


#: A report that passes every budget, or of no batch at all.
REPORT = (
    'print(\'{{"report": {{"load_ns": 1, "memory_bytes": {}, "latency_profile": [[1, 1]], \''
    '\'"max_batch": {}, "is_batch_invariant": true}}}}\')'
)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed the runner (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed the runner (SIGKILL)"),
        ("os.write(1, b'std::bad_alloc'); os.abort()", "needed more than 1 MB of memory"),
        ("sys.exit(7)", "crashed the runner (exit code 7)"),
        ("pass", "left without an answer"),
        ("print('{')", "left without an answer"),
        ("print('[' * 60000)", "left without an answer"),
        (REPORT.format(-1, 1), "left without an answer"),
        (REPORT.format(1, 0), "left without an answer"),
        ("os.close(1); os.close(2)\nwhile True: pass", "used more than 1 s of processor time"),
        ("while True: print('x' * 1000)", "crashed the runner (SIGKILL)"),
    ],
)
def test_however_a_child_ends_the_reason_is_named(tiny, monkeypatch, program, reason):
    limits = "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))"
    program = f"import os, signal, sys, resource\n{limits}\nprint('ready', flush=True)\n{program}"
    monkeypatch.setattr(isolated_child, "program_of", lambda module: program)
    bundle = load_bundle(tiny)
    short = Limits(cpu_s=1, memory_bytes=1_000_000)
    outcome = SandboxedLoad(bundle.manifest, bundle.files, threads=1, max_batch=8, limits=short).run()
    assert isinstance(outcome, Ended)
    assert outcome.reason == reason


def seen_by_a_child(tiny, monkeypatch, expression):
    """What an expression gives in a child just before it would touch the model."""
    program = (
        f"import sys\nsys.path += sys.argv[1:]\nimport os, resource\nprint(repr({expression}), flush=True)"
    )
    monkeypatch.setattr(isolated_child, "program_of", lambda module: program)
    with pytest.raises(BundleError) as caught:
        load_model(tiny, quarantine=Quarantine(None))
    return str(caught.value).partition("(")[2].rpartition(")")[0]


def test_a_child_inherits_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    with (tmp_path / "open").open("w"):
        assert (
            seen_by_a_child(tiny, monkeypatch, "sorted(map(int, os.listdir('/proc/self/fd')))[:-1]")
            == "[0, 1, 2]"
        )
    assert seen_by_a_child(tiny, monkeypatch, "os.listdir('.')") == "[]"
    assert seen_by_a_child(tiny, monkeypatch, "'SECRET' in os.environ") == "False"
    assert seen_by_a_child(tiny, monkeypatch, "sys.flags.isolated") == "1"
    assert seen_by_a_child(tiny, monkeypatch, "[p for p in sys.path if not os.path.isabs(p)]") == "[]"


def test_a_child_limits_itself(tiny, monkeypatch):
    setup = "__import__('importlib').import_module('edge_runtime.loading.sandbox_child')"
    question = "__import__('types').SimpleNamespace(cpu_s=30, wall_s=60, parent=os.getppid())"
    limits = (
        "[resource.getrlimit(getattr(resource, 'RLIMIT_' + n)) for n in ('CPU', 'FSIZE', 'CORE', 'NOFILE')]"
    )
    got = seen_by_a_child(tiny, monkeypatch, f"({setup}.limit_process({question}), {limits})[1]")
    assert got == "[(30, 31), (0, 0), (0, 0), (64, 64)]"


def test_a_child_whose_parent_went_ends_before_it_begins(tiny, monkeypatch):
    setup = "__import__('importlib').import_module('edge_runtime.loading.sandbox_child')"
    question = "__import__('types').SimpleNamespace(cpu_s=30, wall_s=60, parent=1)"
    got = seen_by_a_child(tiny, monkeypatch, f"{setup}.limit_process({question})")
    assert got == "exit code 1"


def test_cancelling_kills_the_child_and_blames_nobody(tmp_path):
    record = tmp_path / "trials.json"
    bundle = load_bundle(endless_loop(tmp_path / "endless"))

    async def cancelled():
        # Longer than this test waits for it, and short enough for a run of this test with the kill broken.
        quarantine = Quarantine(record, limits=Limits(cpu_s=25))
        admitting = asyncio.create_task(
            run_stoppable(lambda stop: quarantine.admit(bundle, threads=1, max_batch=8, stop=stop), "sandbox")
        )
        while not children():
            await asyncio.sleep(0)
        admitting.cancel()
        done, _ = await asyncio.wait({admitting}, timeout=15)
        assert done, "the child runs on"
        assert admitting.cancelled()
        assert not children()

    asyncio.run(cancelled())
    assert not record.exists()


def test_an_interrupt_kills_the_child(tmp_path):
    folder = endless_loop(tmp_path / "endless")
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_model(folder, quarantine=Quarantine(tmp_path / "trials.json", limits=NEVER))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert not (tmp_path / "trials.json").exists()


def wait_for(condition, process):
    until = time.monotonic() + 30
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
    return found


def serving(tmp_path, temporary=None):
    config = tmp_path / "edge.toml"
    folder = endless_loop(tmp_path / "endless")
    config.write_text(
        f'models = ["{folder}"]\n[server]\ntcp = "off"\nsocket = "{tmp_path}/s"\n[trust]\nunsigned = true\n'
    )
    command = [
        sys.executable,
        "-c",
        "from edge_runtime.cli.main import main; main()",
        "serve",
        "--config",
        str(config),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(temporary or tempfile.gettempdir())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    (child,) = wait_for(lambda: children(process.pid), process)
    wait_for(lambda: runs_in_no_folder(child), process)
    return process, child


def runs_in_no_folder(pid):
    """Whether a child has removed the folder it was started in, which comes before the model."""
    return str(Path(f"/proc/{pid}/cwd").readlink()).endswith("(deleted)")


def address_space(pid):
    (line,) = [x for x in Path(f"/proc/{pid}/limits").read_text().splitlines() if "address space" in x]
    return line.removeprefix("Max address space").strip()


def test_a_daemon_that_is_stopped_ends_the_sandbox(tmp_path):
    process, child = serving(tmp_path)
    process.terminate()
    _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert not is_alive(child)


def test_a_killed_daemon_leaves_nothing(tmp_path):
    temporary = tmp_path / "temporary"  # of its own: other tests use the system's folder at the same time
    temporary.mkdir()
    process, child = serving(tmp_path, temporary)
    # Its memory is limited: its runner is imported, the model is in its pipe, and running that never ends.
    wait_for(lambda: not address_space(child).startswith("unlimited"), process)
    process.kill()
    process.communicate(timeout=30)
    until = time.monotonic() + 15  # before its limit of processor time
    while is_alive(child):
        assert time.monotonic() < until
    assert [
        path for path in temporary.iterdir() if path.is_dir()
    ] == []  # the runner of models writes a file there


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_budget_holds_before_and_after_the_probe(tmp_path, tiny):
    record = tmp_path / "trials.json"
    words = refused(tiny, Quarantine(record, memory_mb=3), r"model 'tiny' needs \d+ MB")
    assert "[limits] model_memory_mb allows 3" in words
    assert json.loads(record.read_bytes())  # measured once: the figure is known, with or without a budget
    refused(tiny, Quarantine(record, memory_mb=3), "allows 3")
    assert load_model(tiny, quarantine=Quarantine(record, memory_mb=900)).memory_bytes > 3_000_000
    refused(
        memory_bomb(tmp_path / "bomb"), Quarantine(record, memory_mb=900), r"raise \[limits\] model_memory_mb"
    )


def test_the_runtime_keeps_the_budget_of_its_configuration(tmp_path):
    (tmp_path / "edge.toml").write_text("[limits]\nmodel_memory_mb = 5\n")
    config = load_config(tmp_path / "edge.toml")
    assert config.limits == LimitSettings(model_memory_mb=5)

    async def opened():
        async with Runtime.open(config):
            pass

    with pytest.raises(BundleError, match=r"model 'commands' needs \d+ MB; .* allows 5"):
        asyncio.run(opened())


def test_what_a_model_costs_is_shown_everywhere(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = Config(server=QUIET, batch=BatchSettings(max=4))

    async def opened():
        async with Runtime.open(config) as runtime:
            return runtime.status(), runtime.metrics().decode()

    status, metrics = asyncio.run(opened())
    (model,) = status["models"]
    assert model["memory_mb"] > 1
    assert model["load_ms"] > 0
    assert [rows for rows, _ in model["batch_latency_us"]] == [1, 2, 4]
    gauge = re.search(r'edge_model_memory_bytes{model="commands"} (\S+)', metrics)
    assert round(float(gauge[1]) / 1e6, 1) == model["memory_mb"]
    assert 'edge_model_load_seconds{model="commands"} 0.' in metrics
    assert "event=model_loaded model=commands" in caplog.text

    def run(*words):
        return CliRunner().invoke(main, ["models", *words])

    shown = json.loads(run("show", "commands", "--json").output)["loaded"]
    assert [rows for rows, _ in shown["batch_latency_us"]] == [1, 2, 4, 8]
    assert shown["memory_mb"] == model["memory_mb"]
    assert json.loads(run("list", "--json").output)[0]["memory_mb"] == model["memory_mb"]
    assert "1 in " in run("show", "commands").output
    assert "memory_mb" in run("list").output


def test_a_warm_up_within_its_budget_leaves_the_rest_to_the_trial(tiny):
    bundle = load_bundle(tiny)
    prepared = prepare(bundle.manifest, bundle.files, max_batch=8)
    assert [rows for rows, _ in measure_latency_profile(prepared)] == [1, 2, 4, 8]
    assert [rows for rows, _ in measure_latency_profile(prepared, 0)] == [1]
    assert all(ns > 0 for _, ns in measure_latency_profile(prepared))
    odd = prepare(bundle.manifest, bundle.files, max_batch=6)
    assert [rows for rows, _ in measure_latency_profile(odd)] == [1, 2, 4, 6]
    single = prepare(bundle.manifest, bundle.files, max_batch=1)
    assert [rows for rows, _ in measure_latency_profile(single)] == [1]


def test_a_shipped_model_warms_up_quickly():
    """Its start may not feel it: a hundred milliseconds at most, of which a small model needs a few."""
    bundle = load_bundle(find_bundle("commands"))
    prepared = prepare(bundle.manifest, bundle.files, max_batch=8)
    latency_profile = measure_latency_profile(prepared, 100_000_000)
    assert [rows for rows, _ in latency_profile] == [1, 2, 4, 8]


def test_a_dependent_model_is_said_aloud_once(tmp_path, caplog):
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Div", ["x", "m"], ["y"]),
    ]
    model = load_model(tensor_bundle(tmp_path / "tiny", nodes), quarantine=Quarantine(None))
    assert (model.max_batch, model.info.max_batch) == (1, 1)
    assert "neighbours changed an answer by" in model.batch_note
    assert caplog.text.count("batches_denied") == 1
    assert model.batch_note == model.info.batch_note


def test_passing_the_sandbox_replaces_no_signature(tmp_path, tiny, no_child_starts):
    """Nothing reaches a child before its signature held."""
    no_child_starts()
    config = Config(models=(str(tiny),), server=QUIET, trust=TrustSettings(record="off"))

    async def opened():
        async with Runtime.open(config):
            pass

    with pytest.raises(BundleError, match="not signed"):
        asyncio.run(opened())
