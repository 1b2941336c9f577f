"""The one launcher of children: nothing that lies around runs in them, and no answer of theirs is taken on trust."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime.bundles import folder as folder_module
from edge_runtime.bundles import isolated_child, signing
from edge_runtime.bundles.folder import (
    MANIFEST,
    SIGNATURE,
    Trust,
    load_bundle,
    sign_bundle,
    write_bundle,
)
from edge_runtime.bundles.isolated_child import IsolatedChild
from edge_runtime.bundles.stoppable import Stop, run_stoppable
from edge_runtime.cli.main import main
from edge_runtime.core.errors import BundleError
from tests.bundles.test_folder import FIELDS, PAYLOADS
from tests.loading.hard_models import children

PRIVATE, PUBLIC = signing.generate()
OTHER_PRIVATE, OTHER_PUBLIC = signing.generate()
TRUST = Trust((PUBLIC, OTHER_PUBLIC))
#: What a file in a download would do: leave a mark, and answer as the checker does.
HOSTILE = "import os, sys; open({mark!r}, 'w').close(); sys.stdout.write({answer!r}); sys.stdout.flush(); os._exit(0)"
MODULES = (
    "json",
    "base64",
    "hashlib",
    "encodings",
    "sitecustomize",
    "usercustomize",
    "cryptography",
    "msgspec",
)


@pytest.fixture(autouse=True)
def no_child_stays():
    before = set(children())
    yield
    assert set(children()) <= before


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "tiny", FIELDS, PAYLOADS)
    sign_bundle(tmp_path / "tiny", PRIVATE)
    return tmp_path / "tiny"


@pytest.fixture
def forged(bundle):
    """A bundle whose manifest was changed after it was signed."""
    manifest = bundle / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"licence": "', b'"licence": "X'))
    return bundle


@pytest.fixture
def download(tmp_path):
    """A folder with a hostile file in place of each module, and the mark that any of them leaves."""
    folder, mark = tmp_path / "download", tmp_path / "mark"
    folder.mkdir()
    for name in (*MODULES, "edge_runtime"):
        source = HOSTILE.format(mark=str(mark), answer=signing.key_id(PUBLIC))
        if name in ("cryptography", "edge_runtime"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(source)
        else:
            (folder / f"{name}.py").write_text(source)
    return folder, mark


@pytest.mark.parametrize("way", ["cwd", "first on the path", "relative on the path", "environment"])
def test_nothing_in_the_working_folder_or_the_environment_runs_in_the_checker(
    forged, download, monkeypatch, way
):
    folder, mark = download
    monkeypatch.chdir(folder)
    if way == "first on the path":
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    if way == "relative on the path":
        monkeypatch.setattr(sys, "path", ["", ".", *sys.path])
    if way == "environment":
        for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE"):
            monkeypatch.setenv(name, str(folder))
    with pytest.raises(BundleError, match="not what was signed"):
        load_bundle(forged, TRUST)
    assert not mark.exists()
    assert not list(folder.rglob("*.pyc"))


def test_a_folder_on_the_path_takes_no_module_of_the_standard_library_away(forged, download, monkeypatch):
    folder, mark = download
    for name in (
        "cryptography",
        "edge_runtime",
    ):  # of these, the first on the path counts, as in this process
        shutil.rmtree(folder / name)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    with pytest.raises(BundleError, match="not what was signed"):
        load_bundle(forged, TRUST)
    assert not mark.exists()


def test_models_verify_in_a_download_refuses_what_the_download_vouches_for(forged, download, tmp_path):
    folder, mark = download
    (tmp_path / "own.pub").write_bytes(PUBLIC)
    (tmp_path / "edge.toml").write_text(f'[trust]\nkeys = ["{tmp_path}/own.pub"]\n')
    # As the installed program starts: its own folder is first on the path, not the working folder.
    program = "import sys; sys.path.pop(0); from edge_runtime.cli.main import main; main()"
    command = [sys.executable, "-c", program, "models", "verify", str(forged), "--config", "../edge.toml"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "not what was signed" in done.stderr) == (1, True), done.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "00" * 16,
        "",
        "ok",
        signing.key_id(PUBLIC) + "\n",
        signing.key_id(PUBLIC).upper(),
        signing.key_id(OTHER_PUBLIC),  # trusted, and it signed nothing
        signing.key_id(PUBLIC) * 2,
        "x" * 100_000,
    ],
    ids=[
        "zeros",
        "nothing",
        "a word",
        "a line",
        "upper case",
        "another key",
        "twice",
        "too long",
    ],  # keys are new in each run
)
def test_only_the_id_of_a_trusted_key_whose_record_is_there_is_an_answer(bundle, monkeypatch, answer):
    program = f"import sys; sys.stdin.buffer.read(); sys.stdout.write({answer!r})"
    monkeypatch.setattr(isolated_child, "program_of", lambda module: program)
    with pytest.raises(BundleError, match="could not be checked"):
        load_bundle(bundle, TRUST)


@pytest.mark.parametrize("end", ["sys.exit(1)", "sys.exit(4)", "os.abort()", "raise ImportError('no wheel')"])
def test_an_answer_of_a_checker_that_failed_is_none(bundle, monkeypatch, end):
    program = f"import os, sys; sys.stdout.write({signing.key_id(PUBLIC)!r}); sys.stdout.flush(); {end}"
    monkeypatch.setattr(isolated_child, "program_of", lambda module: program)
    with pytest.raises(BundleError, match="could not be checked"):
        load_bundle(bundle, TRUST)


def test_a_checker_that_hangs_is_ended(bundle, monkeypatch):
    monkeypatch.setattr(isolated_child, "program_of", lambda module: "import time; time.sleep(25)")
    monkeypatch.setattr(signing, "_CHECK_S", 0.2)
    with pytest.raises(BundleError, match=r"could not be checked within 0\.2 s"):
        load_bundle(bundle, TRUST)


def test_a_system_that_starts_no_child_refuses(bundle, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(BundleError, match="could not be checked"):
        load_bundle(bundle, TRUST)


def test_a_system_without_a_place_for_temporary_files_refuses(bundle, monkeypatch):
    def nowhere(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", nowhere)
    with pytest.raises(BundleError, match="No usable temporary directory"):
        load_bundle(bundle, TRUST)


def test_a_child_starts_with_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setattr(sys, "path", [*sys.path, "lib", ""])
    program = (
        "import os, sys\n"
        "print(sys.flags.isolated, sys.flags.no_site, sys.flags.dont_write_bytecode)\n"
        "print(sorted(os.environ.keys() - {'LC_CTYPE'}))\n"
        "print(os.listdir('.'), os.path.isabs(os.getcwd()), os.getsid(0) == os.getpid())\n"
        "print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])\n"
        "before = list(sys.path); sys.path += sys.argv[1:]\n"
        "print(before == [p for p in before if os.path.isabs(p)], all(map(os.path.isabs, sys.path)))\n"
        "import json; print(os.path.dirname(json.__file__) in [p + '/json' for p in before])\n"
    )
    monkeypatch.setattr(isolated_child, "program_of", lambda module: program)
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        done = IsolatedChild("x", limit_s=60, max_output_bytes=10_000).run(lambda pipe: None)
    assert done.output.decode().splitlines() == [
        "1 1 1",
        "['LD_LIBRARY_PATH', 'MALLOC_ARENA_MAX', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH']",
        "[] True True",
        "[0, 1, 2]",
        "True True",
        "True",
    ]
    assert (done.code, done.is_late, done.is_killed) == (0, False, False)


def test_a_child_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    IsolatedChild("edge_runtime.bundles.signing", limit_s=60, max_output_bytes=10_000).run(lambda pipe: None)
    assert list(tmp_path.iterdir()) == []


def test_a_working_folder_that_was_removed_stops_no_child(bundle, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_bundle(bundle, TRUST).signed_by == signing.key_id(PUBLIC)


@pytest.mark.parametrize(
    "name", ["json.py", "README.md", "model.onnx", "x.zst", "a\nb", ".zst", "MODEL.onnx.zst"]
)
def test_a_foreign_file_in_the_bundle_is_found_before_its_signature_is_checked(bundle, monkeypatch, name):
    checked = []
    monkeypatch.setattr(signing, "verify_isolated", lambda *_, **__: checked.append(True))
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match="is not listed"):
        load_bundle(bundle, TRUST)
    assert checked == []


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
        PUBLIC.replace(b"MCowBQYDK2VwAyEA", b"MCowBQYDK2VuAyEA"),  # X25519
        PUBLIC.replace(b"PUBLIC", b"PRIVATE"),
        PRIVATE,
        PUBLIC.replace(b"\n-----END", b"AAAA\n-----END"),
        PUBLIC.replace(b"\n-----END", b"*\n-----END"),
    ],
)
def test_what_is_no_public_key_is_refused_without_any_library(pem):
    with pytest.raises(BundleError, match="no Ed25519 public key"):
        signing.key_id(pem)


def test_a_key_file_may_hold_carriage_returns_and_words_around_the_key():
    noisy = b"key of the kitchen\r\n" + PUBLIC.replace(b"\n", b"\r\n") + b"\r\n"
    assert signing.key_id(noisy) == signing.key_id(PUBLIC)


# Off the event loop


def load_stoppable(path, trust=None):
    return run_stoppable(lambda stop: load_bundle(path, trust, stop=stop), "load-bundle")


def run(scenario):
    async def limited():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(limited())


def test_a_bundle_is_verified_and_unpacked_while_the_event_loop_runs(bundle, monkeypatch):
    """The unpacking waits for the loop, which a blocking call would never let run."""
    loop_ran = []
    real = folder_module.decompress

    async def scenario():
        gate = threading.Event()

        def decompress(*args, **options):
            assert gate.wait(30), "the event loop stood still"
            loop_ran.append(True)
            return real(*args, **options)

        monkeypatch.setattr(folder_module, "decompress", decompress)
        loading = asyncio.create_task(load_stoppable(bundle, TRUST))
        await asyncio.sleep(0)
        gate.set()
        loaded = await loading
        assert loaded.files == PAYLOADS
        assert loaded.signed_by == signing.key_id(PUBLIC)

    run(scenario)
    assert loop_ran


def test_a_cancelled_check_leaves_no_child(bundle, monkeypatch):
    # Longer than this test waits for it, and short enough for a run of this test with the kill broken.
    monkeypatch.setattr(isolated_child, "program_of", lambda module: "import time; time.sleep(25)")

    async def scenario():
        before = set(children())
        loading = asyncio.create_task(load_stoppable(bundle, TRUST))
        while set(children()) <= before:
            await asyncio.sleep(0)
        loading.cancel()
        done, _ = await asyncio.wait({loading}, timeout=15)
        assert done, "the child runs on"
        assert loading.cancelled()
        assert set(children()) <= before

    run(scenario)


def test_a_cancelled_load_unpacks_no_further_payload(bundle, monkeypatch):
    unpacked, stopped = [], threading.Event()
    real_decompress, real_set = folder_module.decompress, Stop.set

    def set_and_tell(stop):
        real_set(stop)
        stopped.set()

    monkeypatch.setattr(Stop, "set", set_and_tell)

    async def scenario():
        loading = asyncio.create_task(load_stoppable(bundle))
        loop = asyncio.get_running_loop()

        def decompress(stored, **options):
            unpacked.append(stored)
            loop.call_soon_threadsafe(loading.cancel)
            assert stopped.wait(30)
            return real_decompress(stored, **options)

        monkeypatch.setattr(folder_module, "decompress", decompress)
        with pytest.raises(asyncio.CancelledError):
            await loading

    run(scenario)
    assert len(PAYLOADS) > 1
    assert len(unpacked) == 1


def test_the_command_line_names_the_signer_as_before(bundle, tmp_path):
    (tmp_path / "own.pub").write_bytes(PUBLIC)
    (tmp_path / "edge.toml").write_text(f'[trust]\nkeys = ["{tmp_path}/own.pub"]\n')
    done = CliRunner().invoke(
        main, ["models", "verify", str(bundle), "--config", str(tmp_path / "edge.toml")]
    )
    assert signing.key_id(PUBLIC) in done.output
    assert (bundle / SIGNATURE).exists()
