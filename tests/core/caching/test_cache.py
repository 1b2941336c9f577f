"""The key law, and the cache's invariants under any sequence of calls."""

import os

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from edge_runtime.core.caching.cache import Cache
from edge_runtime.core.caching.keys import KeyPrefix

BASE = {
    "tenant_secret": b"s" * 32,
    "model_digest": "d1",
    "processing_version": "1",
    "engine": "onnxruntime 1.30 True",
    "policy": "0.8 True",
    "parameters": {"a": 1},
    "outputs": ("intent",),
}
OVERHEAD = Cache.OVERHEAD_BYTES


def key(row=b"row", **changes):
    return KeyPrefix(**(BASE | changes)).key(row)


def test_equal_parts_give_equal_keys_in_any_parameter_order():
    assert key(parameters={"a": 1, "b": 2}) == key(parameters={"b": 2, "a": 1})


def test_how_a_request_travels_is_not_part_of_what_it_asks():
    assert key(parameters={"a": 1, "timeout": 5, "deadline_ms": 3, "cache": True}) == key()


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_secret": b"t" * 32},
        {"model_digest": "d2"},
        {"processing_version": "2"},
        {"engine": "onnxruntime 1.30 False"},
        {"policy": "0.9 True"},
        {"parameters": {"a": 2}},
        {"parameters": {"a": "1"}},
        {"parameters": {"a": True}},
        {"parameters": {"a": 1.0}},
        {"parameters": {"b": 1}},
        {"parameters": {}},
        {"outputs": ("confidence",)},
        {"outputs": ()},
        {"outputs": ("intent", "confidence")},
        {"row": b"rox"},
        {"row": b"row\0"},
        {"model_digest": "d", "processing_version": "11"},  # a byte moved between neighbours
        {"processing_version": "1o", "engine": "nnxruntime 1.30 True"},
        {"engine": "onnxruntime 1.30 True0", "policy": ".8 True"},
        {"parameters": {}, "outputs": ("a", "int", "1", "intent")},
    ],
)
def test_a_change_of_any_part_changes_the_key(change):
    assert key(**change) != key()


FIELDS = st.fixed_dictionaries(
    {
        "model_digest": st.text("ab", max_size=2),
        "processing_version": st.text("ab", max_size=2),
        "engine": st.text("ab", max_size=2),
        "policy": st.text("ab", max_size=2),
        "parameters": st.dictionaries(
            st.text("ab", max_size=1), st.sampled_from([1, "1", True, "a"]), max_size=2
        ),
        "outputs": st.lists(st.text("ab", max_size=1), max_size=2).map(tuple),
    }
)


@given(FIELDS, st.binary(max_size=2), FIELDS, st.binary(max_size=2))
def test_two_requests_share_a_key_only_if_they_are_equal(one, row, other, other_row):
    def typed(fields):
        return {**fields, "parameters": {(k, type(v), v) for k, v in fields["parameters"].items()}}

    same = typed(one) == typed(other) and row == other_row
    assert (key(row, **one) == key(other_row, **other)) == same


def test_an_entry_is_fresh_until_its_time_then_stale_then_nothing():
    cache = Cache[str](10_000, ttl_ns=100, stale_ns=50)
    cache.put(0, b"k", "v", 1)
    assert cache.get(99, b"k") == "v"
    assert cache.get(100, b"k") is None
    assert cache.get_stale(100, b"k") == cache.get_stale(149, b"k") == "v"
    assert cache.get_stale(150, b"k") is None
    assert cache.get(149, b"k") is None  # being of use while stale did not make it fresh


def test_what_arrives_old_dies_in_its_own_time():
    cache = Cache[str](10_000, ttl_ns=100)
    cache.put(1000, b"k", "v", 1, age_ns=60)
    assert cache.get(1039, b"k") == "v"
    assert cache.get(1040, b"k") is None


