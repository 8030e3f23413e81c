"""What the coordinator counts, for Prometheus."""

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from kvferry.proto.v1 import coordinator_pb2 as pb

MAX_OUTCOMES = 64
_OUTCOME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class CoordinatorMetrics:
    """Counters of one coordinator, in a registry of its own."""

    def __init__(self, member_counts: Callable[[], Mapping[str, int]]) -> None:
        """``member_counts`` gives the members in each state, at the time of asking."""
        self.registry = registry = CollectorRegistry()
        prefix = "kvferry_coordinator"
        self.policy_version = Gauge(
            f"{prefix}_policy_version", "Version of the policy in force", registry=registry
        )
        self.policy_file_ok = Gauge(
            f"{prefix}_policy_file_ok", "1: the policy file could be used", registry=registry
        )
        self.policy_file_ok.set(1)
        self.policy_file_errors = Counter(
            f"{prefix}_policy_file_errors", "Policy files refused", registry=registry
        )
        self.watchers = Gauge(f"{prefix}_policy_watchers", "Open watches", registry=registry)
        self.registrations = Counter(
            f"{prefix}_registrations", "Nodes that registered", registry=registry
        )
        self.heartbeats = Counter(f"{prefix}_heartbeats", "Heartbeats", registry=registry)
        self.refused = Counter(
            f"{prefix}_refused_calls", "Calls that failed, by reason", ["reason"], registry=registry
        )
        self._restores = Counter(
            "kvferry_restores", "Restores that nodes reported, by outcome", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter("kvferry_restored_tokens", "Tokens restored", registry=registry)
        self._bytes = Counter("kvferry_restored_bytes", "Bytes restored", registry=registry)
        self._seconds = Histogram(
            "kvferry_restore_seconds", "Time of a restore", buckets=_SECONDS, registry=registry
        )
        self._outcomes: set[str] = set()
        registry.register(_Members(member_counts))

    def restored(self, report: pb.RestoreReport) -> None:
        """Count one report; outcomes of odd names, or beyond `MAX_OUTCOMES`, are "other"."""
        outcome = report.outcome if _OUTCOME.fullmatch(report.outcome) else "other"
        if outcome not in self._outcomes and len(self._outcomes) >= MAX_OUTCOMES:
            outcome = "other"
        self._outcomes.add(outcome)
        self._restores.labels(outcome).inc()
        if outcome == "restored":
            self._tokens.inc(report.tokens)
            self._bytes.inc(report.bytes)
            self._seconds.observe(report.seconds)


class _Members:
    """Asked when scraped, as members go away by themselves."""

    def __init__(self, member_counts: Callable[[], Mapping[str, int]]) -> None:
        self._member_counts = member_counts

    def collect(self) -> Iterator[Metric]:
        """For `CollectorRegistry`."""
        family = GaugeMetricFamily(
            "kvferry_coordinator_members", "Nodes known, by state", labels=["state"]
        )
        for state, count in self._member_counts().items():
            family.add_metric([state], count)
        yield family
