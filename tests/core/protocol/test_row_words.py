"""The words of many rows fit into what every reader accepts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.messages import InferReply, Origin, Reason
from edge_runtime.core.protocol import oip
from edge_runtime.core.protocol.row_words import MIXED, row_words


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["local"], {"origin": "local"}),
        (["local"] * 1024, {"origin": "local"}),
        (["local", "cache", "local"], {"origin": "local,cache,local"}),
        (
            ["local", "cache"] * 100 + ["cloud"] * 3,
            {"origin": MIXED, "origin_counts": "local=100,cache=100,cloud=3"},
        ),
    ],
)
def test_one_word_a_word_for_each_row_or_their_counts(words, parameters):
    assert row_words("origin", words) == parameters


def test_the_list_is_as_long_as_a_reader_accepts_and_no_longer():
    longest = oip.LIMITS.parameter_bytes - len("origin")
    words = ["a", "b"] * ((longest + 1) // 4) + ["c" * (longest - 4 * ((longest + 1) // 4))]
    assert len(",".join(words)) == longest
    assert row_words("origin", words) == {"origin": ",".join(words)}
    assert row_words("origin", [*words[:-1], words[-1] + "c"])["origin"] == MIXED


def rows_of(words):
    """Up to 1024 words in runs, which are quicker to make than each of its own."""
    runs = st.lists(st.tuples(st.sampled_from([*words]), st.integers(1, 300)), min_size=1, max_size=20)
    return runs.map(lambda runs: [word for word, count in runs for _ in range(count)][: oip.LIMITS.rows])


@given(rows_of(Origin), rows_of(Reason))
def test_a_reply_of_any_rows_can_be_read(origins, reasons):
    parameters = row_words("origin", origins) | row_words("reason", reasons)
    body, length = oip.encode_reply(InferReply("m", "1", (), "", parameters))
    assert oip.decode_reply(body, length).parameters == parameters


@given(rows_of(Reason))
def test_counts_add_up(reasons):
    parameters = row_words("reason", reasons)
    if parameters["reason"] == MIXED:
        counts = [int(part.partition("=")[2]) for part in parameters["reason_counts"].split(",")]
        assert sum(counts) == len(reasons)
        assert counts == sorted(counts, reverse=True)
