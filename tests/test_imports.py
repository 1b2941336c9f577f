"""The rules of the layout, held by reading every import of the project.

The layers stand in a table of docs/architecture.md, which this test reads.
"""

import functools

import pytest

from tools import import_picture
from tools.import_picture import PAGE, imported_unit, imports, is_package, modules, unit_of

LAYERS = import_picture.read_layers(PAGE.read_text())
#: Outside things and the one module each that may import them.
OWNERS = {
    "paho": "edge_runtime.mqtt.paho_adapter",
    "onnxruntime": "edge_runtime.engines.onnx",
    "ai_edge_litert": "edge_runtime.engines.litert",
    "tflite_runtime": "edge_runtime.engines.litert",
    "zstandard": "edge_runtime.compression",
    "httptools": "edge_runtime.server.http11",
    "cryptography": "edge_runtime.bundles.signing",
    "rich": "edge_runtime.cli.tables",
    "sqlite3": "edge_runtime.storage.sqlite_thread",
    "tokenizers": "edge_runtime.processing.wordpiece",
    "prometheus_client": "edge_runtime.metrics",
    "uvloop": "edge_runtime.daemon",
}
IMPURE = {"asyncio", "socket", "threading", "time", "random", "secrets", "os", "pathlib", "subprocess", "io"}


@functools.cache
def project():
    """Every module's source, what each module imports, and what each unit of the table imports."""
    found = modules()
    return found, import_picture.module_graph(found), import_picture.unit_graph(found, LAYERS)


def broken_rules(module, source):
    """What `module` of the project would break if it had `source`."""
    broken = []
    for name in imports(module, source, is_package=is_package(module)):
        top = name.split(".")[0]
        if top in OWNERS and OWNERS[top] != module:
            broken.append(f"{module} imports {top}, which belongs to {OWNERS[top]}")
        if module.startswith("edge_runtime.core"):
            outside = name.startswith("edge_runtime.") and not name.startswith("edge_runtime.core")
            if top in IMPURE or top in OWNERS or outside:
                broken.append(f"{module} imports {name}; core is pure")
        if module.startswith("edge_runtime") and top == "cloud_fallback":
            broken.append(f"{module} imports the cloud tier")
        if top in {"tools", "tests"}:
            broken.append(f"{module} imports {top}")
        if top in import_picture.PACKAGES:
            broken += layer_broken(module, name)
    return broken + circles(module, source)


def layer_broken(module, name):
    unit, other = unit_of(module, LAYERS), imported_unit(name, LAYERS)
    if unit is None:
        return [f"{module} has no row in the table of layers of docs/architecture.md; add it to one"]
    if other is None:
        known = name == "edge_runtime.__version__" or not import_picture.is_module(name)
        return [] if known else [f"{module} imports {name}, which has no row in the table of layers"]
    here, there = LAYERS[unit], LAYERS[other]
    if here is there or (there.name.isdecimal() and int(there.name) <= here.reach):
        return []
    return [f"{module} imports {name}: layer {here.name} may not import layer {there.name}"]


def circles(module, source):
    """Circles that `source` closes: of modules, and of units that share a row."""
    found, module_imports, unit_imports = project()
    changed = import_picture.module_graph({**dict.fromkeys(found, ""), module: source})[module]
    unit = unit_of(module, LAYERS)
    row = LAYERS[unit].units if unit in LAYERS else ()
    siblings = {imported_unit(name, LAYERS) for name in imports(module, source)} & set(row) - {unit}
    graphs = (
        (module, module_imports | {module: module_imports.get(module, set()) | changed}),
        (unit, unit_imports | {unit: unit_imports.get(unit, set()) | siblings}),
    )
    ways = [import_picture.way_back(graph, start) for start, graph in graphs]
    return [f"a circle of imports: {' -> '.join(way)}" for way in ways if way]


def test_every_import_points_the_right_way():
    found = modules()
    assert len(found) > 30
    assert [rule for module, source in found.items() for rule in broken_rules(module, source)] == []


def test_the_table_has_a_row_for_each_module_and_reaches_down_only():
    assert {module for module in modules() if unit_of(module, LAYERS) is None} == {"edge_runtime.core"}
    numbered = [layer for layer in dict.fromkeys(LAYERS.values()) if layer.name.isdecimal()]
    assert [layer.name for layer in numbered] == [str(number) for number in range(1, len(numbered) + 1)]
    assert all(layer.reach == int(layer.name) - 1 for layer in numbered)
    assert 0 < LAYERS["cloud_fallback"].reach < int(LAYERS["server"].name)


