"""Each invariant has a line that guards it: without the line, a test must fail.

`make guards` tries every line of `lines/`; here every sixty-fourth is tried, always the same ones. How a line is tried stands in
`runner.py`.
"""

import os

import pytest

from tests.guards import runner
from tests.guards.runner import Guard, break_line, copied_project, run_tests, try_guard

GUARDS = runner.all_guards()
#: One guard takes 2 to 6 seconds, all 500 half an hour on two cores; nine of them are tried in CI.
EVERY = 1 if os.environ.get("EDGE_RUNTIME_GUARDS") == "all" else 64
BACKOFF, BACKOFF_TESTS = "edge_runtime/core/backoff.py", ("tests/core/test_backoff.py",)
SCRATCH = "edge_runtime/scratch.py"


@pytest.fixture(scope="module")
def whole(passed_trials):
    """Runs tests in a whole copy, each once, and says how they end there."""
    known = {}
    with copied_project(passed_trials) as folder:

        def run(test):
            if test not in known:
                known[test] = run_tests(folder, (test,))
            return known[test]

        yield run


def test_every_guarded_line_is_found_and_can_be_broken():
    assert [fault for fault in map(Guard.fault, GUARDS) if fault] == []
    assert len({(guard.file, guard.line, guard.instead) for guard in GUARDS}) == len(GUARDS)


@pytest.mark.parametrize("guard", GUARDS[::EVERY], ids=lambda guard: guard.name)
def test_without_its_line_a_test_fails(guard, whole, passed_trials, record_property):
    broken = try_guard(guard, passed_trials)
    assert broken.test is not None, f"{guard.name}: {guard.file} without {guard.line!r}: {broken.how}"
    assert whole(broken.test).test is None, f"{guard.name}: {broken.test} fails in a whole copy, too"
    if broken.hung:  # tests/conftest.py prints it
        record_property("caught by a time-out", f"{guard.name}: {broken.how}")


def made_up(line="", instead="", file=BACKOFF, tests=BACKOFF_TESTS):
    return Guard("made up", file, line, instead, tests)


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (made_up("a line that nobody wrote"), "has no longer: 'a line that nobody wrote'"),
        (made_up("import", "import", BACKOFF), "nothing is broken"),
        (made_up("import", "import ((", BACKOFF), "does not compile"),
        (made_up("import", "", "edge_runtime/core/nowhere.py"), "no file edge_runtime/core/nowhere.py"),
        (made_up("import", "", tests=("tests/test_nowhere.py::test_x",)), "no file tests/test_nowhere.py"),
    ],
)
def test_a_guard_that_cannot_be_tried_says_why(guard, words):
    assert words in guard.fault()


@pytest.fixture
def scratch(passed_trials):
    """A copy of the project with one more module, which is to be broken, and a file of tests of it."""
    with copied_project(passed_trials) as folder:
        (folder / SCRATCH).write_text("NUMBER = 3\n")
        path = folder / "tests" / "core" / "test_scratch.py"

        def run(instead, *tests, limit_s=30.0):
            path.write_text("\n".join(("import pytest", *tests)))
            break_line(folder, made_up("NUMBER = 3", instead, SCRATCH))
            return run_tests(folder, ("tests/core/test_scratch.py",), limit_s)

        yield run


USES_IT = "def test_it():\n    from edge_runtime import scratch\n    assert scratch.NUMBER == 3"


def test_a_failing_assertion_is_a_catch(scratch):
    verdict = scratch("NUMBER = 4", USES_IT)
    assert verdict.test == "tests/core/test_scratch.py::test_it"
    assert "AssertionError" in verdict.how


@pytest.mark.parametrize(
    ("instead", "test"),
    [
        ("NUMBER = 3", USES_IT),  # nothing is broken
        ("from nowhere import NUMBER", USES_IT),
        ("from nowhere import NUMBER", "from edge_runtime import scratch\n" + USES_IT),
        ("NUMBER = number", USES_IT),
        ("raise SystemExit", "import edge_runtime.scratch"),
        (
            "NUMBER = 4",
            "@pytest.fixture\n" + USES_IT.replace("test_it", "it") + "\ndef test_that(it):\n    pass",
        ),
    ],
)
def test_a_copy_that_cannot_run_is_no_catch(scratch, instead, test):
    assert scratch(instead, test).test is None


def test_a_hang_is_a_catch_and_names_the_test_and_the_time_out(scratch):
    hang = "def test_it():\n    import threading\n    threading.Event().wait()"
    verdict = scratch("NUMBER = 4", hang, limit_s=8.0)
    assert verdict == runner.Verdict(
        "tests/core/test_scratch.py::test_it",
        "tests/core/test_scratch.py::test_it did not end within 8 s",
        hung=True,
    )
