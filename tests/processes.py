"""The programs as a user starts them, in processes of their own."""

import contextlib
import subprocess
import sys

EDGE = (sys.executable, "-c", "from edge_runtime.cli.main import main; main()")
CLOUD = (sys.executable, "-c", "from cloud_fallback.cli import main; main()")


def cli(*arguments, **options):
    """Run one `edge-runtime` command to its end."""
    return subprocess.run(
        [*EDGE, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


def until_line(process, words):
    """Read the log of a process up to the first line with `words`, which is returned; fails at its end."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError(f"no line has {words!r}: {''.join(lines)}")


@contextlib.contextmanager
def running(*command, ready="ready:"):
    """A program from its line `ready` on; killed at the end if it still runs."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        if ready:
            until_line(process, ready)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
