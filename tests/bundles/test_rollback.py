"""The ratchet of versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundles.rollback import Seen, admit
from edge_runtime.core.errors import BundleError


def test_forward_and_again_but_never_back():
    seen = admit({}, "m", "onnx", Seen("k", 4, "a"))
    seen = admit(seen, "m", "onnx", Seen("k", 4, "a"))
    seen = admit(seen, "m", "onnx", Seen("k", 5, "b"))
    with pytest.raises(BundleError, match="version 5 has run"):
        admit(seen, "m", "onnx", Seen("k", 4, "a"))
    with pytest.raises(BundleError, match="another version 5"):
        admit(seen, "m", "onnx", Seen("k", 5, "c"))
    assert admit(seen, "other", "onnx", Seen("k", 1, "z"))["m"] == Seen("k", 5, "b")


def test_a_new_key_begins_anew():
    seen = admit({}, "m", "onnx", Seen("leaked", 10**17, "a"))
    assert admit(seen, "m", "onnx", Seen("new", 6, "b"))["m"].version == 6


def test_formats_have_their_own_content_and_one_version():
    seen = admit({"m": Seen("k", 4, "a")}, "m", "tflite", Seen("k", 4, "b"))  # as older records name it
    assert seen == {"m": Seen("k", 4, "a"), "m@tflite": Seen("k", 4, "b")}
    assert admit(seen, "m", "onnx", Seen("k", 4, "a")) == seen
    with pytest.raises(BundleError, match="another version 4"):
        admit(seen, "m", "tflite", Seen("k", 4, "c"))
    seen = admit(seen, "m", "onnx", Seen("k", 5, "d"))
    with pytest.raises(BundleError, match="version 5 has run"):
        admit(seen, "m", "tflite", Seen("k", 4, "b"))
    assert admit(seen, "m", "tflite", Seen("new", 1, "e"))["m@tflite"].version == 1
    assert admit(seen, "m2", "tflite", Seen("k", 1, "f"))["m2@tflite"].version == 1


@given(st.lists(st.tuples(st.sampled_from("mn"), st.integers(0, 5), st.sampled_from("ab")), max_size=12))
def test_what_ran_under_one_key_never_falls_and_has_one_content_each(steps):
    seen, ran = {}, {}
    for name, version, digest in steps:
        try:
            seen = admit(seen, name, "onnx", Seen("k", version, digest))
        except BundleError:
            continue
        assert version >= max([v for n, v in ran if n == name], default=0)
        assert ran.setdefault((name, version), digest) == digest
