"""What a node daemon shows to Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge

from kvferry.cluster.metrics import FailureCounts, RepositoryCollector
from kvferry.node.disk_writes import add_write_metrics

if TYPE_CHECKING:
    from kvferry.node.daemon import NodeDaemon


def add_metrics(node: "NodeDaemon", failures: FailureCounts, registry: CollectorRegistry) -> None:
    """Everything about ``node``, asked when scraped."""
    registry.register(RepositoryCollector("kvferry_node", node.repository.stat_now, failures))
    for name, text, value in (
        ("uploads_pending", "Blobs that wait for their upload", lambda: node.uploads.count),
        ("uploads_pending_bytes", "Their bytes", lambda: node.uploads.held_bytes),
        ("memory_bytes", "Bytes held in the memory tier", lambda: node.tiers.memory.held_bytes),
        ("peers", "Peers known", lambda: len(node.peers.all)),
        ("policy_version", "Policy in force", lambda: node.facts.policy.version),
        ("hooks", "Hooks that watch for events", lambda: node.hub.watchers),
        ("draining", "1: it takes no new blobs", lambda: node.departure.draining),
    ):
        Gauge(f"kvferry_node_{name}", text, registry=registry).set_function(value)
    if node.tiers.writes is not None:
        add_write_metrics(node.tiers.writes, registry)