def test_a_model_is_forgotten_and_the_others_are_not():
    cache = Cache[int](100_000, ttl_ns=100)
    for i in range(10):
        cache.put(0, bytes([i]), i, 0, group="ab"[i % 2])
    cache.forget("a", unless=lambda value: value == 4)
    assert [i for i in range(10) if cache.get(1, bytes([i])) is not None] == [1, 3, 4, 5, 7, 9]
    assert cache.size_bytes == 6 * OVERHEAD


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of calls: bounded, true, forgetful in time, and the same again for the same calls.

    A plain dictionary knows what was put; `twin` gets every call a second time.
    """

    TTL, STALE, MAX_BYTES = 50, 30, 6 * OVERHEAD

    def __init__(self):
        super().__init__()
        self.cache = Cache[int](self.MAX_BYTES, self.TTL, self.STALE)
        self.twin = Cache[int](self.MAX_BYTES, self.TTL, self.STALE)
        self.now = 0
        self.put = {}  # key -> (value, born, group, size)
        self.number = 0

    def both(self, call):
        first, second = call(self.cache), call(self.twin)
        assert first == second, "the same calls gave two results"
        return first

    @rule(calls=st.binary(min_size=100, max_size=100))
    def call(self, calls):
        """Fifty calls of two bytes each: drawing them one by one costs fifty times what they cost."""
        for which, much in zip(calls[::2], calls[1::2], strict=True):
            name = which % 12
            (self.ask, self.keep, self.ask_stale, self.keep, self.ask)[which // 12 % 5](name, much)
            if which >= 252:
                self.new_version("ab"[which % 2])
            self.bounded_and_counted()

    def keep(self, name, much):
        self.number += 1
        age, group, size = much % 7, "ab"[name % 2], 4 * much
        self.both(lambda c: c.put(self.now, bytes([name]), self.number, size, group=group, age_ns=age))
        self.put[name] = (self.number, self.now - age, group, size + OVERHEAD)

    def ask(self, name, much):
        self.now += much % 13
        found = self.both(lambda c: c.get(self.now, bytes([name])))
        if found is not None:
            value, born, _, _ = self.put[name]
            assert found == value, "a value under another key, or an older one"
            assert self.now < born + self.TTL, "expired, and returned as fresh"

    def ask_stale(self, name, much):
        self.now += much % 13
        found = self.both(lambda c: c.get_stale(self.now, bytes([name])))
        if found is not None:
            value, born, _, _ = self.put[name]
            assert found == value, "a value under another key, or an older one"
            assert self.now < born + self.TTL + self.STALE, "beyond its stale time"

    def new_version(self, group):
        self.both(lambda c: c.forget(group))
        self.put = {name: put for name, put in self.put.items() if put[2] != group}
        held = {key[0] for key in self.cache._eviction._entries}
        assert held <= self.put.keys(), "forgotten, and still there"

    def bounded_and_counted(self):
        eviction = self.cache._eviction
        assert self.cache.size_bytes <= self.MAX_BYTES, "beyond the bound"
        total = 0
        for key, entry in eviction._entries.items():
            total += entry.size_bytes
            assert (entry.key, entry.value) == (key, self.put[key[0]][0])
        assert self.cache.size_bytes == total, "not the sum of what is there"
        assert eviction._small_bytes == sum(entry.size_bytes for entry in eviction._small)
        assert len(self.cache) == len(eviction._entries) == len(eviction._small) + len(eviction._main)


#: 100,000 steps in `make test`, the same ones in every run; `make soak` takes new ones and prints how to repeat a failure.
IS_SOAK = os.environ.get("EDGE_RUNTIME_TESTS") == "soak"
CacheMachine.TestCase.settings = settings(
    max_examples=2500 if IS_SOAK else 3 * settings.default.max_examples,
    stateful_step_count=20,
    deadline=None,
    derandomize=not IS_SOAK,
    database=None,
    print_blob=True,
)
TestCache = CacheMachine.TestCase
