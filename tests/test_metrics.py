"""What Prometheus reads: parsed by its own parser, quantiles can be computed."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime import Runtime
from edge_runtime.core.messages import BOUNDS_NS, Distribution, InferRequest, Tensor


def scraped(runtime):
    """Samples by name and sorted labels."""
    families = text_string_to_metric_families(runtime.metrics().decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def texts(*words):
    return InferRequest((Tensor("text", "BYTES", (len(words),), words),))


@pytest.fixture(scope="module")
def samples():
    """After 30 requests of one row, and one of eight rows that share batches."""

    async def scenario():
        async with Runtime.open() as runtime:
            for i in range(30):
                await runtime.infer("commands", texts(f"text {i}".encode()))
            await runtime.infer("commands", texts(*[f"more {i}".encode() for i in range(8)]))
            return scraped(runtime)

    return asyncio.run(scenario())


def buckets(samples, name):
    """Upper bound -> cumulative count, by rising bounds."""
    found = {
        dict(key[1:])["le"]: value
        for key, value in samples.items()
        if key[0] == f"{name}_bucket" and ("model", "commands") in key[1:]
    }
    return dict(sorted(((float(bound), count) for bound, count in found.items())))


@pytest.mark.parametrize("name", ["edge_requests_seconds", "edge_queue_seconds", "edge_batch_rows"])
def test_a_histogram_has_rising_buckets_a_count_and_a_sum(samples, name):
    found = buckets(samples, name)
    counts = list(found.values())
    assert len(counts) > 3
    assert counts == sorted(counts)
    assert float("inf") in found
    assert counts[-1] == samples[f"{name}_count", ("model", "commands")] > 0
    assert samples[f"{name}_sum", ("model", "commands")] > 0


def test_the_sizes_of_batches_add_up_to_the_rows(samples):
    assert samples["edge_batch_rows_sum", ("model", "commands")] == 38
    assert buckets(samples, "edge_batch_rows")[1.0] >= 30
    assert (
        samples["edge_batches_total", ("model", "commands")]
        == buckets(samples, "edge_batch_rows")[float("inf")]
    )


def test_rows_are_counted_by_origin_and_reason(samples):
    rows = {key[1:]: value for key, value in samples.items() if key[0] == "edge_rows_total"}
    assert sum(rows.values()) == 38
    assert {dict(labels)["origin"] for labels in rows} == {"local"}


@given(st.lists(st.tuples(st.integers(0, 2 * 10**10), st.integers(1, 5))))
def test_each_event_is_counted_in_the_interval_it_lies_in(events):
    distribution = Distribution()
    for ns, count in events:
        distribution.add(ns, count)
    assert sum(distribution.counts) == distribution.count == sum(count for _, count in events)
    for at, bound in enumerate(BOUNDS_NS):
        below = sum(count for ns, count in events if ns <= bound)
        assert sum(distribution.counts[: at + 1]) == below
