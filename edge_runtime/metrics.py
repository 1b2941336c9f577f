"""Prometheus text from the running totals; nothing is counted twice and nothing happens before a scrape."""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric

from edge_runtime.caching.two_level import DiskStore
from edge_runtime.core.escalation.decision import LinkState
from edge_runtime.core.messages import BOUNDS_NS, Distribution
from edge_runtime.serving.service import Service

_BOUNDS_S = [*(str(bound / 1e9) for bound in BOUNDS_NS), "+Inf"]


class CloudLink(Protocol):
    """What is read of the way to the cloud.

    Not the class `Uplink` itself: its module brings the MQTT library and TLS, 4 MB that a device without a cloud
    would pay at its first scrape.
    """

    @property
    def counters(self) -> Mapping[str, int]: ...
    def link_state(self) -> LinkState: ...


class _Collector:
    def __init__(self, service: Service, uplink: CloudLink | None) -> None:
        self._service = service
        self._uplink = uplink

    def collect(self) -> Iterable[Metric]:
        yield from _models(self._service)
        yield from _cache(self._service)
        if self._uplink is not None:
            yield from _cloud(self._uplink)


def render(service: Service, uplink: CloudLink | None) -> bytes:
    """The whole exposition in Prometheus' text format; label sets are closed."""
    registry = CollectorRegistry()
    registry.register(_Collector(service, uplink))
    return generate_latest(registry)


def _models(service: Service) -> Iterable[Metric]:
    rows = CounterMetricFamily(
        "edge_rows", "Rows answered, by origin and reason.", labels=["model", "origin", "reason"]
    )
    for labels, count in service.counters.outcomes.items():
        rows.add_metric(labels, count)
    yield rows
    yield from _requests(service)
    yield _histogram(
        "edge_queue_seconds",
        "Time that rows waited for an engine; 0 for those that the cache answered.",
        {info.name: service.statistics(info.name).queue for info in service.models()},
    )
    yield _batch_sizes(service)
    summaries = {
        "failures": "Rows the model failed on.",
        "compute_input": "Time from raw input to tensors.",
        "compute_infer": "Engine time, per row of the batch it ran in.",
        "compute_output": "Time from tensors to answers.",
        "cache_hit": "Look-ups that found an answer.",
        "cache_miss": "Look-ups that found none.",
    }
    for name, text in summaries.items():
        family = SummaryMetricFamily(f"edge_{name}_seconds", text, labels=["model"])
        for info in service.models():
            duration = getattr(service.statistics(info.name), name)
            family.add_metric([info.name], duration.count, duration.ns / 1e9)
        yield family
    memory = GaugeMetricFamily(
        "edge_model_memory_bytes",
        "Largest memory of the model, as measured at its first load in the sandbox.",
        labels=["model"],
    )
    load = GaugeMetricFamily("edge_model_load_seconds", "Time that loading the model took.", labels=["model"])
    for info in service.models():
        if info.memory_bytes is not None:
            memory.add_metric([info.name], info.memory_bytes)
        load.add_metric([info.name], info.load_ns / 1e9)
    yield memory
    yield load
    batches = CounterMetricFamily("edge_batches", "Batches run.", labels=["model"])
    waiting = GaugeMetricFamily("edge_waiting_rows", "Rows that wait for an engine.", labels=["model"])
    for info in service.models():
        batches.add_metric([info.name], service.statistics(info.name).executions)
        waiting.add_metric([info.name], service.waiting(info.name))
    yield batches
    yield waiting
    yield from _troubles(service)


def _batch_sizes(service: Service) -> Metric:
    histogram = HistogramMetricFamily("edge_batch_rows", "Rows of the batches that ran.", labels=["model"])
    for info in service.models():
        sizes = service.statistics(info.name).batch_sizes
        bounds = [1 << power for power in range((max(info.max_batch, 1) - 1).bit_length() + 1)]
        counts = [sum(n for size, n in sizes.items() if size <= bound) for bound in bounds]
        buckets = [*zip(map(str, map(float, bounds)), counts, strict=True), ("+Inf", sum(sizes.values()))]
        histogram.add_metric([info.name], buckets, sum(size * n for size, n in sizes.items()))
    return histogram


