"""The tools around slots: the published rows, tags of words, made-up rows, scores, and training that goes on."""

import json
import unicodedata

import numpy as np
import pytest

from edge_runtime.engines import run_rows
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.processing.words import WordFeaturiser
from tools.evaluate_slots import evaluate, lines_of
from tools.rows import LabelledText, Span, read_rows
from tools.slots.calibration import fit_temperature
from tools.slots.metrics import Found, report_of
from tools.slots.rows import IGNORED, Exchange, encoded, tags_of
from tools.snips import read_snips, split_of


def row(text, label="go", **slots):
    spans = [Span(slot, text.index(value), text.index(value) + len(value)) for slot, value in slots.items()]
    return LabelledText(text, label, slots=tuple(sorted(spans, key=lambda span: span.start)))


def test_published_rows_keep_their_text_and_find_their_values(tmp_path):
    parts = [
        {"text": "play "},
        {"text": "Mot\u00f6rhead \U0001f600", "entity": "artist"},
        {"text": " in "},
        {"text": " oslo ", "entity": "city"},
        {"text": "\n"},
    ]
    (tmp_path / "Go.train.json").write_text(json.dumps({"Go": [{"data": parts}]}), encoding="utf-8")
    (found,) = read_snips(tmp_path)
    text = found["text"]
    assert text == "play Mot\u00f6rhead \U0001f600 in  oslo \n"
    assert [(s["slot"], text[s["start"] : s["end"]]) for s in found["slots"]] == [
        ("artist", "Mot\u00f6rhead \U0001f600"),
        ("city", "oslo"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(found))
    (back,) = read_rows(path)
    assert [back.text[s.start : s.end] for s in back.slots] == ["Mot\u00f6rhead \U0001f600", "oslo"]


def test_the_split_is_even_and_keeps_twins_together():
    rows = [
        {"label": label, "text": f"{label} {i // 2}" + " " * (i % 2)} for label in "ab" for i in range(400)
    ]
    splits = split_of(rows, seed=0)
    assert splits == split_of(rows, seed=0) != split_of(rows, seed=1)
    assert [splits[:400].count("val"), splits[400:].count("val")] == [20, 20]
    assert splits[::2] == splits[1::2]


def test_tags_follow_the_words():
    slots = ["artist", "city"]
    made = row("play ac/dc in new york", artist="ac/dc", city="new york")
    assert tags_of(made, slots, 99) == [0, 1, 2, 2, 0, 3, 4]
    assert tags_of(made, slots, 6) == [0, 1, 2, 2, 0, 3]


def test_encoded_rows_are_padded():
    featuriser = WordFeaturiser(features=4, buckets=50, grams=(3,), lengths=(4, 8))
    inputs, tags = encoded(featuriser, [row("a b", city="b"), row("")], ["city"], 6)
    assert inputs.shape == (2, 6, 4)
    assert tags.tolist() == [[0, 1, *[IGNORED] * 4], [IGNORED] * 6]
    assert (inputs[1] == 50).all()


def plain(text):
    return "".join(letter for letter in unicodedata.normalize("NFD", text).lower() if letter.isascii())


def test_made_rows_hold_values_of_the_same_slot():
    rows = [
        row("fly from oslo to rome", city="oslo"),
        row("play abba in \u00c5l", artist="abba", city="\u00c5l"),
    ]
    rng = np.random.default_rng(0)
    exchange = Exchange(rows)
    seen = set()
    for _ in range(300):
        made = exchange.made(rows[1], rng)
        values = [(span.slot, plain(made.text[span.start : span.end])) for span in made.slots]
        assert values[0] == ("artist", "abba")
        assert values[1] in {("city", "oslo"), ("city", "al")}
        assert plain(made.text).startswith(f"play abba in {values[1][1]}")
        seen.add(made.text)
    assert {"play abba in oslo", "play abba in \u00c5l", "play abba in \u00e5l", "play abba in Al"} <= seen
    assert any(text.endswith("?") for text in seen)


def test_open_slots_may_hold_each_others_values():
    names = [row(f"a{i}", artist=f"a{i}") for i in range(100)] + [
        row(f"c{i}", city=f"c{i}") for i in range(100)
    ]
    rng = np.random.default_rng(0)
    made = [Exchange(names).made(names[0], rng) for _ in range(200)]
    assert {span.slot for found in made for span in found.slots} == {"artist"}
    foreign = sum(plain(found.text).startswith("c") for found in made)
    assert 0 < foreign < 20


def test_a_value_counts_only_with_name_and_both_ends():
    truth = [row("fly to new york", city="new york"), row("play abba", artist="abba"), row("stop")]
    found = [
        Found("go", (Span("city", 11, 15),), 0.9),
        Found("stop", truth[1].slots, 0.8),
        Found("go", (), 0.7),
    ]
    report = report_of(found, truth)
    assert (report.rows, report.intent_accuracy, report.exact) == (3, 2 / 3, 1 / 3)
    assert (report.slots.precision, report.slots.recall, report.slots.f1) == (0.5, 0.5, 0.5)
    assert report.by_slot["artist"].f1 == 1.0
    assert report.by_slot["city"].f1 == 0.0


def test_one_temperature_serves_intents_and_tags():
    rng = np.random.default_rng(0)
    true = 1.7  # drawn so that the logits, divided by it, are log-probabilities of what was drawn
    logits = rng.standard_normal((2000, 3)) * 3, rng.standard_normal((2000, 4, 5)) * 3

    def draw(of):
        chances = np.exp(of / true)
        return (chances.cumsum(-1) < rng.random((*of.shape[:-1], 1)) * chances.sum(-1, keepdims=True)).sum(-1)

    intents, tags = draw(logits[0]), draw(logits[1])[:, :2]
    found = fit_temperature(tuple(a.astype(np.float32) for a in logits), intents.tolist(), tags.tolist())
    assert found == pytest.approx(true, rel=0.06)


def test_a_bundle_without_slots_is_refused():
    from edge_runtime.core.errors import EdgeRuntimeError

    with pytest.raises(EdgeRuntimeError, match="no slots"):
        evaluate("commands", [row("hi")])


@pytest.fixture
def lessons():
    from tools.slots.fit import Lessons

    featuriser = WordFeaturiser(features=6, buckets=300, grams=(3,), lengths=(4, 8))
    rows = [row(f"fly to {city} now", city=city) for city in ("oslo", "new york", "rome", "bern", "graz")]
    rows = rows * 2 + [row("stop", "halt")] * 10
    inputs, tags = encoded(featuriser, rows, ["city"], 8)
    return Lessons(inputs, tags, np.array([r.label == "halt" for r in rows], np.int64), 10)


def trained(lessons, epochs, stop_after=None):
    import torch

    from tools.slots.fit import Recipe, Trainer
    from tools.slots.net import Shape, SlotNet

    def fresh():
        torch.manual_seed(0)
        return Trainer(
            SlotNet(Shape(buckets=300, width=16), 2, 3), lessons.true, Recipe(epochs=epochs, batch=8)
        )

    trainer = fresh()
    while trainer.epoch < epochs:
        trainer.run_epoch(lessons, trainer.epoch)
        if trainer.epoch == stop_after:
            state = trainer.state()
            trainer = fresh()
            trainer.resume(state)
    return trainer.mean


@pytest.mark.train
def test_training_that_was_cut_off_goes_on_as_if_nothing_had_been(lessons):
    from tools.slots.net import logits_of

    whole, resumed = trained(lessons, 4), trained(lessons, 4, stop_after=3)
    for one, other in zip(logits_of(whole, lessons.inputs), logits_of(resumed, lessons.inputs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.train
def test_the_exported_model_says_what_the_net_says(lessons):
    from tools.slots.net import export, logits_of

    net = trained(lessons, 6)
    intents, tags = logits_of(net, lessons.inputs)
    engine = OnnxEngine(export(net, 6), max_batch=32)
    for i, (logits, of_words) in enumerate(run_rows(engine, [(inputs,) for inputs in lessons.inputs])):
        there = lessons.tags[i] != IGNORED
        np.testing.assert_allclose(
            logits, intents[i], atol=0.1
        )  # weights are rounded to 1/127 of the largest
        np.testing.assert_allclose(of_words[there], tags[i][there], atol=0.1)


def test_the_report_reads_well():
    tree = {
        "bundle": "b", "rows": 1, "stored_bytes": 1234, "intent_accuracy": 1.0, "exact": 0.5, "ece": 0.1,
        "slots": {"precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 2},
        "micros": {"all": 9.0, "encode": 1.0, "model": 5.0, "decode": 3.0},
        "by_slot": {"city": {"precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 2}},
    }  # fmt: skip
    said = "\n".join(lines_of(tree))
    assert "intent 100.00%" in said
    assert "| city | 100.0% | 50.0% | 66.7% | 2 |" in said
