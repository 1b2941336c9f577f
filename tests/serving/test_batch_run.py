"""One batch on one engine: rows fail alone, and an answer never changes with the batch after it."""

import gc
import weakref

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_runtime.core.errors import EngineFailed
from edge_runtime.core.messages import Answer, Signature, Tensor, TensorSpec
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.loading.model import load_model
from edge_runtime.processing.tensors import Tensors
from edge_runtime.serving.batch_run import Miscounted, run_batch
from tests.serving.runner_fakes import Echo, Engine, Watched

SHAPES = ((1,),)


def texts(results):
    return [result.values[0] if isinstance(result, Answer) else type(result) for result in results]


def test_rows_are_answered_in_their_order_and_the_parts_of_the_work_follow_each_other():
    run = run_batch(Engine(), Echo(), SHAPES, [b"3", b"1", b"2"])
    assert texts(run.results) == [b"6", b"2", b"4"]
    assert run.started_ns <= run.encoded_ns <= run.inferred_ns <= run.ended_ns


@pytest.mark.parametrize("at", [0, 1, 3])
def test_one_row_that_cannot_be_encoded_fails_alone_and_runs_as_zeros(at):
    engine = Engine()
    batch = [b"4", b"5", b"6"]
    batch.insert(at, b"no number")
    run = run_batch(engine, Echo(), SHAPES, batch)
    expected = [b"8", b"10", b"12"]
    expected.insert(at, EngineFailed)
    assert texts(run.results) == expected
    assert engine.batches == [[0 if row == b"no number" else int(row) for row in batch]]
    assert "ValueError" in str(run.results[at])


def test_a_batch_of_rows_that_cannot_be_encoded_has_no_answer():
    assert texts(run_batch(Engine(), Echo(), SHAPES, [b"x", b"y"]).results) == [EngineFailed] * 2


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_row_that_cannot_be_read_fails_alone(at):
    batch = [b"4", b"5"]
    batch.insert(at, b"-1")  # doubled, the number that cannot be read
    results = run_batch(Engine(), Echo(), SHAPES, batch).results
    assert isinstance(results.pop(at), EngineFailed)
    assert texts(results) == [b"8", b"10"]


@pytest.mark.parametrize("lost", [lambda answers: answers[:-1], lambda answers: [*answers, answers[0]]])
def test_a_processor_that_returns_another_number_of_answers_gives_nobody_the_answer_of_another(lost):
    class Losing(Echo):
        def decode_batch(self, outputs, batch):
            answers = super().decode_batch(outputs, batch)
            return lost(answers) if len(batch) > 1 else answers

    assert texts(run_batch(Engine(), Losing(), SHAPES, [b"3", b"1"]).results) == [b"6", b"2"]


@pytest.mark.parametrize("which", [0, 1])
def test_any_output_of_another_number_of_rows_is_counted(which):
    class Two(Engine):
        def run(self, batch):
            (out,) = super().run(batch)
            outputs = [out, out]
            outputs[which] = out[:-1]
            return outputs

    with pytest.raises(Miscounted, match="1 rows returned for 2"):
        run_batch(Two(), Echo(), SHAPES, [b"3", b"1"])


def test_what_an_engine_raises_is_the_batchs():
    with pytest.raises(ValueError, match="poisoned"):
        run_batch(Engine(poison=3), Echo(), SHAPES, [b"3", b"1"])


@pytest.mark.parametrize("bad", [b"no number", b"-1"])
def test_a_failed_row_holds_nothing_of_its_batch_once_it_is_dropped(bad):
    """Without the garbage collector: the daemon rarely runs it."""

    data = Watched(bad)
    gone = weakref.ref(data)
    gc.disable()
    try:
        results = run_batch(Engine(), Echo(), SHAPES, [data, b"1"]).results
        del data
        assert gone() is None, "the error holds it"
        del results
    finally:
        gc.enable()


def identity(length):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "main",
        [value("x", TensorProto.FLOAT, ["n", length])],
        [value("y", TensorProto.FLOAT, ["n", length])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def numbers(values):
    data = np.array(values, np.float32).reshape(len(values), 1)
    return Tensors(SIGNATURE, version="1").split([Tensor("x", "FP32", data.shape, data)])


SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),))


def test_an_answer_is_not_overwritten_by_the_next_batch():
    engine, processor = OnnxEngine(identity(1), max_batch=4), Tensors(SIGNATURE, version="1")
    first = run_batch(engine, processor, SHAPES, numbers([1, 2, 3])).results
    run_batch(engine, processor, SHAPES, numbers([7, 8, 9, 10]))
    assert [answer.values[0].tolist() for answer in first] == [[1], [2], [3]]
    for answer in first:
        (value,) = answer.values
        assert value.base is None, "an answer that is a view keeps its whole batch in memory"


@pytest.mark.parametrize("name", ["commands", "commands-slots"])
def test_answers_of_texts_own_their_bytes(name):
    model = load_model(name)
    rows = [b"turn off the lights", b"play some jazz by miles davis"]
    bound = model.engine.bind(*_shapes_and_count(model.processor, rows))
    data = [model.processor.prepare(row).data for row in rows]
    model.processor.encode_batch(data, bound.inputs)
    outputs = model.engine.run(bound)
    answers = model.processor.decode_batch(outputs, data)
    kept = [(answer.values, [extra.copy() for extra in answer.extras]) for answer in answers]
    for output in outputs:
        output[...] = -7
    for answer, (values, extras) in zip(answers, kept, strict=True):
        assert answer.values == values
        for extra, before in zip(answer.extras, extras, strict=True):
            assert extra.base is None
            np.testing.assert_array_equal(extra, before)
    model.engine.close()


def _shapes_and_count(processor, rows):
    (shapes,) = {processor.prepare(row).shapes for row in rows}
    return shapes, len(rows)


def test_rows_behind_a_smaller_batch_are_zero_and_not_those_of_the_batch_before():
    """An engine pads a batch of 3 to 4 rows. What another request left there must not run."""
    engine, processor = OnnxEngine(identity(1), max_batch=4), Tensors(SIGNATURE, version="1")
    run_batch(engine, processor, SHAPES, numbers([5, 6, 7, 8]))
    run_batch(engine, processor, SHAPES, numbers([1, 2, 3]))
    assert engine.bind(SHAPES, 3).buffers.arrays[0].tolist() == [[1], [2], [3], [0]]
