"""Soak a daemon, a broker and a worker on this machine: mixed traffic at twice their capacity, and faults.

    python -m tools.soak                          ten minutes
    python -m tools.soak --duration 60 --json     a minute, the summary as JSON

Callers come at random moments, singly and in bulk; some cancel, half-close, give up an upload or are in a hurry. Worker,
daemon and broker are frozen, links cut and silenced. These promises are checked: each caller has an answer or a refusal, or
left by itself; no answer has a foreign id, or an intent that neither tier gives to that text; a private text stays on the
device; a daemon that runs says that it lives; the cloud is asked again after the faults; memory at rest grows by at most
5 % after the first fifth; on SIGTERM, under load, what was sent is answered.

Exit code: 0 if every promise was kept, 1 if one was broken, 2 if the soak could not be made.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tools.soak.report import in_words
from tools.soak.run import soak
from tools.soak.system import NotReadyError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--duration", type=float, default=600, metavar="S", help="seconds of traffic (600)")
    parser.add_argument("--seed", type=int, default=0, help="decides callers and faults (0)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep configurations and logs here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = given.logs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = asyncio.run(soak(folder.resolve(), given.duration, given.seed, _say))
        except (NotReadyError, ValueError) as error:
            _say(f"error: {error}")
            return 2
    print(json.dumps(report.as_json(), indent=2) if given.json else in_words(report))
    return 0 if report.holds else 1


def _say(line: str) -> None:
    print(f"soak: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
