"""What the tools share: reading labelled texts, and the curve of accuracy against offload."""

import numpy as np
import pytest

from tools.evaluate import Answers, cascade, evaluate, summary
from tools.rows import BadRows, LabelledText, read_rows


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
