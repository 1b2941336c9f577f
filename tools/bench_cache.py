"""Measure what the cache costs: a hit, and the extra time of requests that are never repeated.

Run: python -m tools.bench_cache [--json]. Times are this process's own work, so that neighbours on a shared machine
count little; the requests with and without cache go by turns, one each, and the ratio is that of the medians.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from edge_runtime.config import Config
from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.caching.keys import KeyPrefix
from edge_runtime.core.messages import InferRequest, Tensor
from edge_runtime.runtime import Runtime
from edge_runtime.serving.service import Service

PLACES = ("oslo", "rome", "lima", "cairo", "quito", "delhi")


def question(number: int) -> InferRequest:
    """One of as many different texts as are wanted; two after each other are of one length and in one place."""
    text = f"what is the weather in {PLACES[number // 2 % 6]} on day {number + 1_000_000}"
    return InferRequest((Tensor("text", "BYTES", (1,), (text.encode(),)),))


def core_ns(rounds: int = 200, calls: int = 200) -> dict[str, float]:
    """Medians of one key, one get that finds, and both, in nanoseconds."""
    prefix = KeyPrefix(b"s" * 32, "d" * 64, "1", "onnxruntime", {}, ("intent", "confidence"))
    cache = Cache[int](1 << 20, 10**12)
    rows = [f"turn the lights off in room {i}".encode() for i in range(calls)]
    keys = [prefix.key(row) for row in rows]
    for i, key in enumerate(keys):
        cache.put(0, key, i, 40)
    times: dict[str, list[float]] = {"key": [], "get": [], "key and get": []}
    for _ in range(rounds):
        started = time.process_time_ns()
        for row in rows:
            prefix.key(row)
        times["key"].append((time.process_time_ns() - started) / calls)
        started = time.process_time_ns()
        for key in keys:
            cache.get(1, key)
        times["get"].append((time.process_time_ns() - started) / calls)
        started = time.process_time_ns()
        for row in rows:
            cache.get(1, prefix.key(row))
        times["key and get"].append((time.process_time_ns() - started) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


async def timed(call: Callable[[], Awaitable[object]]) -> int:
    started = time.process_time_ns()
    await call()
    return time.process_time_ns() - started


async def service_ns(pairs: int) -> dict[str, Any]:
    """Medians of a hit and of requests never repeated, with the cache and without."""
    async with Runtime.open(Config()) as runtime:
        cached = runtime.service
        # The same runner under both: two loads of a model may differ, if only in whether it runs on the loop.
        plain = Service(
            {served.info.name: served for served in cached.registry},
            cache=None,
            cloud=None,
            device_secret=b"s" * 32,
            timeout_s=10,
            cloud_timeout_s=0,
        )
        same = question(0)
        hits: dict[str, list[int]] = {"infer": [], "ask": []}
        for _ in range(pairs):
            hits["infer"].append(await timed(lambda: cached.infer("commands", None, same)))
            hits["ask"].append(await timed(lambda: cached.ask("turn the lights off")))
        times: tuple[list[int], list[int]] = ([], [])
        for number in range(pairs):
            order = ((0, cached), (1, plain)) if number % 2 else ((1, plain), (0, cached))
            for at, service in order:
                request = question(2 * number + at)
                times[at].append(await timed(lambda r=service, q=request: r.infer("commands", None, q)))
    on, off = (statistics.median(values) for values in times)
    return {
        "hit, infer": statistics.median(hits["infer"][1:]),
        "hit, ask": statistics.median(hits["ask"][1:]),
        "new text, cache on": on,
        "new text, cache off": off,
        "ratio": on / off,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.bench_cache", description=__doc__)
    made.add_argument("--pairs", type=int, default=4000, help="requests with and without cache, each")
    made.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    return made


def main() -> None:
    arguments = parser().parse_args()
    found = {**core_ns(), **asyncio.run(service_ns(arguments.pairs))}
    if arguments.json:
        print(json.dumps(found))
        return
    print("| what | median |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} |" if name == "ratio" else f"| {name} | {value / 1000:.2f} us |")


if __name__ == "__main__":
    main()