def _histogram(name: str, text: str, by_model: Mapping[str, Distribution]) -> Metric:
    histogram = HistogramMetricFamily(name, text, labels=["model"])
    for model, distribution in by_model.items():
        counts = zip(_BOUNDS_S, accumulate(distribution.counts), strict=True)
        histogram.add_metric([model], list(counts), distribution.ns / 1e9)
    return histogram


def _requests(service: Service) -> Iterable[Metric]:
    endings = CounterMetricFamily(
        "edge_requests", "Requests, by the way in which they ended.", labels=["model", "ending"]
    )
    for model, totals in service.counters.requests.items():
        for ending, count in totals.endings.items():
            endings.add_metric([model, ending], count)
    yield endings
    yield _histogram(
        "edge_requests_seconds",
        "End-to-end time of requests that were served.",
        {model: totals.success for model, totals in service.counters.requests.items()},
    )
    yield CounterMetricFamily(
        "edge_requests_unknown_model",
        "Requests for models that are not loaded.",
        service.counters.unknown_model,
    )


def _troubles(service: Service) -> Iterable[Metric]:
    refused = CounterMetricFamily("edge_refused_rows", "Rows the queue refused.", labels=["model", "kind"])
    faults = CounterMetricFamily("edge_failed_batches", "Batches that failed.", labels=["model", "fault"])
    replaced = CounterMetricFamily(
        "edge_engines_replaced", "Engines that hung and were replaced.", labels=["model"]
    )
    for info in service.models():
        statistics = service.statistics(info.name)
        for kind, count in statistics.refused.items():
            refused.add_metric([info.name, kind], count)
        for fault, count in statistics.faults.items():
            faults.add_metric([info.name, fault], count)
        replaced.add_metric([info.name], statistics.replaced)
    yield refused
    yield faults
    yield replaced


def _cache(service: Service) -> Iterable[Metric]:
    yield CounterMetricFamily(
        "edge_coalesced_rows",
        "Rows that waited for the answer of an identical row in flight.",
        service.counters.coalesced,
    )
    if service.cache is None:
        return
    memory = service.cache.memory
    yield GaugeMetricFamily("edge_cache_bytes", "Bytes the cache holds.", memory.size_bytes)
    yield GaugeMetricFamily("edge_cache_entries", "Answers the cache holds.", len(memory))
    yield CounterMetricFamily(
        "edge_cache_evictions", "Answers evicted to make room for others.", memory.evictions
    )
    if service.cache.disk is not None:
        yield from _disk(service.cache.disk)


def _disk(store: DiskStore) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "edge_disk_cache_up",
        "1 while the cache on disk works, 0 after a fault of its file turned it off.",
        int(store.is_on),
    )
    yield GaugeMetricFamily(
        "edge_disk_cache_bytes", "Bytes in the file of the cache on disk.", store.size_bytes
    )
    yield GaugeMetricFamily(
        "edge_disk_cache_lookup_seconds",
        "Time of one look-up in the cache on disk, as last measured.",
        store.lookup_ns / 1e9,
    )
    events = CounterMetricFamily(
        "edge_disk_cache_events", "Look-ups by result, and writes, of the cache on disk.", labels=["event"]
    )
    for event, count in store.counters.items():
        events.add_metric([event], count)
    yield events


def _cloud(uplink: CloudLink) -> Iterable[Metric]:
    state = uplink.link_state()
    yield GaugeMetricFamily("edge_link_up", "1 while connected to the broker.", int(state.is_connected))
    yield GaugeMetricFamily(
        "edge_breaker_open",
        "1 while the circuit breaker keeps requests from the cloud.",
        int(state.is_breaker_open),
    )
    events = CounterMetricFamily(
        "edge_uplink_events", "Requests sent to the cloud, by result.", labels=["event"]
    )
    for event, count in uplink.counters.items():
        events.add_metric([event], count)
    yield events
