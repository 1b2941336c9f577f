"""What people read: whole at 80 columns, what is wrong first."""

import io

import pytest
from rich.console import Console

from edge_runtime.cli.tables import age, print_status


def model(**more):
    return {
        "name": "commands",
        "version": "7",
        "rows": 3,
        "batches": 2,
        "mean_batch": 1.5,
        "waiting": 0,
        "memory_mb": 16.2,
        "batch_note": "",
        "refused": {},
        "failed_batches": {},
        "engines_replaced": 0,
    } | more


def status(**more):
    return {
        "version": "0.1.0",
        "state": "ready",
        "ready": True,
        "addresses": ["unix:/run/user/1000/edge-runtime/edge.sock", "http://127.0.0.1:8080"],
        "problems": [],
        "uptime_s": 3.0,
        "memory_mb": 78.6,
        "models": [model()],
        "answers": [{"model": "commands", "origin": "local", "reason": "confident", "rows": 3}],
        "cache": {"entries": 1, "bytes": 714, "hits": 0, "disk": None},
        "cloud": None,
    } | more


def shown(tree, width=80):
    out = io.StringIO()
    print_status(tree, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_state_addresses_and_models_are_shown():
    text = shown(status())
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "edge-runtime 0.1.0: ready, up 3 s, 78.6 MB"
    assert lines[1:3] == [
        "listens on  unix:/run/user/1000/edge-runtime/edge.sock",
        "            http://127.0.0.1:8080",
    ]
    assert "cache       entries 1, bytes 714" in lines  # what never happened is left out
    assert "cloud       off" in lines
    assert "problem" not in text


def test_a_daemon_that_drains_says_so_and_what_is_wrong_since_when():
    since = {"since": "2026-11-25T14:03:00+00:00", "for_s": 3723.0}
    text = shown(
        status(
            state="draining",
            ready=False,
            problems=[
                {"part": "cloud", "why": "No connection to mqtt://x: refused.", **since},
                {"part": "model commands", "why": "No engine is in service.", **since},
            ],
        )
    )
    assert text.startswith("edge-runtime 0.1.0: draining,")
    assert "problem     cloud, for 1 h 2 min, since " in text
    assert "No connection to mqtt://x: refused." in text
    assert "problem     model commands, for 1 h 2 min, since " in text


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off_or_broken_at_80_columns(width):
    long = "a" * 64
    why = "connecting failed: [Errno 111] Connection refused while the broker's certificate was being checked"
    text = shown(
        status(
            addresses=[f"unix:/run/{long}/{long}/edge.sock", "http://127.0.0.1:8080"],
            problems=[{"part": "cloud", "why": why, "since": "2026-11-25T14:03:00+00:00", "for_s": 1e7}],
            models=[
                model(
                    name=long,
                    version="123456789012345678",
                    rows=1_234_567_890,
                    batches=1_234_567_890,
                    waiting=1024,
                    batch_note="its rows may not share a batch: quantised dynamically",
                    refused={"full": 12_345, "late": 3},
                    failed_batches={"hung": 2},
                    engines_replaced=2,
                )
            ],
            answers=[{"model": long, "origin": "local", "reason": "low_confidence", "rows": 1_234_567_890}],
            cloud={f"counter_{i}": 1_234_567 for i in range(12)} | {"broker": f"mqtt://{long}"},
        ),
        width,
    )
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    assert text.count("1,234,567,890") == 3
    assert "1,024" in text
    assert "full 12,345, late 3; failed batches: hung 2; engine restarts: 2" in " ".join(text.split())
    assert "low_confidence" in text
    assert why in " ".join(text.split())
    assert f"{long[:60]}" in "".join(text.split())


def test_markup_in_names_is_text():
    assert "[red]x[/red]" in shown(status(addresses=["unix:[red]x[/red]"]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3_600, "1 h"),
        (3_723, "1 h 2 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_an_age_has_its_two_largest_units(seconds, text):
    assert age(seconds) == text
