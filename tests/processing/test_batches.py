"""What every processor promises of a batch: rows as if each were alone, in buffers that hold the batch before."""

import numpy as np
import pytest

from edge_runtime.core.messages import DTYPES, Signature, Tensor, TensorSpec
from edge_runtime.loading.model import load_model
from edge_runtime.processing import encode_rows
from edge_runtime.processing.tensors import Tensors
from tests.processing.test_processing import NGRAMS, classifier
from tests.processing.test_text_slots import WORDS

TEXTS = [
    b"turn it off",
    b"",
    "wei\u00df \u6771\u4eac".encode(),
    b"a b c d e f g h i j k l m n o p",
    b"12 Monkeys",
]


def wordpiece():
    pytest.importorskip("tokenizers")
    return load_model("commands-cloud").processor


def alike(encoder, questions):
    """The prepared rows that have the shapes of the first one, with the rows alone."""
    prepared = [encoder.prepare(question) for question in questions]
    alone = encode_rows(encoder, questions)
    return [(p, row) for p, row in zip(prepared, alone, strict=True) if p.shapes == prepared[0].shapes]


@pytest.mark.parametrize("make", [lambda: NGRAMS, classifier, lambda: WORDS, wordpiece])
def test_every_element_of_the_buffers_is_written(make):
    encoder = make()
    rows = alike(encoder, TEXTS)
    assert len(rows) > 1
    shapes = rows[0][0].shapes
    buffers = [
        np.full((len(rows), *shape), 93, dtype)
        for shape, dtype in zip(shapes, encoder.input_dtypes, strict=True)
    ]
    encoder.encode_batch([prepared.data for prepared, _ in rows], buffers)
    for i, (_, alone) in enumerate(rows):
        for buffer, array in zip(buffers, alone, strict=True):
            np.testing.assert_array_equal(buffer[i], array)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_element_of_numeric_buffers_is_written(datatype):
    spec = TensorSpec("x", datatype, (-1, -1, 2))
    processor = Tensors(Signature((spec,), (spec,)), version="1")
    data = (np.arange(12).reshape(2, 3, 2) % 2).astype(DTYPES[datatype])
    rows = processor.split([Tensor("x", datatype, data.shape, data)])
    buffer = np.ones((2, 3, 2), DTYPES[datatype])
    processor.encode_batch([processor.prepare(row).data for row in rows], [buffer])
    np.testing.assert_array_equal(buffer, data)


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_a_row_is_read_as_if_it_were_alone(scale):
    processor = classifier()
    logits = (np.random.default_rng(3).standard_normal((6, 2)) * scale).astype(np.float32)
    together = processor.decode_batch([logits], [b""] * 6)
    for i, answer in enumerate(together):
        (alone,) = processor.decode_batch([logits[i : i + 1]], [b""])
        assert (answer.values, answer.confidence, answer.raw_score) == (
            alone.values,
            alone.confidence,
            alone.raw_score,
        )
        np.testing.assert_array_equal(answer.extras[0], alone.extras[0])
