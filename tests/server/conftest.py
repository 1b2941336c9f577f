"""Fixtures of the server's tests."""

import asyncio

import pytest


@pytest.fixture(params=["asyncio", "uvloop"])
def both_loops(request, monkeypatch):
    """Each test on both event loops: they differ in when they write, and in what they do at the end of input."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        monkeypatch.setattr(asyncio, "run", uvloop.run)
