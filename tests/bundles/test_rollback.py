"""The anti-rollback rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles.rollback import VersionFloor, raise_floor
from edge_runtime.core.errors import BundleError


def test_forward_and_again_but_never_back():
    floors = raise_floor({}, "m", "onnx", VersionFloor("k", 4, "a"))
    floors = raise_floor(floors, "m", "onnx", VersionFloor("k", 4, "a"))
    floors = raise_floor(floors, "m", "onnx", VersionFloor("k", 5, "b"))
    with pytest.raises(BundleError, match="version 5 has run"):
        raise_floor(floors, "m", "onnx", VersionFloor("k", 4, "a"))
    with pytest.raises(BundleError, match="another version 5"):
        raise_floor(floors, "m", "onnx", VersionFloor("k", 5, "c"))
    assert raise_floor(floors, "other", "onnx", VersionFloor("k", 1, "z"))["m"] == VersionFloor("k", 5, "b")


def test_a_new_key_starts_over():
    floors = raise_floor({}, "m", "onnx", VersionFloor("leaked", 10**17, "a"))
    assert raise_floor(floors, "m", "onnx", VersionFloor("new", 6, "b"))["m"].version == 6


def test_formats_have_their_own_content_and_one_version():
    floors = raise_floor(
        {"m": VersionFloor("k", 4, "a")}, "m", "tflite", VersionFloor("k", 4, "b")
    )  # as older records name it
    assert floors == {"m": VersionFloor("k", 4, "a"), "m@tflite": VersionFloor("k", 4, "b")}
    assert raise_floor(floors, "m", "onnx", VersionFloor("k", 4, "a")) == floors
    with pytest.raises(BundleError, match="another version 4"):
        raise_floor(floors, "m", "tflite", VersionFloor("k", 4, "c"))
    floors = raise_floor(floors, "m", "onnx", VersionFloor("k", 5, "d"))
    with pytest.raises(BundleError, match="version 5 has run"):
        raise_floor(floors, "m", "tflite", VersionFloor("k", 4, "b"))
    assert raise_floor(floors, "m", "tflite", VersionFloor("new", 1, "e"))["m@tflite"].version == 1
    assert raise_floor(floors, "m2", "tflite", VersionFloor("k", 1, "f"))["m2@tflite"].version == 1


@given(st.lists(st.tuples(st.sampled_from("mn"), st.integers(0, 5), st.sampled_from("ab")), max_size=12))
def test_what_ran_under_one_key_never_falls_and_has_one_content_each(steps):
    floors, ran = {}, {}
    for name, version, digest in steps:
        try:
            floors = raise_floor(floors, name, "onnx", VersionFloor("k", version, digest))
        except BundleError:
            continue
        assert version >= max([v for n, v in ran if n == name], default=0)
        assert ran.setdefault((name, version), digest) == digest
