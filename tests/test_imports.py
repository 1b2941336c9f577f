"""The rules of the layout, held by reading every import of the project."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Outside things and the one module each that may import them.
OWNERS = {
    "paho": "edge_runtime.mqtt.connection",
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
CLOUD_MAY_NOT = tuple(
    f"edge_runtime.{name}"
    for name in ("serving.service", "server", "uplink", "daemon", "cli", "runtime", "client")
)


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_rules(module, source):
    broken = []
    for name in imports(source):
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
        if module.startswith("cloud_fallback") and name.startswith(CLOUD_MAY_NOT):
            broken.append(f"{module} imports {name}, which belongs to the edge alone")
    return broken


def modules():
    for package in ("edge_runtime", "cloud_fallback"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()


def test_every_import_points_the_right_way():
    found = list(modules())
    assert len(found) > 30
    assert [rule for module, source in found for rule in broken_rules(module, source)] == []


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
    ],
)
def test_the_rules_see_a_breach(module, source):
    assert broken_rules(module, source)