def test_the_table_and_the_picture_stand_once():
    for mark in ("\n## Layers\n", import_picture.BEGIN, import_picture.END):
        assert PAGE.read_text().count(mark) == 1, mark


def test_the_picture_of_imports_is_what_the_imports_say(capsys):
    assert import_picture.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_picture_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "architecture.md"
    page.write_text(PAGE.read_text().replace(import_picture.BEGIN, f"{import_picture.BEGIN}\nmore"))
    monkeypatch.setattr(import_picture, "PAGE", page)
    assert import_picture.main(["--check"]) == 1
    assert "python -m tools.import_picture" in capsys.readouterr().err
    assert import_picture.main([]) == 0
    assert import_picture.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edge_runtime.core.scheduling.scheduler", "import asyncio"),
        ("edge_runtime.core.caching.cache", "from time import monotonic_ns"),
        ("edge_runtime.core.protocol.oip", "from edge_runtime.serving.model_runner import ModelRunner"),
        ("edge_runtime.serving.service", "import cloud_fallback.worker"),
        ("edge_runtime.uplink.uplink", "import paho.mqtt.client"),
        ("cloud_fallback.worker", "from edge_runtime.serving.service import Service"),
        ("edge_runtime.cli.main", "from tools import pack"),
        # inside a folder, and past a folder or two
        ("edge_runtime.serving.model_runner", "from edge_runtime.serving.service import Service"),
        ("edge_runtime.caching.answer_store", "from edge_runtime.uplink.uplink import Uplink"),
        ("edge_runtime.bundles.folder", "from edge_runtime.daemon import serve"),
        ("edge_runtime.engines.onnx", "from edge_runtime.server import start_server"),
        # each border, from the module below it to the one above
        ("edge_runtime.core.messages", "from edge_runtime.core.protocol import oip"),
        ("edge_runtime.core.protocol.topics", "from edge_runtime.typed_toml import read_secret"),
        ("edge_runtime.mqtt.envelope", "from edge_runtime.processing.words import words"),
        ("edge_runtime.processing.words", "from edge_runtime.loading import model"),
        ("edge_runtime.loading.model", "from edge_runtime.serving import model_runner"),
        ("edge_runtime.serving.engine_thread", "from edge_runtime.uplink.uplink import Uplink"),
        ("edge_runtime.uplink.uplink", "from edge_runtime.metrics import render"),
        ("edge_runtime.runtime", "from edge_runtime.daemon import serve"),
        ("edge_runtime.server.routes", "from edge_runtime import Runtime"),
        ("edge_runtime.daemon", "from edge_runtime.cli.main import main"),
        # the cloud tier, beyond what both share
        ("cloud_fallback.cli", "from edge_runtime.uplink.uplink import Uplink"),
        ("cloud_fallback.worker", "from edge_runtime.server.limits import Limits"),
        ("cloud_fallback.config", "from edge_runtime import Runtime"),
        # however it is written
        ("edge_runtime.engines.onnx", "def run():\n    from edge_runtime.server import routes"),
        ("edge_runtime.bundles.trust", "if TYPE_CHECKING:\n    from edge_runtime.runtime import Runtime"),
        ("edge_runtime.mqtt.connection", "from ..uplink import uplink"),
        ("edge_runtime.mqtt.connection", "from .. import runtime"),
        ("edge_runtime.engines", "from ..server import routes"),
        ("edge_runtime.mqtt.connection", "importlib.import_module('edge_runtime.uplink.uplink')"),
        ("edge_runtime.mqtt.connection", "import edge_runtime.serving.service as service"),
        # circles of one row, and of one folder
        ("edge_runtime.uplink.uplink", "from edge_runtime.serving.service import Service"),
        ("edge_runtime.compression", "from edge_runtime.bundles.folder import load_bundle"),
        ("edge_runtime.core.scheduling.lane", "from edge_runtime.core.scheduling.scheduler import Scheduler"),
        # a module that has no row
        ("edge_runtime.nowhere", "import edge_runtime.core.errors"),
    ],
)
def test_the_rules_see_a_breach(module, source):
    assert broken_rules(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edge_runtime.server.routes", "from edge_runtime import __version__"),
        ("edge_runtime.runtime", "from edge_runtime.serving.service import Service"),
        ("cloud_fallback.worker", "from edge_runtime.serving import model_runner"),
        ("edge_runtime.loading.model", "from ..engines import build"),
        ("edge_runtime.caching.answer_store", "import edge_runtime.core.outcome"),
    ],
)
def test_the_rules_let_the_rest_pass(module, source):
    assert broken_rules(module, source) == []
