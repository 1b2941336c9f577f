"""What the self-test says of a model: the cost that the daemon will see, and a sentence where an output is unreadable."""

import time

import numpy as np
import pytest

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Signature, TensorSpec
from edge_runtime.engines.fake import FakeEngine
from edge_runtime.loading.self_test import Prepared, make_probes, measure_latency_profile
from edge_runtime.processing import PreparedRow
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.batch_run import run_batch

SPIN_NS = 1_000_000


def spin(parts):
    until_ns = time.perf_counter_ns() + parts * SPIN_NS
    while time.perf_counter_ns() < until_ns:
        pass


class Slow(Tensors):
    """Takes one part of time to encode a batch and two to decode it."""

    def __init__(self):
        spec = TensorSpec("x", "FP32", (-1, 2))
        super().__init__(Signature((spec,), (spec,)), version="1")

    def encode_batch(self, batch, buffers):
        spin(1)
        super().encode_batch(batch, buffers)

    def decode_batch(self, outputs, batch):
        spin(2)
        return super().decode_batch(outputs, batch)


def slow_row(row):
    spin(4)
    return row


def test_the_profile_counts_what_the_scheduler_learns_from_a_batch():
    """Encoding, running and decoding: admission would refuse by a third of the cost, and learn the rest late."""
    processor, engine = Slow(), FakeEngine(slow_row, max_batch=1)
    prepared = Prepared(processor, engine, make_probes(processor))
    ((rows, profiled_ns),) = measure_latency_profile(prepared)
    assert rows == 1
    assert profiled_ns >= 7 * SPIN_NS
    one = prepared.probes[0].prepared
    run = run_batch(engine, processor, one.shapes, [one.data])
    assert run.ended_ns - run.started_ns >= 7 * SPIN_NS


def test_batches_are_timed_with_typical_texts_and_not_with_the_odd_ones():
    class Texts(Tensors):
        def __init__(self):
            self.batches = []

        signature = Signature((TensorSpec("text", "BYTES", (-1,)),), ())
        input_dtypes = (np.dtype(np.int32),)

        def prepare(self, question):
            return PreparedRow(((1,),), len(question), question)

        def encode_batch(self, batch, buffers):
            self.batches.append(list(batch))

        def decode_batch(self, outputs, batch):
            return [Answer((), None) for _ in batch]

    processor = Texts()
    prepared = Prepared(processor, FakeEngine(max_batch=8), make_probes(processor))
    processor.batches.clear()
    measure_latency_profile(prepared)
    timed = {text for batch in processor.batches for text in batch}
    assert timed == {b"turn the lights off", prepared.probes[1].prepared.data}
    assert max(map(len, timed)) < 100


def test_an_output_that_cannot_be_read_is_a_sentence():
    class Unreadable(Slow):
        def decode_batch(self, outputs, batch):
            raise ArithmeticError("no softmax of this")

    processor = Unreadable()
    with pytest.raises(EngineFailed, match=r"cannot be read \(ArithmeticError: no softmax"):
        measure_latency_profile(Prepared(processor, FakeEngine(max_batch=1), make_probes(processor)))
