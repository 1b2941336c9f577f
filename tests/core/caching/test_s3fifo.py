"""What stays when memory is short: the invariants of every policy, and what makes S3-FIFO worth having."""

import pytest

from edge_runtime.core.caching.s3fifo import Entry, S3Fifo
from tools.cache_policies import Lru, WTinyLfu
from tools.cache_traces import POLICIES, digests, hit_ratio, sizes_of, zipf

KEYS = digests(300)


def entry(i, size=100):
    return Entry(KEYS[i], i, "g", size, 0)


def ask(policy, i, size=100):
    found = policy.get(KEYS[i])
    if found is None:
        policy.put(entry(i, size))
    return found is not None


def kept(policy):
    return {i for i in range(len(KEYS)) if policy.get(KEYS[i]) is not None}


@pytest.mark.parametrize("policy", POLICIES.values())
def test_every_policy_stays_within_its_bytes_and_repeats_itself(policy):
    twins = [policy(5000), policy(5000)]
    sizes = sizes_of(300)
    for i in zipf(0.8, 3000, 5, 300).tolist():
        for twin in twins:
            ask(twin, i, sizes[i])
            assert twin.size_bytes <= 5000
    assert twins[0].evictions == twins[1].evictions > 100
    held = kept(twins[0])
    assert held == kept(twins[1])
    assert len(held) == len(twins[0])
    assert twins[0].size_bytes == sum(sizes[i] for i in held)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_what_is_put_again_replaces_and_what_cannot_fit_evicts_nobody(policy):
    made = policy(100_000)
    for i in range(5):
        made.put(entry(i))
    made.put(entry(2, 700))
    assert (len(made), made.size_bytes) == (5, 1100)
    made.put(entry(9, 100_001))
    assert kept(made) == {0, 1, 2, 3, 4}
    made.put(entry(2, 100_001))  # its old value is no longer true either
    assert kept(made) == {0, 1, 3, 4}
    assert made.size_bytes == 400


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_group_can_be_dropped_in_the_middle(policy):
    made = policy(3000)
    for i in range(60):
        ask(made, i)
        ask(made, i // 2)
    before = kept(made)
    made.retain(lambda held: held.value % 3 != 0)
    assert kept(made) == {i for i in before if i % 3}
    assert made.size_bytes == 100 * len(made)
    for i in range(60, 120):
        ask(made, i)
        assert made.size_bytes <= 3000


def test_a_scan_does_not_wash_out_what_is_asked_for_again_and_again():
    made = S3Fifo(2000)
    for _ in range(4):
        for i in range(10):
            ask(made, i)
    for i in range(20, 200):
        ask(made, i)
    assert {i for i in range(10) if made.get(KEYS[i]) is not None} == set(range(10))
    washed = Lru(2000)
    for _ in range(4):
        for i in range(10):
            ask(washed, i)
    for i in range(20, 200):
        ask(washed, i)
    assert not kept(washed) & set(range(10))


def test_what_went_too_early_comes_back_to_stay():
    made = S3Fifo(1000)
    for i in range(10):
        ask(made, i)
    ask(made, 10)  # 0 goes, its key is remembered
    assert made.get(KEYS[0]) is None
    ask(made, 0)
    for i in range(20, 50):
        ask(made, i)
    assert ask(made, 0)


def test_a_large_entry_must_be_asked_for_more_often():
    def survives(size, asked):
        made = S3Fifo(10_000)
        made.put(entry(0, size))
        for _ in range(asked):
            made.get(KEYS[0])
        for i in range(1, 120):
            ask(made, i)
        return made.get(KEYS[0]) is not None

    assert survives(100, 2)
    assert not survives(100, 1)
    assert not survives(900, 2)


def test_the_keys_of_the_gone_are_bounded_too():
    made = S3Fifo(1000)
    for key in digests(5000):
        made.put(Entry(key, 0, "", 100, 0))
    assert len(made._ghosts) <= len(made) == 10
    assert len(made._ghost_order) <= len(made)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_s3_fifo_finds_nearly_what_the_best_finds(share):
    """Docs have the whole table; the bound is the one to hold."""
    names, sizes = digests(5000), sizes_of(5000)
    trace = zipf(0.9, 25_000, 2, 5000)
    ratio = {
        policy: hit_ratio(policy(int(sum(sizes) * share)), trace, names, sizes)
        for policy in (S3Fifo, Lru, WTinyLfu)
    }
    assert ratio[S3Fifo] >= 0.98 * max(ratio.values())
