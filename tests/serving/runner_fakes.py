"""Processors and engines with which the tests of the model runner provoke what they need."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_runtime.core.messages import Answer
from edge_runtime.engines import Step
from edge_runtime.processing import PreparedRow


def run(scenario):
    async def limited():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


async def entered(engine):
    """Wait until the engine has begun its next call."""
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, engine.entered.wait, 20)
    engine.entered.clear()


async def until(claim):
    """Let the event loop turn until `claim()` holds; the time limit of `run` bounds it."""
    while not claim():
        await asyncio.sleep(0.001)


class Watched:
    """A text for `Echo` that a weak reference can watch, as `bytes` cannot."""

    def __init__(self, text):
        self.text = text

    def __eq__(self, other):
        return self.text == other

    def __hash__(self):
        return hash(self.text)

    def __int__(self):
        return int(self.text)


class Turnstile:
    """A gate that lets as many calls pass as it is told; see the engines below."""

    def __init__(self, calls=0):
        self._calls = threading.Semaphore(calls)

    def let(self, calls):
        self._calls.release(calls)

    def wait(self, timeout):
        return self._calls.acquire(timeout=timeout)


class Echo:
    """A processor of texts whose answer is the text itself; raises where a text says so."""

    signature = None
    version = "1"
    input_dtypes = (np.dtype(np.int64),)

    def prepare(self, row):
        if row == b"unprepared":
            raise KeyError(row)
        return PreparedRow(((1,),), 8, row)

    def encode_batch(self, batch, buffers):
        for i, row in enumerate(batch):
            buffers[0][i, 0] = 99  # half a row is written before the error
            buffers[0][i, 0] = int(row)

    def decode_batch(self, outputs, batch):
        numbers = outputs[0][:, 0].tolist()
        if -2 in numbers:
            raise ArithmeticError("cannot be read")
        return [Answer((str(number).encode(),), 1.0) for number in numbers]


class Reused:
    """The only buffers of an engine, full of what the batch before left there."""

    def __init__(self, inputs):
        self.inputs = inputs


class Engine:
    """Doubles its numbers, in buffers that the next batch overwrites.

    It can wait for a gate, raise on a number, or lose a row. `batches` are the numbers of each call.
    """

    name, is_batch_invariant = "fake", True

    def __init__(self, max_batch=8, *, poison=None, loses=False, gate=None):
        self.max_batch, self.poison, self.loses, self.gate = max_batch, poison, loses, gate
        self.batches, self.entered, self.closed = [], threading.Event(), False
        self.inputs = np.full((max_batch, 1), 77, np.int64)
        self.outputs = np.full((max_batch, 1), 78, np.int64)

    def bind(self, shapes, rows):
        assert shapes == ((1,),)
        return Reused([self.inputs[:rows]])

    def run(self, batch):
        assert not self.closed, "run after close"
        numbers = batch.inputs[0][:, 0].tolist()
        self.batches.append(numbers)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.poison in numbers:
            raise ValueError("poisoned")
        out = self.outputs[: len(numbers)]
        np.multiply(batch.inputs[0], 2, out=out)
        return [out[:-1] if self.loses else out]

    def close(self):
        self.closed = True


class Countdown:
    """A step engine: each step says the number of each member, which goes on below it until 0.

    Its handles are slots, which new members get again. It asserts what it is promised: a state is open when it is
    stepped or released, members of a step have rows of one shape, and nothing is called after `close`. With `grows` a
    row has one element more in each step. `unopened` is a first number that cannot be opened, `poison` one on which a
    step raises.
    """

    name, is_batch_invariant = "fake", True

    def __init__(self, *, gate=None, poison=None, unopened=None, grows=False, max_batch=3):
        self.gate, self.poison, self.unopened, self.grows = gate, poison, unopened, grows
        self.max_batch = max_batch
        self.steps, self.shapes, self.entered, self.closed = [], [], threading.Event(), False
        self.open_slots, self.opened, self.releases = set(), 0, []

    def open(self, row):
        assert not self.closed, "open after close"
        if int(row[0][0]) == self.unopened:
            raise MemoryError("no room for this state")
        slot = next(i for i in range(1000) if i not in self.open_slots)
        self.open_slots.add(slot)
        self.opened += 1
        return slot

    def step(self, handles, rows):
        assert not self.closed, "step after close"
        assert len(set(handles)) == len(handles) <= self.max_batch
        assert set(handles) <= self.open_slots, "a step of a state that is not open"
        assert len({row[0].shape for row in rows}) == 1, "rows of several shapes in one step"
        numbers = [int(row[0][0]) for row in rows]
        self.steps.append(numbers)
        self.shapes.append(rows[0][0].shape)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.poison in numbers:
            raise ValueError("poisoned")
        return [Step((row[0][:1].copy(),), self._following(row[0])) for row in rows]

    def _following(self, numbers):
        if numbers[0] <= 0:
            return None
        return (np.append(numbers - 1, 7) if self.grows else numbers - 1,)

    def release(self, slot):
        self.releases.append("after close" if self.closed else slot)
        self.open_slots.remove(slot)

    def close(self):
        self.closed = True

    @property
    def is_clean(self):
        """Whether each state was released exactly once."""
        return (
            not self.open_slots and len(self.releases) == self.opened and "after close" not in self.releases
        )
