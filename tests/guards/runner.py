"""Breaks one line in a copy of the project and says whether a test notices.

`lines/*.py` each hold `GUARDS`, a list of (what is guarded, file, line or part of it, what stands there instead, tests).
`tests` are files or test ids; they run in the broken copy in a process of their own and stop at the first failure.

A line counts as caught only by a test that failed or hung in the broken copy and passes in a whole copy. A failed import
or collection, a fixture that fails and a name that the broken line no longer defines are no catch: they say that the
copy cannot run, not that a test looks at what the line does.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Packages that a broken line may stand in or that find their files beside themselves; the rest is linked.
COPIED = ("edge_runtime", "cloud_fallback", "tests", "tools", "examples")
#: One run of the slowest test file takes a third of it beside a busy neighbour.
LIMIT_S = 90.0
#: They show that the copy could not run.
NO_CATCH = ("ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError", "SyntaxError")


@dataclass(frozen=True)
class Guard:
    """One line, what stands in its place in the broken copy, and the tests of which one must notice."""

    name: str
    file: str
    line: str
    instead: str
    tests: tuple[str, ...]

    def fault(self) -> str | None:
        """Say why this guard cannot be tried, None if it can."""
        path = ROOT / self.file
        if not path.exists():
            return f"{self.name}: there is no file {self.file}"
        source = path.read_text(encoding="utf-8")
        if self.line not in source:
            return f"{self.name}: {self.file} has no longer: {self.line!r}"
        if self.line == self.instead:
            return f"{self.name}: nothing is broken"
        for test in self.tests:
            if not (ROOT / test.split("::")[0]).exists():
                return f"{self.name}: there is no file {test}"
        try:
            compile(source.replace(self.line, self.instead), self.file, "exec")
        except SyntaxError as error:
            return f"{self.name}: the broken {self.file} does not compile: {error}"
        return None


@dataclass(frozen=True)
class Verdict:
    """How a run of tests ended. `test`: the one that failed or hung; `how`: for people."""

    test: str | None
    how: str
    hung: bool = False


def all_guards() -> list[Guard]:
    """Collect the guards of every module in `lines`, in the order of their names."""
    from tests.guards import lines

    return [
        Guard(*entry)
        for module in sorted(found.name for found in pkgutil.iter_modules(lines.__path__))
        for entry in importlib.import_module(f"tests.guards.lines.{module}").GUARDS
    ]


@contextlib.contextmanager
def copied_project(trials: Path | None = None):
    """A copy of the project in a folder that is removed afterwards; `trials`: the record of models tried before."""
    with tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for entry in ROOT.iterdir():
            if entry.name in COPIED:  # with its bytecode, which holds for equal times of change
                shutil.copytree(entry, folder / entry.name)
            elif not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)
        if trials is not None:
            kept = folder / ".pytest_cache" / "d" / "trials"  # where tests/conftest.py looks
            kept.mkdir(parents=True)
            shutil.copy(trials, kept)
        yield folder


def break_line(folder: Path, guard: Guard) -> None:
    """Replace the line in the copy."""
    path = folder / guard.file
    path.write_text(path.read_text(encoding="utf-8").replace(guard.line, guard.instead), encoding="utf-8")
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink()  # a change within one second that keeps the size would go unseen


def run_tests(folder: Path, tests: tuple[str, ...], limit_s: float = LIMIT_S) -> Verdict:
    """Run `tests` in a copy until the first fails, and end whatever they leave behind."""
    notes = folder / "verdict.jsonl"
    notes.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "PYTHONPATH": str(folder),
        "EDGE_RUNTIME_VERDICT": str(notes),
        "EDGE_RUNTIME_TESTS": "guards",
    }
    environment.pop("EDGE_RUNTIME_GUARDS", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "tests.guards.verdict"]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--basetemp={folder}/t", *tests],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # brokers and daemons that a failing test started belong to its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    facts = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return _verdict(code, facts, (folder / "output.txt").read_text(errors="replace")[-1500:], limit_s)


def _verdict(code: int | None, facts: list[dict[str, str]], output: str, limit_s: float) -> Verdict:
    failed = next((fact for fact in facts if "failed" in fact), None)
    if failed is not None and failed["phase"] == "call" and failed["error"] not in NO_CATCH:
        return Verdict(failed["failed"], f"{failed['failed']} failed: {failed['error']}")
    if code is None and failed is None and facts:
        running = facts[-1]["started"]
        return Verdict(running, f"{running} did not end within {limit_s:.0f} s", hung=True)
    if code == 0:
        return Verdict(None, "all tests passed")
    if failed is not None:
        return Verdict(
            None, f"not caught: {failed['phase']} of {failed['failed']}: {failed['error']}\n{output}"
        )
    return Verdict(None, f"no test ran to its end (exit code {code}):\n{output}")


def try_guard(guard: Guard, trials: Path | None = None, limit_s: float = LIMIT_S) -> Verdict:
    """Break the guarded line and run its tests."""
    with copied_project(trials) as folder:
        break_line(folder, guard)
        return run_tests(folder, guard.tests, limit_s)
