"""The key law and the bounds of the answer cache."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_runtime.core.caching import Cache, KeyPrefix

BASE = {
    "tenant_secret": b"s" * 32,
    "model_digest": "d1",
    "processing_version": "1",
    "parameters": {"a": 1},
    "outputs": ("intent",),
}


def key(row=b"row", **changes):
    return KeyPrefix(**(BASE | changes)).key(row)


def test_equal_parts_give_equal_keys_in_any_parameter_order():
    assert key(parameters={"a": 1, "b": 2}) == key(parameters={"b": 2, "a": 1})


def test_how_a_request_travels_is_not_part_of_what_it_asks():
    assert key(parameters={"a": 1, "timeout": 5, "deadline_ms": 3}) == key()


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_secret": b"t" * 32},
        {"model_digest": "d2"},
        {"processing_version": "2"},
        {"parameters": {"a": 2}},
        {"parameters": {"a": "1"}},
        {"parameters": {"a": True}},
        {"parameters": {"b": 1}},
        {"parameters": {}},
        {"outputs": ("confidence",)},
        {"outputs": ()},
        {"outputs": ("intent", "confidence")},
        {"row": b"rox"},
        {"model_digest": "d", "processing_version": "11"},  # a byte moved between neighbours
        {"parameters": {}, "outputs": ("a", "int", "1", "intent")},
    ],
)
def test_a_change_of_any_part_changes_the_key(change):
    assert key(**change) != key()


def test_an_entry_lives_until_its_time_and_no_longer():
    cache = Cache[str](10_000, ttl_ns=100)
    cache.put(0, b"k", "v", 1)
    assert cache.get(99, b"k") == "v"
    assert cache.get(100, b"k") is None
    assert cache.size_bytes == 0


def test_the_least_recently_used_goes_first():
    cache = Cache[int](3 * Cache.OVERHEAD_BYTES, ttl_ns=100)
    for i in range(3):
        cache.put(0, bytes([i]), i, 0)
    cache.get(0, b"\0")
    cache.put(0, b"\3", 3, 0)
    assert [cache.get(0, bytes([i])) for i in range(4)] == [0, None, 2, 3]


def test_what_cannot_fit_evicts_nobody():
    cache = Cache[int](2 * Cache.OVERHEAD_BYTES, ttl_ns=100)
    cache.put(0, b"a", 1, 0)
    cache.put(0, b"b", 2, 10**6)
    assert (cache.get(0, b"a"), cache.get(0, b"b")) == (1, None)


@given(
    st.lists(
        st.tuples(st.sampled_from("pgc"), st.integers(0, 9), st.integers(0, 900), st.integers(0, 30)),
        max_size=60,
    )
)
def test_any_sequence_stays_bounded_and_true(steps):
    cache = Cache[int](2_000, ttl_ns=50)
    now, model = 0, {}
    for number, (kind, name, size, wait) in enumerate(steps):
        now += wait
        label = bytes([name])
        if kind == "p":
            cache.put(now, label, number, size)
            model[label] = (number, now)
        elif kind == "c":
            cache.clear()
            model.clear()
        else:
            found = cache.get(now, label)
            if found is not None:
                value, put_at = model[label]
                assert found == value
                assert now < put_at + 50
        assert cache.size_bytes <= 2_000
        assert cache.size_bytes == sum(entry.size_bytes for entry in cache._entries.values())
