"""Measure the daemon with wrk: requests per second, latency and memory, every text different.

Run: make bench (needs wrk: apt-get install wrk). Prints a table row; `--json` for machines.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
local n, thread = 0, 0
local places = {"oslo", "rome", "lima", "cairo", "quito", "delhi"}
function setup(t) t:set("id", thread); thread = thread + 1 end
function request()
  n = n + 1
  local text = string.format("what is the weather in %s on day %d of trip %d", places[n % 6 + 1], n, id)
  local body = '{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["' .. text .. '"]}]}'
  return wrk.format("POST", "/v2/models/commands/infer", {["Content-Type"] = "application/json"}, body)
end
function done(summary, latency)
  io.stderr:write(string.format("RESULT %d %d %f %f %f\\n", summary.requests, summary.errors.status + summary.errors.read,
    summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


def measure(connections: int, seconds: int, port: int, script: Path) -> dict[str, float]:
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(script),
        f"http://127.0.0.1:{port}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) (\S+) (\S+) (\S+)", run.stderr)
    if found is None:
        raise SystemExit(f"wrk printed no result: {run.stdout} {run.stderr}")
    requests, errors, took, p50, p99 = map(float, found.groups())
    return {"rps": requests / took, "errors": errors, "p50_ms": p50, "p99_ms": p99}


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; run: sudo apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wrk.lua").write_text(SCRIPT)
        config = folder / "edge.toml"
        config.write_text(f'[server]\nsocket = "{folder}/e.sock"\ntcp = "127.0.0.1:0"\n')
        program = Path(sys.executable).parent / "edge-runtime"
        daemon = subprocess.Popen([program, "serve", "--config", config], stderr=subprocess.PIPE, text=True)
        assert daemon.stderr is not None
        try:
            line = next(line for line in daemon.stderr if line.startswith("ready:"))
            port = int(line.rsplit(":", 1)[1])
            rows = []
            for connections in (1, 8, 32):
                rounds = [
                    measure(connections, arguments.seconds, port, folder / "wrk.lua")
                    for _ in range(arguments.rounds)
                ]
                medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
                rows.append({"connections": connections, **medians, "rss_mb": resident_mb(daemon.pid)})
                print(json.dumps(rows[-1]), file=sys.stderr)
        finally:
            daemon.terminate()
            daemon.wait()
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| connections | requests/s | p50 ms | p99 ms | errors | RSS MB |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['connections']} | {row['rps']:,.0f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} "
            f"| {row['errors']:.0f} | {row['rss_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
