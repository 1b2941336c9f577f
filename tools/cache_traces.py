"""Run eviction policies over request traces: hit ratios and time per operation, as a table.

Run: python -m tools.cache_traces [--json] [--plot cache.png]. Traces are made with fixed seeds; sizes of entries
are drawn once per key (median 700 bytes, 99th percentile 3,500).
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core.caching.s3fifo import Entry, Eviction, S3Fifo
from tools.cache_policies import Lru, WTinyLfu

KEYS = 10_000
SHARES = (0.01, 0.05, 0.2)  # of the bytes of all keys of the base population
Policy = Callable[[int], Eviction[int]]
POLICIES: dict[str, Policy] = {"S3-FIFO": S3Fifo, "W-TinyLFU": WTinyLfu, "LRU": Lru}
Trace = NDArray[np.int64]


def zipf(exponent: float, length: int, seed: int, keys: int = KEYS) -> Trace:
    """Independent requests; the k-th most popular key has weight k^-exponent."""
    weights = np.arange(1, keys + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(seed).choice(keys, size=length, p=weights / weights.sum())


def zipf_and_scan(length: int) -> Trace:
    """Zipf(0.9), and after each 10,000 requests a pass over 2,000 keys that never come back."""
    base = zipf(0.9, length * 5 // 6, 11)
    parts = []
    for number, start in enumerate(range(0, len(base), 10_000)):
        parts += [base[start : start + 10_000], KEYS * 10 + number * 2000 + np.arange(2000)]
    return np.concatenate(parts)[:length]


def loop(length: int) -> Trace:
    """The same 3,000 keys in the same order, again and again."""
    return np.arange(length) % 3000


def shifting(length: int) -> Trace:
    """Zipf(0.9) whose keys change their popularity at random after each tenth of the trace."""
    base = zipf(0.9, length, 12)
    rng = np.random.default_rng(13)
    parts = [rng.permutation(KEYS)[part] for part in np.array_split(base, 10)]
    return np.concatenate(parts)


def traces(length: int) -> dict[str, Trace]:
    return {
        "Zipf 0.7": zipf(0.7, length, 1),
        "Zipf 0.9": zipf(0.9, length, 2),
        "Zipf 1.1": zipf(1.1, length, 3),
        "Zipf 0.9 + scan": zipf_and_scan(length),
        "loop": loop(length),
        "shifting": shifting(length),
    }


def sizes_of(keys: int) -> list[int]:
    drawn = np.exp(np.random.default_rng(7).normal(np.log(700), 0.7, keys))
    return [int(size) for size in np.clip(drawn, 100, 20_000)]


def digests(keys: int) -> list[bytes]:
    return [hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16).digest() for i in range(keys)]


def hit_ratio(policy: Eviction[int], trace: Trace, names: list[bytes], sizes: list[int]) -> float:
    """The share of requests found, over the whole trace, which begins with an empty cache."""
    hits = 0
    for i in trace.tolist():
        key = names[i]
        if policy.get(key) is not None:
            hits += 1
        else:
            policy.put(Entry(key, i, "", sizes[i], 0))
    return hits / len(trace)


def times_ns(names: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds of a get that finds and of a get that finds nothing with its put, the policies by turns.

    Time of this thread's own work: on a shared machine a clock on the wall measures the neighbours.
    """
    count, size = 2000, 1000
    found: dict[str, dict[str, list[float]]] = {name: {"hit": [], "miss": []} for name in POLICIES}
    for turn in range(rounds):
        for name, make in POLICIES.items():
            policy = make(count * size)
            for key in names[: 2 * count]:
                policy.get(key)
                policy.put(Entry(key, 0, "", size, 0))
            kept = [key for key in names[: 2 * count] if policy.get(key) is not None]
            started = time.thread_time_ns()
            for key in kept:
                policy.get(key)
            found[name]["hit"].append((time.thread_time_ns() - started) / len(kept))
            strangers = names[(2 + turn) * count : (3 + turn) * count]
            started = time.thread_time_ns()
            for key in strangers:
                if policy.get(key) is None:
                    policy.put(Entry(key, 0, "", size, 0))
            found[name]["miss"].append((time.thread_time_ns() - started) / count)
    return {
        name: {kind: statistics.median(times) for kind, times in kinds.items()}
        for name, kinds in found.items()
    }


def compare(length: int, rounds: int) -> dict[str, Any]:
    made = traces(length)
    population = int(max(trace.max() for trace in made.values())) + 1
    names, sizes = digests(population), sizes_of(population)
    total = sum(sizes[:KEYS])
    rows = []
    for trace_name, trace in made.items():
        for share in SHARES:
            ratios = {
                name: hit_ratio(make(int(total * share)), trace, names, sizes)
                for name, make in POLICIES.items()
            }
            rows.append({"trace": trace_name, "cache_share": share, **ratios})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {"requests": length, "keys": KEYS, "rows": rows, "times_ns": times_ns(names, rounds)}


def table(found: dict[str, Any]) -> Iterator[str]:
    yield f"| trace | cache holds | {' | '.join(POLICIES)} |"
    yield "|---|---|" + "---|" * len(POLICIES)
    for row in found["rows"]:
        best = max(row[name] for name in POLICIES)
        cells = [
            f"**{100 * row[name]:.1f} %**" if row[name] == best else f"{100 * row[name]:.1f} %"
            for name in POLICIES
        ]
        yield f"| {row['trace']} | {100 * row['cache_share']:.0f} % | {' | '.join(cells)} |"
    for kind, text in (("hit", "get that finds"), ("miss", "get that finds nothing, and put")):
        cells = [f"{found['times_ns'][name][kind] / 1000:.2f} us" for name in POLICIES]
        yield f"| {text} | | {' | '.join(cells)} |"


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["trace"] for row in found["rows"]))
    figure, axes = plt.subplots(1, len(names), figsize=(2.2 * len(names), 2.6), sharey=True)
    for axis, trace in zip(axes, names, strict=True):
        rows = [row for row in found["rows"] if row["trace"] == trace]
        for policy in POLICIES:
            axis.plot(
                [100 * row["cache_share"] for row in rows], [100 * row[policy] for row in rows], "o-", ms=3
            )
        axis.set(title=trace, xscale="log", xlabel="cache, % of all")
    axes[0].set_ylabel("hits, %")
    figure.legend(axes[0].lines, POLICIES, loc="lower center", ncols=len(POLICIES), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.cache_traces", description=__doc__)
    made.add_argument("--requests", type=int, default=200_000, help="length of each trace")
    made.add_argument("--rounds", type=int, default=15, help="rounds of timing")
    made.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draw the hit ratios")
    return made


def main() -> None:
    arguments = parser().parse_args()
    found = compare(arguments.requests, arguments.rounds)
    if arguments.plot:
        plot(found, arguments.plot)
    print(json.dumps(found) if arguments.json else "\n".join(table(found)))


if __name__ == "__main__":
    main()
