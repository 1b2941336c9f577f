"""One rule for the names of tenants, devices, models and files."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.core.errors import InvalidRequest
from edge_runtime.core.protocol.ids import checked_id, id_from, is_id


@pytest.mark.parametrize("name", ["a", "7", "kitchen-1", "a.b_c", "x" * 64])
def test_an_id_is_one(name):
    assert is_id(name)
    assert checked_id("device", name) == name


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "_a", "a b", "a/b", "a..b", "a\n", "x" * 65, "+", "#", "\u00e9", "\u0663"]
)
def test_anything_else_is_refused_without_repeating_it(name):
    assert not is_id(name)
    with pytest.raises(InvalidRequest, match="The device is not an id; use lower-case letters") as refusal:
        checked_id("device", name)
    assert len(name) < 2 or name not in str(refusal.value)


@given(st.text())
@example("kitchen..pi")
@example("-._")
@example("x" * 63 + "..y")
def test_an_id_can_be_made_of_any_text(text):
    assert is_id(id_from(text, "device"))


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}[a-z0-9]", fullmatch=True).filter(is_id))
def test_an_id_stays_as_it_is(name):
    assert id_from(name, "device") == name
