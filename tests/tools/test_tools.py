"""What the tools share: reading labelled texts, and the curve of accuracy against offload."""

import numpy as np
import pytest

from tools.evaluate import Answers, cascade, evaluate, summary
from tools.rows import BadRows, LabelledText, digest_of, normalised, read_rows


def test_rows_come_from_jsonl_and_csv_alike(tmp_path):
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text('{"text":"hi, you","label":"greet","split":"val"}\n\n{"text":"\u4eac","label":"x"}\n')
    csv.write_text('\ufefftext,label,split\n"hi, you",greet,val\n\u4eac,x,\n')
    expected = [LabelledText("hi, you", "greet", "val"), LabelledText("\u4eac", "x")]
    assert read_rows(jsonl) == read_rows(csv) == expected
    assert read_rows(csv, "val") == expected[:1]


def test_every_bad_row_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text":"a","label":"b"}\n{"text":""}\n[1]\n{\n{"text":"a","label":1}\n'
        '{"text":"a","label":"b","split":"test"}\n'
    )
    with pytest.raises(BadRows) as caught:
        read_rows(path)
    said = str(caught.value)
    assert "5 rows" in said
    assert all(f"line {n}:" in said for n in (2, 3, 4, 5, 6))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"text,label\n"])
def test_files_without_usable_rows_are_refused_in_words(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(BadRows, match=r"a\.csv"):
        read_rows(path)


def test_the_curve_begins_at_the_edge_and_ends_at_the_cloud():
    truth = np.array(["a", "b", "c", "d", "oos"])
    edge = Answers(np.array(["a", "b", "x", "x", "a"]), np.array([0.9, 0.8, 0.3, 0.5, 0.4]))
    cloud = Answers(np.array(["a", "x", "c", "d", "oos"]), np.ones(5))
    points = cascade(edge, cloud, truth)
    assert [p.offload for p in points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [p.accuracy for p in points] == [0.5, 0.75, 1.0, 0.75, 0.75]
    assert [p.oos_escalated for p in points] == [0.0, 1.0, 1.0, 1.0, 1.0]
    found = summary(points, 0.75)
    assert (found["equals_cloud_at"], found["above_cloud_at"], found["best_accuracy"]) == (0.25, 0.5, 1.0)


def test_a_shipped_bundle_is_evaluated_with_real_answers():
    rows = [
        LabelledText("turn the lights off", "smart_home"),
        LabelledText("flip a coin", "flip_coin"),
        LabelledText("book me a flight", "book_flight"),
        LabelledText("how many grams of regret fit in a teapot", "oos"),
    ]
    report = evaluate("commands", rows, "commands", None)
    assert report["accuracy"] == report["cloud"]["accuracy"] == 1.0
    assert report["cascade"]["area"] == 1.0


SPANS = '[{"slot":"room","start":11,"end":18},{"slot":"what","start":4,"end":10}]'


def test_slots_are_read_alike_and_follow_the_stripped_text(tmp_path):
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text(
        '{"text":"  a caf\u00e9 \U0001f600!","label":"x","slots":[{"slot":"s","start":4,"end":10}]}\n'
    )
    quoted = SPANS.replace('"', '""')
    csv.write_text(f'text,label,slots\nthe lights kitchen,x,"{quoted}"\nbare,x,\n')
    (row,) = read_rows(jsonl)
    assert [row.text[span.start : span.end] for span in row.slots] == ["caf\u00e9 \U0001f600"]
    first, second = read_rows(csv)
    assert [(s.slot, first.text[s.start : s.end]) for s in first.slots] == [
        ("what", "lights"),
        ("room", "kitchen"),
    ]
    assert second.slots == ()


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ("{}", "not a list"),
        ('"{"', "not JSON"),
        ("[1]", "slot 1 has no name"),
        ('[{"slot":"s","start":0,"end":99}]', r"\(s\) does not lie"),
        ('[{"slot":"s","start":2,"end":2}]', "does not lie"),
        ('[{"slot":"s","start":true,"end":2}]', "does not lie"),
        ('[{"slot":"s","start":3,"end":4}]', "only blanks"),
        ('[{"slot":"s","start":0,"end":3},{"slot":"t","start":2,"end":5}]', "overlap"),
    ],
)
def test_spans_that_cannot_be_are_named(tmp_path, slots, said):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text":"ok","label":"x"}}\n{{"text":"two words","label":"x","slots":{slots}}}\n')
    with pytest.raises(BadRows, match=rf"line 2: .*{said}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('text,label\n"two\nlines",x\n\na,\n', "line 5: label is missing"),
        ("text,label\nhi, you,greet\n", "line 2: more fields"),
        ("utterance,intent\nhi,greet\n", "line 1 does not name.*utterance, intent"),
    ],
)
def test_csv_mistakes_are_named_where_they_stand(tmp_path, content, said):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(BadRows, match=said):
        read_rows(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text":"\\ud800","label":"x"}', "lone surrogate"),
        ('{"text":"a","label":"x\\ny"}', "control character"),
        (f'{{"text":"{"ab " * 2000}","label":"x"}}', "5999 bytes"),
        ('{"text":"a","label":' + "9" * 5000 + "}", "not a JSON object"),
    ],
)
def test_rows_no_bundle_could_take_are_refused(tmp_path, row, said):
    path = tmp_path / "a.jsonl"
    path.write_text(row)
    with pytest.raises(BadRows, match=said):
        read_rows(path)


def test_equal_texts_and_rows_are_known_again():
    assert normalised(" Cafe\u0301\t\u6771 ") == normalised("caf\u00e9 \u6771")
    one, two = LabelledText("a", "b", "val", line=3), LabelledText("a", "c")
    assert digest_of([one]) == digest_of([LabelledText("a", "b")]) != digest_of([two])
