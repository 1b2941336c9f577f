"""The wheel alone, in an empty folder, answers a command."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path


def test_the_wheel_brings_its_model(tmp_path):
    top = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=top, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 2_800_000
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [n for n in names if n.startswith(("tests", "tools", "models/commands-cloud"))]
    program = (
        "import edge_runtime, pathlib; assert 'site' in pathlib.Path(edge_runtime.__file__).parts;"
        "from edge_runtime.cli.main import main; main()"
    )
    arguments = ["ask", "turn the lights off", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=empty, env={**os.environ, "PYTHONPATH": str(site), "XDG_RUNTIME_DIR": str(empty)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["intent"] == "smart_home"
