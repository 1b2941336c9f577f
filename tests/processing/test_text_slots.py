"""Intents with slots: words and their places, tags to spans, and the shipped bundle from the command line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles.folder import find_bundle, load_bundle
from edge_runtime.cli.main import main as edge
from edge_runtime.core.errors import InvalidRequest, TooLarge
from edge_runtime.core.messages import Tensor
from edge_runtime.engines import run_rows
from edge_runtime.loading.model import load_model
from edge_runtime.processing import decode_rows, encode_rows
from edge_runtime.processing.text_classification import Calibration
from edge_runtime.processing.text_slots import TextSlots, best_path, chances_of, spans_of
from edge_runtime.processing.words import WordFeaturiser, places_of, words_of

WORDS = WordFeaturiser(features=8, buckets=1000, grams=(3, 4), lengths=(4, 8, 12))
SLOTS = ("artist", "city")
#: Tags of SLOTS.
OUT, B_ARTIST, I_ARTIST, B_CITY, I_CITY = range(5)


GOLDEN = [
    [397, 400, 705, 745, 301, 650, 991, 422],
    [776, 524, 307, 890, 890, 547, 87, 671],
    [1, 782, 696, 619, 621, 1000, 1000, 1000],
    [1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000],
]


def processor(temperature=1.0):
    calibration = Calibration(temperature, (0.0, 1.0), (0.0, 1.0))
    return TextSlots(WORDS, ["go", "play"], SLOTS, calibration, version="s/1", max_text_bytes=4096)


def tags(*path, words=None, strength=20.0):
    """Logits `[words, 5]` that say `path`; the words behind it are padding, and say nonsense."""
    logits = np.full((words or len(path), 5), 7.0, np.float32)
    logits[: len(path)] = 0.0
    logits[np.arange(len(path)), path] = strength
    return logits


def decoded(text, path, **how):
    answer = decode_rows(
        processor(), [(np.array([0, 20], np.float32), tags(*path, words=12, **how))], [text.encode()]
    )[0]
    intent, confidence, slots = answer.values
    assert intent == b"play"
    assert confidence == pytest.approx(answer.confidence)
    return [(s["slot"], s["value"], s["start"], s["end"]) for s in json.loads(slots)], answer.confidence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t", []),
        ("tobymac's 7pm", [("tobymac", 0, 7), ("'", 7, 8), ("s", 8, 9), ("7pm", 10, 13)]),
        ("caf\u00e9 \U0001f600\U0001f600 x_y", [("caf\u00e9", 0, 4), ("\U0001f600", 5, 6), ("\U0001f600", 6, 7),
                                             ("x", 8, 9), ("_", 9, 10), ("y", 10, 11)]),
        ("\u6771\u4eac\u3001a", [("\u6771\u4eac", 0, 2), ("\u3001", 2, 3), ("a", 3, 4)]),
        ("e\u0301a", [("e", 0, 1), ("\u0301", 1, 2), ("a", 2, 3)]),
    ],
)  # fmt: skip
def test_words_and_their_places(text, words):
    assert words_of(text, 64) == [word for word, _, _ in words]
    assert places_of(text, 64) == [(start, end) for _, start, end in words]


@given(st.text())
def test_every_visible_character_is_in_one_word(text):
    words = words_of(text, 10_000)
    assert [text[start:end] for start, end in places_of(text, 10_000)] == words
    assert "".join(words) == "".join(text.split())


def test_golden_features():
    # Change these only together with the version of `text_slots`: shipped tables are trained for them.
    (got,) = encode_rows(WORDS, [("Play 2017 \u00e9").encode()])[0]
    assert got.dtype == np.int32
    assert got.tolist() == GOLDEN


def indices(text, featuriser=WORDS):
    return encode_rows(featuriser, [text.encode()])[0][0]


def test_the_memo_of_words_changes_nothing():
    text = "play play PLAY " + "x" * 50
    first = indices(text)
    np.testing.assert_array_equal(indices(text), first)
    fresh = WordFeaturiser(features=8, buckets=1000, grams=(3, 4), lengths=(4, 8, 12))
    np.testing.assert_array_equal(indices(text, fresh), first)
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).sum() == 1  # the shape alone


@pytest.mark.parametrize(("count", "length"), [(0, 4), (4, 4), (5, 8), (12, 12), (13, 12), (999, 12)])
def test_rows_are_as_long_as_the_next_length(count, length):
    (row,) = encode_rows(WORDS, [("a " * count).encode()])[0]
    assert row.shape == (length, 8)
    assert ((row[:, 0] != 1000) == (np.arange(length) < count)).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"features": 1},
        {"buckets": 0},
        {"grams": (6,)},
        {"lengths": ()},
        {"lengths": (8, 4)},
        {"lengths": (0,)},
    ],
)
def test_unfit_parameters(bad):
    with pytest.raises(ValueError, match="words"):
        WordFeaturiser(**{"features": 4, "buckets": 10, "grams": (3,), "lengths": (4,), **bad})


def test_spans_are_code_points_of_the_text():
    text = "\U0001f600 spiel Bj\u00f6rk, Mot\u00f6rhead!"
    assert decoded(text, [OUT, OUT, B_ARTIST, OUT, B_ARTIST, OUT])[0] == [
        ("artist", "Bj\u00f6rk", 8, 13),
        ("artist", "Mot\u00f6rhead", 15, 24),
    ]


def test_repeated_words_keep_their_own_places():
    assert decoded("new york new york", [B_CITY, I_CITY, B_ARTIST, I_ARTIST])[0] == [
        ("city", "new york", 0, 8),
        ("artist", "new york", 9, 17),
    ]


def test_neighbours_of_one_slot_stay_two():
    assert decoded("a b  c", [B_CITY, B_CITY, I_CITY])[0] == [("city", "a", 0, 1), ("city", "b  c", 2, 6)]


def test_nothing_has_no_slots():
    assert decoded("", []) == ([], pytest.approx(1.0, abs=1e-6))


def test_long_texts_are_cut_with_their_places_right():
    text = "play " + "la " * 10 + "oslo bergen"
    assert decoded(text, [OUT] * 11 + [B_CITY])[0] == [("city", "oslo", 35, 39)]


def test_confidence_is_of_everything_together():
    _, sure = decoded("a b", [OUT, B_CITY])
    _, unsure = decoded("a b", [OUT, B_CITY], strength=2.0)
    each = np.exp(2) / (np.exp(2) + 4)
    assert sure > 0.999
    assert unsure == pytest.approx(each**2, rel=1e-5)


def test_the_temperature_softens_intent_and_tags():
    output = (np.array([0, 2], np.float32), tags(B_CITY, strength=2.0, words=12))
    at_two = decode_rows(processor(2.0), [output], [b"oslo"])[0]
    assert at_two.confidence == pytest.approx(np.e / (np.e + 1) * np.e / (np.e + 4), rel=1e-5)
    assert json.loads(at_two.values[2])[0]["confidence"] == pytest.approx(np.e / (np.e + 4), abs=1e-4)


@pytest.mark.parametrize("strength", [0.5, 79.0, 2e2, 1e30])
@pytest.mark.parametrize("shift", [0.0, -1e4, 3e2])
def test_chances_are_the_softmax_however_far_the_logits_lie(strength, shift):
    logits = (tags(B_CITY, OUT, I_CITY) * np.float32(strength / 20)) + np.float32(shift)
    shares = np.exp((logits.astype(float) - logits.max(1, keepdims=True)) / 0.7)
    wanted = shares / shares.sum(1, keepdims=True)
    path = [I_CITY, OUT, B_CITY]
    assert chances_of(logits, path, 0.7) == pytest.approx(
        wanted[range(3), path].tolist(), rel=1e-4, abs=1e-37
    )


def test_each_text_keeps_its_own_places_from_encoding_to_reading():
    texts = [f"{'a ' * (i % 7)}oslo {i}" for i in range(200)]
    prepared = [WORDS.prepare(text.encode()).data for text in texts]
    for text, words in zip(texts, prepared, strict=True):
        assert words == (text, places_of(text, 12))


def brute_force(logits):
    """The best allowed path, by trying all."""
    paths = [[]]
    for _ in logits:
        paths = [[*p, t] for p in paths for t in range(5)
                 if t in (OUT, B_ARTIST, B_CITY) or (p and p[-1] in (t, t - 1))]  # fmt: skip
    return max(paths, key=lambda path: sum(row[t] for row, t in zip(logits, path, strict=True)))


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_no_value_goes_on_that_never_began(length, seed):
    logits = np.random.default_rng(seed).standard_normal((length, 5)).astype(np.float32)
    assert best_path(logits) == brute_force(logits)


@pytest.mark.parametrize("broken", [[I_CITY], [OUT, I_CITY], [B_ARTIST, I_CITY], [I_ARTIST, I_ARTIST]])
def test_broken_sequences_are_mended(broken):
    logits = tags(*broken)
    spans_of(best_path(logits))
    assert best_path(logits) == brute_force(logits)


def test_texts_are_checked_as_everywhere():
    def split(raw):
        return processor().split([Tensor("text", "BYTES", (1,), (raw,))])

    assert split(b" A ") == [b" A "]
    with pytest.raises(InvalidRequest, match="UTF-8"):
        split(b"\xff")
    with pytest.raises(TooLarge):
        split(b"x" * 4097)


COMMANDS = {
    "play some jazz by miles davis": ("PlayMusic", {"genre": "jazz", "artist": "miles davis"}),
    "Will it rain in Paris tomorrow?": ("GetWeather", {"condition_description": "rain", "city": "Paris", "timeRange": "tomorrow"}),
    "add this song to my workout playlist": (
        "AddToPlaylist",
        {"music_item": "song", "playlist_owner": "my", "playlist": "workout"},
    ),
    "book a table for four at an italian restaurant in Boston": (
        "BookRestaurant",
        {"party_size_number": "four", "cuisine": "italian", "restaurant_type": "restaurant", "city": "Boston"},
    ),
    "rate this book 4 out of 5 stars": (
        "RateBook",
        {"object_select": "this", "object_type": "book", "rating_value": "4", "best_rating": "5",
         "rating_unit": "stars"},
    ),
    "find the movie The Silent Sea": (
        "SearchCreativeWork", {"object_type": "movie", "object_name": "The Silent Sea"},
    ),
    "what movies are playing at the nearest cinema": (
        "SearchScreeningEvent",
        {"movie_type": "movies", "spatial_relation": "nearest", "object_location_type": "cinema"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shipped():
    return load_model("commands-slots")


def test_the_shipped_bundle_finds_intents_and_slots(shipped):
    for text, (intent, slots) in COMMANDS.items():
        (output,) = run_rows(shipped.engine, encode_rows(shipped.processor, [text.encode()]))
        answer = decode_rows(shipped.processor, [output], [text.encode()])[0]
        assert answer.values[0] == intent.encode(), text
        found = json.loads(answer.values[2])
        assert {slot["slot"]: slot["value"] for slot in found} == slots, text
        assert all(text[slot["start"] : slot["end"]] == slot["value"] for slot in found)
        assert 0.3 < answer.confidence < 1.0


def test_shipped_rows_depend_neither_on_neighbours_nor_on_padding(shipped):
    assert shipped.is_batch_invariant
    assert shipped.max_batch > 1
    rows = encode_rows(shipped.processor, [text.encode() for text in [*COMMANDS, "", "\U0001f600 " * 99]])
    pad = shipped.manifest.processing.parameters["buckets"]
    for (row,) in rows:
        ((logits, of_words),) = run_rows(shipped.engine, [(row,)])
        for longer in (16, 24, 64):
            if longer < len(row):
                continue
            padded = np.full((longer, row.shape[1]), pad, np.int32)
            padded[: len(row)] = row
            neighbour = np.full_like(padded, pad - 1)
            for batch in ([(padded,)], [(neighbour,), (padded,), (neighbour,)]):
                got = run_rows(shipped.engine, batch)[len(batch) // 2]
                np.testing.assert_allclose(got[0], logits, rtol=0, atol=2e-5)
                np.testing.assert_allclose(got[1][: len(row)], of_words, rtol=0, atol=2e-5)


def test_the_shipped_bundle_is_small():
    bundle = load_bundle(find_bundle("commands-slots"))
    assert bundle.stored_bytes <= 800_000
    assert {credit.licence for credit in bundle.manifest.credits} >= {"CC0-1.0"}


def ask(tmp_path, *arguments):
    config = tmp_path / "edge.toml"
    config.write_text(
        'models = ["commands", "commands-slots"]\n[server]\nsocket = "off"\n[trust]\nunsigned = true\n'
    )
    done = CliRunner().invoke(edge, ["ask", *arguments, "--config", str(config)])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line_shows_slots(tmp_path):
    said = ask(tmp_path, "play some jazz by miles davis", "--model", "commands-slots").splitlines()
    assert said[0].startswith("PlayMusic  ")
    assert said[1:] == ["  genre: jazz", "  artist: miles davis"]


def test_the_command_line_lists_slots_for_machines(tmp_path):
    tree = json.loads(ask(tmp_path, "play some jazz by miles davis", "--model", "commands-slots", "--json"))
    assert tree["intent"] == "PlayMusic"
    assert [(s["slot"], s["start"], s["end"]) for s in tree["slots"]] == [
        ("genre", 10, 14),
        ("artist", 18, 29),
    ]
    assert "slots" not in json.loads(ask(tmp_path, "turn the lights off", "--json"))


def test_a_model_that_is_asked_once_needs_no_list(tmp_path):
    config = tmp_path / "edge.toml"
    config.write_text('[server]\nsocket = "off"\n[trust]\nunsigned = true\n')
    done = CliRunner().invoke(
        edge,
        ["ask", "add this song to my workout playlist", "--model", "commands-slots", "--config", str(config)],
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("AddToPlaylist")
