"""The runtime inside a program: what it loads, and what it reports."""

import subprocess
import sys

LOADED = """
import asyncio, sys
from edge_runtime import Runtime

async def main():
    async with Runtime.open() as runtime:
        await runtime.ask("turn the lights off")
        before = set(sys.modules)
        text, status = runtime.metrics(), runtime.status()
        assert b"edge_rows_total" in text and status["cloud"] is None
        print(" ".join(sorted(sys.modules)))
        print(" ".join(sorted(set(sys.modules) - before)))

asyncio.run(main())
"""


def test_a_scrape_on_a_device_without_a_cloud_loads_nothing_of_the_cloud():
    """`ssl` is loaded in any case: asyncio imports it."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, scraped = (set(line.split()) for line in done.stdout.splitlines())
    assert "edge_runtime.serving.service" in loaded
    cloud = {name for name in loaded if name.split(".")[0] == "paho" or name.startswith("edge_runtime.mqtt")}
    assert cloud | ({"edge_runtime.uplink.uplink"} & loaded) == set()
    assert {name for name in scraped if name.startswith("edge_runtime")} == {"edge_runtime.metrics"}
