import json

from tools import measure_code

SOURCE = '''"""Two lines
of text."""

import os  # one comment


def short():
    return "# none"


class Thing:
    """One line."""

    # two
    # three
    async def long(self):
        """Nothing
        to see."""
        def inner():
            "not counted as a comment"
        return inner
'''


def test_a_folder_is_measured_and_printed(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("x = 1\n")
    assert measure_code.main(["--json", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["files"], row["lines"], row["median_file"], row["longest_file"]) == (2, 22, 11, 21)
    assert (row["longest_function"], row["longest_name"], row["median_function"]) == (6, "one.long", 2)
    assert (row["comments"], row["docstrings"]) == (round(300 / 22, 1), round(600 / 22, 1))
    assert measure_code.main(["--json", str(tmp_path), "--without", "a"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["lines"] == 1
    assert measure_code.main(["--apart", str(tmp_path), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.count("`one.long` (2)") == 2


def test_a_folder_without_code_is_an_error(tmp_path, capsys):
    assert measure_code.main([str(tmp_path)]) == 1
    assert "no Python file" in capsys.readouterr().err
