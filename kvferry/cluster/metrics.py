"""A repository's counts for Prometheus, asked for when they are scraped."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvferry.cluster.repository import RepositoryStat
from kvferry.errors import FerryError


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


def repository_registry(
    prefix: str, stat: Callable[[], RepositoryStat], failures: FailureCounts
) -> CollectorRegistry:
    """A registry of its own with one `RepositoryCollector`."""
    registry = CollectorRegistry()
    registry.register(RepositoryCollector(prefix, stat, failures))
    return registry
