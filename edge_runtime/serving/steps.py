"""Work in steps (`core/protocol/tensor_data.Steps`) on the event loop, with a turn for everybody else between each two."""

import asyncio

from edge_runtime.core.protocol.tensor_data import Steps, T


async def run_steps(steps: Steps[T]) -> T:
    """Run all steps and return their value. If it is cancelled, the steps that are left are not run."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value
        await asyncio.sleep(0)
