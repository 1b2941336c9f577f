"""Compare batching policies by simulation: latency, engine time, refusals and the time until a refusal.

    python -m tools.simulate_batching --plot docs
    python -m tools.simulate_batching --quick --json

Engines, loads and policies are those of `tools.simulation`; every policy gets the same requests. The table goes to
stdout, progress to stderr. The same seed gives the same figures.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from tools.simulation import cases, report
from tools.simulation.measures import arrivals_of, latencies_ms, measure
from tools.simulation.policies import rules
from tools.simulation.replay import replay

FULL, QUICK = 30_000, 4_000
#: The case whose whole distribution is drawn.
_DRAWN = "edge 1 ms + 0.2 ms, bursts 10%"


def all_cases() -> list[cases.Case]:
    return [*cases.loads(), *cases.changing(), *cases.overloads(), *cases.tenancy(), *cases.priorities()]


def plot(rows: list[report.Measured], folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.plot_p50(rows, folder / "batching-p50.png")
    report.plot_goodput(measure(cases.goodput_cases(), count, seed), folder / "batching-goodput.png")
    (case,) = [case for case in cases.loads() if case.name == _DRAWN]
    arrivals = arrivals_of(case, count, seed)
    latencies = {
        name: latencies_ms(replay(make(), case.engine, arrivals, seed), arrivals)
        for name, make in rules(case).items()
        if name != "duty 0.3"
    }
    report.plot_latencies(latencies, _DRAWN, folder / "batching-burst.png")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", action="store_true", help="print the measurements for machines")
    found.add_argument("--plot", type=Path, metavar="DIR", help="write plots into this folder")
    found.add_argument("--quick", action="store_true", help=f"{QUICK} requests per case instead of {FULL}")
    found.add_argument("--seed", type=int, default=0, help="of arrivals and noise")
    return found


def main() -> None:
    arguments = parser().parse_args()
    count = QUICK if arguments.quick else FULL
    began = time.process_time()
    rows = measure(all_cases(), count, arguments.seed)
    if arguments.plot:
        plot(rows, arguments.plot, count, arguments.seed)
    seconds = round(time.process_time() - began, 1)
    if arguments.json:
        about = {"requests": count, "seed": arguments.seed, "cpu_seconds": seconds}
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print(f"{count} requests per case, seed {arguments.seed}, {seconds} s of one core.\n")
    print(report.markdown(rows))


if __name__ == "__main__":
    main()
