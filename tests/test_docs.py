"""What the documents say can be done, is done here; what they link to exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import fields

from cloud_fallback.config import load_config as load_cloud
from edge_runtime.cli.main import main as edge
from edge_runtime.config import load_config
from tools import document_config

TOP = Path(__file__).parent.parent
PAGES = sorted([*TOP.glob("*.md"), *TOP.glob("docs/*.md"), *TOP.glob("models/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        (page.name, text)
        for page in PAGES
        for kind, text in BLOCK.findall(page.read_text())
        if kind == language
    ]


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_configurations_load(tmp_path, page, text):
    """A block that begins with the comment `# cloud.toml` is the worker's; any other is the daemon's."""
    path = tmp_path / "some.toml"
    path.write_text(text)
    (load_cloud if text.startswith("# cloud.toml") else load_config)(path)


def test_the_reference_of_the_configuration_is_what_its_types_say():
    """After a change of the types: python -m tools.document_config."""
    assert document_config.PAGE.read_text() == document_config.page()


def test_every_key_is_described():
    from cloud_fallback.config import CloudConfig
    from edge_runtime.config import Config

    for top in (Config, CloudConfig):
        for kind in (top, *filter(None, (document_config.section_of(f.type) for f in fields(top)))):
            plain = {f.name for f in fields(kind) if document_config.section_of(f.type) is None}
            assert plain <= set(document_config.descriptions(kind)), kind


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_programs_run(page, text):
    body = "\n".join(f"    {line}" for line in text.splitlines())
    program = f"import asyncio\nasync def main():\n{body}\nasyncio.run(main())\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text())) | set(
            re.findall(r"^make ([a-z-]+) +#", page.read_text(), re.MULTILINE)
        )
        assert named <= targets, f"{page.name}: {named - targets}"


def test_commands_that_are_named_exist():
    for page in PAGES:
        for words in re.findall(r"edge-runtime (models )?([a-z]+)\b", page.read_text()):
            group = edge.commands["models"] if words[0] else edge
            assert words[1] in group.commands or words[1] in ("bundle", "is"), f"{page.name}: {words}"


@pytest.mark.train
def test_commands_of_the_tools_are_understood():
    from tools import calibrate, train_commands

    parsers = {"calibrate": calibrate.parser(), "train_commands": train_commands.parser()}
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    named = [line.split("python -m tools.", 1)[1] for line in lines if line.startswith("python -m tools.")]
    for line in named:
        tool, *arguments = shlex.split(line, comments=True)
        if tool in parsers:
            parsers[tool].parse_args(arguments)
    assert {line.split()[0] for line in named} >= set(parsers)
    page = (TOP / "docs/training.md").read_text()
    for action in parsers["train_commands"]._actions[1:]:  # all but --help
        assert any(
            f"`{option}" in page or f" {option}" in page for option in action.option_strings or ["DATA"]
        ), action
