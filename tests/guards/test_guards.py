"""Each invariant of the core has a line that guards it: without the line, a test must fail.

A copy of the package is broken in one place, and the core's tests run against it in a process of their own. `make guards`
runs all of them; here every third.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCHING, QUEUEING, WINDOWS, POOL, LATENCY, QUOTAS = (
    f"edge_runtime/core/scheduling/{name}.py"
    for name in ("scheduler", "queueing", "windows", "engine_pool", "batch_costs", "quotas")
)
KEYS = "edge_runtime/core/caching/keys.py"
CACHING, S3FIFO = "edge_runtime/core/caching/cache.py", "edge_runtime/core/caching/s3fifo.py"
SCHEDULER_TESTS = tuple(
    f"tests/core/scheduling/test_{name}.py"
    for name in ("batch_costs", "splitting", "scheduler", "scheduler_machine")
)
CACHE_TESTS = ("tests/core/caching/test_cache.py", "tests/core/caching/test_s3fifo.py")

#: (what is guarded, file, the line or part of it, what stands there instead)
SCHEDULER = [
    ("a batch is bounded", BATCHING, "rows = lane.split.batch(lane.waiting)", "rows = lane.waiting"),
    ("a batch has one lane", QUEUEING, "queues = self.by_lane.get(lane, ())", "queues = [*self.queues()]"),
    (
        "a cancel touches one id",
        QUEUEING,
        "        while self.entries[at] is not entry:\n            at += 1\n",
        "",
    ),
    ("each leaves once", BATCHING, "        entry.queue.remove(entry)\n", "        pass\n"),
    ("the queue is bounded", BATCHING, "len(waiting) >= limits.max_waiting", "False"),
    ("and in bytes", BATCHING, "self._waiting_bytes + size_bytes > limits.max_waiting_bytes", "False"),
    ("bytes leave with their request", BATCHING, "            self._waiting_bytes -= entry.size_bytes\n", ""),
    ("a tenant has its part", BATCHING, ">= most:", ">= 10**9:"),
    ("a quota of time holds", QUOTAS, "if ahead_ns > 0 else 0", "if False else 0"),
    ("the late are refused on arrival", BATCHING, "if finish_ns <= deadline_ns:", "if True:"),
    (
        "the hopeless are dropped",
        BATCHING,
        "                self._drop_late(now_ns, actions)\n",
        "                pass\n",
    ),
    (
        "no batch ends after a deadline",
        BATCHING,
        "fit.apply(members, newcomers,",
        "fit.apply([], [],",
    ),
    (
        "nobody waits unseen",
        BATCHING,
        "                self._late_bound_ns = deadline_ns\n",
        "                pass\n",
    ),
    (
        "who waits again is seen",
        BATCHING,
        "            self._late_bound_ns = min(self._late_bound_ns, entry.key_ns)\n",
        "            pass\n",
    ),
    ("predictions heal", BATCHING, "now_ns - lane.confirmed_ns > _STALE_NS", "False"),
    (
        "an engine never idles beside other lanes",
        BATCHING,
        "if lane.waiting < len(self._waiting) and not self._windows.has_duty:",
        "if False:",
    ),
    (
        "a window leaves time for the work",
        BATCHING,
        "        if slack_ns < until_ns:\n",
        "        if False:\n",
    ),
    ("nobody waits for a full batch", WINDOWS, "now_ns if lane.waiting >= lane.costs.sizes[-1] else ", ""),
    ("members stay in their steps", BATCHING, "self._staying(lane) if lane.staying else []", "[]"),
    ("an engine takes its depth at most", POOL, "        chosen.running += 1\n", ""),
    ("an engine that is down gets nothing", POOL, "if one.is_up else 0", ""),
    (
        "the same calls give the same actions",
        BATCHING,
        "batch_id = self._next_batch_id",
        "batch_id = id(actions)",
    ),
    ("tenants take turns", QUEUEING, "min(flows, key=_virtual_ns)", "next(iter(flows))"),
    (
        "turns are charged in engine time",
        QUEUEING,
        "            flow.virtual_ns = max(self._ahead.pop(flow.tenant, 0.0), self._clock_ns - self.credit_ns)\n",
        "            pass\n",
    ),
    ("the lowest class ages", BATCHING, "(now_ns - waits.since_ns) // ageing_ns", "0"),
    ("the earliest deadline goes first", BATCHING, "else bisect_right(keys, key_ns)", "else len(keys)"),
    (
        "a draining scheduler takes nothing",
        BATCHING,
        "        if self._is_draining:\n",
        "        if False:\n",
    ),
    ("speed follows throttling", LATENCY, "_SPEED_WEIGHT = 0.2", "_SPEED_WEIGHT = 0.02"),
]
CACHE = [
    ("an expired answer is not fresh", CACHING, "entry.expires_ns <= now_ns", "False"),
    ("a stale one has its limit", CACHING, "entry.expires_ns + self.stale_ns <= now_ns", "False"),
    ("an answer's age counts", CACHING, "self.ttl_ns - age_ns", "self.ttl_ns"),
    ("a model is emptied", CACHING, "entry.group != group or", "True or"),
    ("the tenant is in the key", KEYS, "key=tenant_secret, ", ""),
    ("the model is in the key", KEYS, "[model_digest, processing", "[processing"),
    ("the parameters are in the key", KEYS, "fields += [name, type(value).__name__, str(value)]", "pass"),
    ("the outputs are in the key", KEYS, "        fields += outputs\n", ""),
    ("the row is in the key", KEYS, "        keyed.update(row)\n", ""),
    ("bytes are bounded", S3FIFO, "while self.size_bytes", "while False and self.size_bytes"),
]
GUARDS = [
    *((*guard, SCHEDULER_TESTS) for guard in SCHEDULER),
    *((*guard, CACHE_TESTS) for guard in CACHE),
]


#: A broken core needs no models and no broker. To shrink its failures would take minutes, and nobody reads them.
CONFTEST = """
from hypothesis import Phase, settings
settings.register_profile("guards", max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile("guards")
"""


def outcome(folder, tests, file=None, line="", instead=""):
    """How the core's tests end in a copy of the project, broken in one place or whole."""
    for name in ("edge_runtime", "tests/core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    shutil.copy(ROOT / "tests" / "__init__.py", folder / "tests")
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if file is not None:
        source = (folder / file).read_text()
        assert line in source, f"{file} has no longer: {line}"
        (folder / file).write_text(source.replace(line, instead))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_whole_copy_passes(tmp_path):
    done = outcome(tmp_path, (*SCHEDULER_TESTS[:3], *CACHE_TESTS))
    assert done.returncode == 0, done.stdout[-1500:]


@pytest.mark.parametrize(
    ("name", "file", "line", "instead", "tests"),
    GUARDS if os.environ.get("EDGE_RUNTIME_GUARDS") == "all" else GUARDS[::3],
    ids=lambda value: value if isinstance(value, str) and " " in value and len(value) < 50 else "",
)
def test_without_its_line_a_test_fails(tmp_path, name, file, line, instead, tests):
    done = outcome(tmp_path, tests, file, line, instead)
    assert done.returncode == 1, f"{name}: {done.stdout[-1500:]}"
    assert "FAILED" in done.stdout, f"{name}: it was not a test that failed: {done.stdout[-1500:]}"
