"""A repository's counts for Prometheus, asked for when they are scraped."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvferry.cluster.repository import NamespaceStat, RepositoryStat, TierStat
from kvferry.errors import FerryError

# Namespaces that have time series of their own.
MAX_LABELLED = 100


class FailureCounts:
    """Refused and failed calls by reason; counted on the loop, read by the scraper."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, reason: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[reason] += 1

    def items(self) -> list[tuple[str, int]]:
        """(reason, count), sorted."""
        with self._lock:
            return sorted(self._counts.items())


class RepositoryCollector(Collector):
    """Gauges of what is held, and counters of what happened."""

    def __init__(
        self, prefix: str, stat: Callable[[], RepositoryStat], failures: FailureCounts
    ) -> None:
        """``stat`` is called from the scraper's thread. ``prefix``: "kvferry_store", say."""
        self._prefix, self._stat, self._failures = prefix, stat, failures

    def collect(self) -> Iterator[Metric]:
        """What Prometheus gets."""
        failed = CounterMetricFamily(
            f"{self._prefix}_failed_calls", "Calls refused or failed", labels=["reason"]
        )
        for reason, count in self._failures.items():
            failed.add_metric([reason], count)
        yield failed
        try:
            stat = self._stat()
        except FerryError:
            return
        for name, value, text in (
            ("blobs", stat.blobs, "Blobs held"),
            ("bytes", stat.bytes, "Bytes that count against the budget"),
            ("budget_bytes", stat.budget_bytes, "Budget in bytes"),
            ("in_flight_bytes", stat.in_flight_bytes, "Bytes of writes under way"),
            ("complete_pages", stat.pages_complete, "Pages with all layers and heads"),
            ("quarantined_blobs", stat.quarantined, "Damaged blobs set aside"),
            ("free_disk_bytes", stat.free_disk_bytes, "Free bytes of the file system"),
            ("leased_blobs", stat.pinned, "Blobs under a lease"),
        ):
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=value)
        events = CounterMetricFamily(
            f"{self._prefix}_events", "What happened, by kind", labels=["event"]
        )
        for event, count in sorted(stat.counters.items()):
            events.add_metric([event], count)
        yield events
        yield from self._tiers(stat.tiers)
        yield from self._namespaces(stat.namespaces)

    def _tiers(self, tiers: Sequence[TierStat]) -> Iterator[Metric]:
        if not tiers:
            return
        names = ["tier"]
        blobs, size, up = (
            GaugeMetricFamily(f"{self._prefix}_tier_{name}", text, labels=names)
            for name, text in (
                ("blobs", "Blobs in a tier"),
                ("bytes", "Bytes in a tier"),
                ("up", "1: it answers"),
            )
        )
        events = CounterMetricFamily(
            f"{self._prefix}_tier_events",
            "Hits, misses, evictions, failures by reason",
            labels=["tier", "event"],
        )
        for tier in tiers:
            blobs.add_metric([tier.name], tier.blobs)
            size.add_metric([tier.name], tier.bytes)
            up.add_metric([tier.name], tier.healthy)
            for event, count in sorted(tier.counters.items()):
                events.add_metric([tier.name, event], count)
        yield from (blobs, size, up, events)

    def _namespaces(self, namespaces: Sequence[NamespaceStat]) -> Iterator[Metric]:
        if not namespaces:
            return
        names = ["namespace"]
        blobs, size, quota = (
            GaugeMetricFamily(f"{self._prefix}_namespace_{name}", text, labels=names)
            for name, text in (
                ("blobs", "Blobs of a namespace"),
                ("bytes", "Bytes of a namespace"),
                ("quota_bytes", "What it may hold, 0: no quota"),
            )
        )
        events = CounterMetricFamily(
            f"{self._prefix}_namespace_events",
            "Hits, puts, evictions, refusals",
            labels=["namespace", "event"],
        )
        for use in namespaces[:MAX_LABELLED]:
            label = [f"{use.tag:016x}"]
            blobs.add_metric(label, use.blobs)
            size.add_metric(label, use.bytes)
            quota.add_metric(label, use.quota_bytes)
            for event, count in sorted(use.counters.items()):
                events.add_metric([*label, event], count)
        yield from (blobs, size, quota, events)


def repository_registry(
    prefix: str, stat: Callable[[], RepositoryStat], failures: FailureCounts
) -> CollectorRegistry:
    """A registry of its own with one `RepositoryCollector`."""
    registry = CollectorRegistry()
    registry.register(RepositoryCollector(prefix, stat, failures))
    return registry
