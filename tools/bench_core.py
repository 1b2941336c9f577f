"""Measure the time of the scheduler and of the model runner per row, of a refusal, and of a hop to an engine thread:

    python -m tools.bench_core [--json]

Figures are medians of many rounds, in processor time because machines are shared; that of the hop is wall time. The
runner is measured with an engine and a processor that only copy numbers.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.core.messages import Array, Shapes, Signature, Tensor, TensorSpec
from edge_runtime.core.scheduling.scheduler import Dispatch, QueueLimits, Refuse, Scheduler
from edge_runtime.core.scheduling.windows import Policy
from edge_runtime.engines import Batch
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.engine_thread import EngineThread
from edge_runtime.serving.model_runner import ModelRunner

#: A model of 100 microseconds; the latency profile keeps admission and splitting at work.
LADDER = tuple((rows, 90_000 + 10_000 * rows) for rows in (1, 2, 4, 8, 16, 32))
ROUNDS = 60
AS_DRIVEN = Policy(tick_ns=1_000_000)  # as the model runner sets it: the resolution of an event loop's timers


def submit_to_dispatch(deep: int, tenants: int, *, max_batch: int, has_deadlines: bool) -> float:
    """Microseconds of processor time per request: queue `deep` of them, then dispatch and end all."""
    scheduler = Scheduler(QueueLimits(max_batch, max_waiting=2 * deep), AS_DRIVEN, latency_profile=LADDER)
    chance = random.Random(0)
    now, request_id, spent = 1_000_000_000, 0, []
    for _ in range(ROUNDS):
        requests = [
            (f"tenant {chance.randrange(tenants)}", chance.randrange(50_000_000, 70_000_000))
            for _ in range(deep)
        ]
        began = time.process_time_ns()
        for tenant, patience in requests:
            scheduler.submit(
                now, request_id, "lane", size_bytes=100, tenant=tenant,
                deadline_ns=now + patience if has_deadlines else None,
            )  # fmt: skip
            request_id += 1
            now += 100
        while scheduler.waiting:
            for action in scheduler.poll(now):
                if isinstance(action, Dispatch):
                    duration = 90_000 + 10_000 * len(action.ids)
                    now += duration
                    scheduler.batch_done(now, action.batch_id, duration)
        spent.append((time.process_time_ns() - began) / deep / 1000)
    return statistics.median(spent)


def refusal_p99() -> float:
    """The 99th percentile of refusing one request, in microseconds of processor time, behind a queue of 512."""
    scheduler = Scheduler(QueueLimits(32, max_waiting=512), latency_profile=LADDER)
    now, spent = 1_000_000_000, []
    for request_id in range(600):
        scheduler.submit(now, request_id, "lane", tenant=str(request_id % 4), deadline_ns=now + 10**9)
        scheduler.poll(now)
    for request_id in range(1000, 6000):
        began = time.process_time_ns()
        refused = scheduler.submit(
            now, request_id, "lane", tenant=str(request_id % 4), deadline_ns=now + 10**9
        )
        spent.append((time.process_time_ns() - began) / 1000)
        assert isinstance(refused, Refuse)
    return statistics.quantiles(spent, n=100)[98]


class CopiedBatch(NamedTuple):
    """The only buffers of `Copies`."""

    inputs: Sequence[Array]


class Copies:
    """An engine that returns its input, in buffers made once."""

    name, is_batch_invariant, batch_unsafe, max_batch = "copies", True, frozenset[str](), 32

    def __init__(self) -> None:
        self._buffer = np.zeros((32, 16), np.float32)

    def bind(self, shapes: Shapes, rows: int) -> Batch:  # noqa: ARG002 - one shape is run
        return CopiedBatch([self._buffer[:rows]])

    def run(self, batch: Batch) -> Sequence[Array]:
        return batch.inputs

    def deny_batches(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


async def through_runner(rows: int, callers: int, *, is_inline: bool) -> float:
    """Microseconds of processor time per row: `callers` at once, each with one request of `rows` rows."""
    spec = TensorSpec("x", "FP32", (-1, 16))
    processor = Tensors(Signature((spec,), (spec,)), version="1")
    runner = ModelRunner(
        "bench", processor, Copies(), QueueLimits(32, 4096), latency_profile=LADDER, is_inline=is_inline
    )
    data = np.zeros((rows, 16), np.float32)
    questions = processor.split([Tensor("x", "FP32", data.shape, data)])
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        for _ in range(10):
            deadline_ns = time.monotonic_ns() + 10**9
            await asyncio.gather(
                *[runner.run_rows(questions, deadline_ns=deadline_ns) for _ in range(callers)]
            )
        spent.append((time.process_time_ns() - began) / 10 / rows / callers / 1000)
    await runner.close()
    return statistics.median(spent)


async def hop(count: int = 300) -> float:
    """Microseconds from handing work to an idle engine thread until its result is on the loop; the median."""
    loop = asyncio.get_running_loop()
    thread = EngineThread("hop")
    spent = []
    for _ in range(count):
        future: asyncio.Future[Any] = loop.create_future()

        def done(result: Any, _: BaseException | None, future: "asyncio.Future[Any]" = future) -> None:
            loop.call_soon_threadsafe(future.set_result, result)

        began = time.perf_counter_ns()
        thread.submit(int, done)
        await future
        spent.append((time.perf_counter_ns() - began) / 1000)
        await asyncio.sleep(0)
    thread.stop()
    return statistics.median(spent)


def measure() -> dict[str, float]:
    """All figures in microseconds, by name."""
    cases: dict[str, Callable[[], float]] = {
        "submit to dispatch, 512 deep, 4 tenants, deadlines": lambda: submit_to_dispatch(
            512, 4, max_batch=32, has_deadlines=True
        ),
        "the same without deadlines": lambda: submit_to_dispatch(512, 4, max_batch=32, has_deadlines=False),
        "the same with one tenant": lambda: submit_to_dispatch(512, 1, max_batch=32, has_deadlines=True),
        "the same with batches of 8": lambda: submit_to_dispatch(512, 4, max_batch=8, has_deadlines=True),
        "one request alone, in batches of 1": lambda: submit_to_dispatch(
            1, 1, max_batch=1, has_deadlines=True
        ),
        "refused as late or full, 99th percentile": refusal_p99,
        "model runner, one row alone, inline": lambda: asyncio.run(through_runner(1, 1, is_inline=True)),
        "one request of 32 rows": lambda: asyncio.run(through_runner(32, 1, is_inline=True)),
        "32 requests of one row": lambda: asyncio.run(through_runner(1, 32, is_inline=True)),
        "one row alone, in a thread": lambda: asyncio.run(through_runner(1, 1, is_inline=False)),
        "one request of 32 rows, in a thread": lambda: asyncio.run(through_runner(32, 1, is_inline=False)),
        "hop to an engine thread and back": lambda: asyncio.run(hop()),
    }
    return {name: round(case(), 2) for name, case in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures))
        return
    print("| what | microseconds |\n|---|---|")
    for name, figure in figures.items():
        print(f"| {name} | {figure} |")


if __name__ == "__main__":
    main()
