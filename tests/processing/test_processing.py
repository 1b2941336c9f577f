"""Texts and tensors on their way into a model and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.errors import InvalidRequest, TooLarge, Unsupported
from edge_runtime.core.messages import DTYPES, Signature, Tensor, TensorSpec
from edge_runtime.processing import decode_rows, encode_rows
from edge_runtime.processing.ngrams import NgramFeaturiser
from edge_runtime.processing.tensors import Tensors
from edge_runtime.processing.text_classification import Calibration, TextClassification

NGRAMS = NgramFeaturiser(slots=32, buckets=1000, grams=(3, 4), skips=True)

GOLDEN = [
    915,
    911,
    192,
    866,
    377,
    808,
    546,
    251,
    317,
    508,
    844,
    687,
    246,
    405,
    330,
    204,
    358,
    150,
    957,
    504,
    591,
    897,
    874,
    676,
    314,
    239,
    392,
    1000,
    1000,
    1000,
    1000,
    1000,
]


def texts(*values, shape=None, datatype="BYTES", name="text"):
    return Tensor(name, datatype, (len(values),) if shape is None else shape, tuple(values))


def classifier():
    calibration = Calibration(2.0, (0.2, 0.8), (0.1, 0.9))
    return TextClassification(NGRAMS, ["no", "yes"], calibration, version="t/1", max_text_bytes=4096)


def indices(text, featuriser=NGRAMS):
    return encode_rows(featuriser, [text.encode()])[0][0]


def test_golden_indices():
    # Change these only together with the version of `text_ngrams`: shipped tables are trained for them.
    (got,) = encode_rows(NGRAMS, [b"Turn it  OFF"])[0]
    assert got.dtype == np.int32
    assert got.tolist() == GOLDEN


def test_case_and_white_space_do_not_matter():
    (one,) = encode_rows(NGRAMS, [b"turn it off"])[0]
    for other in ("TURN IT OFF", "  turn\tit \n off ", "turn\u00a0it\u2003off"):
        np.testing.assert_array_equal(indices(other), one)
    assert (encode_rows(NGRAMS, [b"it turn off"])[0][0] != one).any()


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_nothing_is_all_padding(text):
    assert (indices(text) == 1000).all()


@pytest.mark.parametrize(
    "text", ["\u00e4\u00f6\u00fc", "\u6771\u4eac", "\U0001f600" * 1000, "\0", "a", "word " * 2000]
)
def test_odd_texts_fit(text):
    got = indices(text)
    assert got.shape == (32,)
    assert ((got >= 0) & (got <= 1000)).all()


def test_long_texts_keep_their_words():
    few = NgramFeaturiser(slots=4, buckets=1000, grams=(3,), skips=False)
    many = NgramFeaturiser(slots=99, buckets=1000, grams=(3,), skips=False)
    text = "one two three four five six"
    np.testing.assert_array_equal(indices(text, few), indices(text, many)[:4])


@pytest.mark.parametrize("bad", [{"slots": 0}, {"buckets": 0}, {"grams": (9,)}])
def test_unfit_parameters(bad):
    with pytest.raises(ValueError, match="ngrams"):
        NgramFeaturiser(**{"slots": 4, "buckets": 10, "grams": (3,), "skips": False, **bad})


def test_rows_are_exact_bytes():
    assert classifier().split([texts(b"A b ", b"")]) == [b"A b ", b""]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "exactly one"),
        ([texts(b"a"), texts(b"b")], "exactly one"),
        ([texts(b"a", name="txt")], "named 'text'"),
        ([Tensor("text", "FP32", (1,), np.zeros(1, np.float32))], "BYTES"),
        ([texts(b"a", shape=(1, 1))], "shape"),
        ([texts(b"a", shape=(2,))], "shape"),
        ([texts()], "at least one"),
        ([texts(b"ok", b"\xff")], "text 1 is not UTF-8"),
        ([texts(b"\xed\xa0\x80")], "UTF-8"),
    ],
)
def test_unfit_texts(inputs, words):
    with pytest.raises(InvalidRequest, match=words):
        classifier().split(inputs)


def test_text_length_is_capped():
    classifier().split([texts(b"x" * 4096)])
    with pytest.raises(TooLarge, match="4096"):
        classifier().split([texts(b"x" * 4097)])


GRID = st.integers(0, 1000).map(lambda n: n / 1000)


@given(st.lists(st.tuples(GRID, GRID), min_size=2, max_size=8, unique_by=lambda knot: knot[0]), GRID)
def test_knots_are_joined_as_numpy_joins_them(knots, score):
    scores, chances = zip(*sorted(knots), strict=True)
    chances = tuple(sorted(chances))
    calibration = Calibration(1.0, scores, chances)
    for x in (score, *scores):
        assert calibration.chance(x) == pytest.approx(np.interp(x, scores, chances), rel=1e-12, abs=1e-15)
    assert np.isnan(calibration.chance(float("nan")))


def test_decoding_is_calibrated():
    sure = np.array([[0.0, 2.0 * np.log(3.0)], [9e9, -9e9]], np.float32)
    answer, other = classifier().decode_batch([sure], [b"", b""])
    assert answer.values[0] == b"yes"
    # At temperature 2 the logits are 0 and log 3, the softmax 1/4 and 3/4; the knots make 0.75 of it 0.8333.
    assert answer.confidence == pytest.approx(0.1 + 0.8 * (0.75 - 0.2) / 0.6, abs=1e-6)
    assert answer.values[1] == pytest.approx(answer.confidence)
    assert answer.raw_score == pytest.approx(0.75)
    assert other.confidence == pytest.approx(0.9)


SPECS = Signature(
    (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT64", (-1, -1))),
    (TensorSpec("y", "FP32", (-1, 2)),),
)


def tensor(name, datatype, data):
    return Tensor(name, datatype, data.shape, data)


def pair(x=None, n=None):
    x = np.arange(4, dtype=np.float32).reshape(2, 2) if x is None else x
    n = np.arange(6, dtype=np.int64).reshape(2, 3) if n is None else n
    return [tensor("x", "FP32", x), tensor("n", "INT64", n)]


def test_tensors_come_back():
    processor = Tensors(SPECS, version="1")
    rows = processor.split(pair())
    keys = [processor.canonical(row) for row in rows]
    assert keys == [processor.canonical(row) for row in processor.split(pair()[::-1])]
    assert len(set(keys)) == 2
    assert [tensor.data.tolist() for tensor in processor.tensors(rows[1])] == [[[2, 3]], [[3, 4, 5]]]
    x, n = encode_rows(processor, [rows[1]])[0]
    np.testing.assert_array_equal(x, [2, 3])
    np.testing.assert_array_equal(n, [3, 4, 5])
    assert (x.dtype, n.dtype) == (np.float32, np.int64)
    assert decode_rows(processor, [(x,)], [rows[1]])[0].confidence is None


def test_rows_of_other_shapes_differ():
    flat = Tensors(Signature((TensorSpec("x", "UINT8", (-1, -1, -1)),), SPECS.outputs), version="1")
    ones = np.ones(6, np.uint8)
    keys = {
        flat.canonical(flat.split([tensor("x", "UINT8", ones.reshape(1, a, b))])[0])
        for a, b in ((1, 6), (2, 3), (3, 2), (6, 1))
    }
    assert len(keys) == 4


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype(datatype):
    processor = Tensors(Signature((TensorSpec("x", datatype, (-1,)),), SPECS.outputs), version="1")
    data = np.array([0, 1, 1]).astype(DTYPES[datatype])
    back = [row[0] for row in encode_rows(processor, processor.split([tensor("x", datatype, data)]))]
    np.testing.assert_array_equal(back, data)
    assert back[0].shape == ()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "exactly the inputs 'x', 'n'"),
        (pair()[:1], "exactly"),
        (pair() + pair()[:1], "exactly"),
        (pair(x=np.zeros((2, 3), np.float32)), r"shape \[2, 3\]; send \[-1, 2\]"),
        (pair(x=np.zeros(2, np.float32)), "shape"),
        (pair(x=np.zeros((2, 2), np.float64)), "not FP32"),
        (pair(x=np.zeros((3, 2), np.float32)), "number of rows"),
        (pair(x=np.zeros((0, 2), np.float32), n=np.zeros((0, 1), np.int64)), "at least one row"),
        ([Tensor("x", "FP64", (2, 2), np.zeros((2, 2))), pair()[1]], "send FP32"),
        ([Tensor("x", "FP32", (4,), np.zeros((2, 2), np.float32)), pair()[1]], "shape"),
        ([Tensor("x", "FP32", (2, 2), (b"a",)), pair()[1]], "not FP32"),
    ],
)
def test_unfit_tensors(inputs, words):
    with pytest.raises(InvalidRequest, match=words):
        Tensors(SPECS, version="1").split(inputs)


def test_text_is_no_tensor():
    with pytest.raises(Unsupported):
        Tensors(Signature((TensorSpec("x", "BYTES", (-1,)),), ()), version="1")
