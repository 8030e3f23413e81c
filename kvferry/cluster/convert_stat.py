"""What a store says of itself, as messages of store.proto and back."""

import time

from kvferry.cluster.repository import (
    LeaseStat,
    NamespaceStat,
    RepositoryStat,
    ScrubReport,
    TierStat,
)
from kvferry.proto.v1 import store_pb2


def stat_to_proto(stat: RepositoryStat, version: str) -> store_pb2.StatReply:
    """Counts and bytes."""
    return store_pb2.StatReply(
        blobs=stat.blobs,
        bytes=stat.bytes,
        budget_bytes=stat.budget_bytes,
        in_flight_bytes=stat.in_flight_bytes,
        pages_complete=stat.pages_complete,
        quarantined=stat.quarantined,
        free_disk_bytes=stat.free_disk_bytes,
        pinned=stat.pinned,
        backend=stat.backend,
        version=version,
        counters=dict(stat.counters),
        unix_s=time.time(),
        tiers=[
            store_pb2.StoreTier(
                name=tier.name,
                blobs=tier.blobs,
                bytes=tier.bytes,
                budget_bytes=tier.budget_bytes,
                healthy=tier.healthy,
                counters=dict(tier.counters),
            )
            for tier in stat.tiers
        ],
        namespaces=[
            store_pb2.NamespaceUse(
                tag=use.tag,
                name=use.name,
                blobs=use.blobs,
                bytes=use.bytes,
                quota_bytes=use.quota_bytes,
                counters=dict(use.counters),
            )
            for use in stat.namespaces
        ],
        leases=[
            store_pb2.Lease(
                lease_id=lease.lease_id,
                expires_unix_s=lease.expires_unix_s,
                blobs=lease.blobs,
                bytes=lease.bytes,
                model_id=lease.model_id,
                token_end=lease.token_end,
            )
            for lease in stat.leases
        ],
    )


def stat_from_proto(reply: store_pb2.StatReply) -> RepositoryStat:
    """Counts and bytes."""
    return RepositoryStat(
        blobs=reply.blobs,
        bytes=reply.bytes,
        budget_bytes=reply.budget_bytes,
        in_flight_bytes=reply.in_flight_bytes,
        pages_complete=reply.pages_complete,
        quarantined=reply.quarantined,
        free_disk_bytes=reply.free_disk_bytes,
        pinned=reply.pinned,
        backend=reply.backend,
        counters=dict(reply.counters),
        version=reply.version,
        unix_s=reply.unix_s,
        tiers=[
            TierStat(
                name=tier.name,
                blobs=tier.blobs,
                bytes=tier.bytes,
                budget_bytes=tier.budget_bytes,
                healthy=tier.healthy,
                counters=dict(tier.counters),
            )
            for tier in reply.tiers
        ],
        namespaces=[
            NamespaceStat(
                tag=use.tag,
                name=use.name,
                blobs=use.blobs,
                bytes=use.bytes,
                quota_bytes=use.quota_bytes,
                counters=dict(use.counters),
            )
            for use in reply.namespaces
        ],
        leases=[
            LeaseStat(
                lease_id=lease.lease_id,
                expires_unix_s=lease.expires_unix_s,
                blobs=lease.blobs,
                bytes=lease.bytes,
                model_id=lease.model_id,
                token_end=lease.token_end,
            )
            for lease in reply.leases
        ],
    )


def report_to_proto(report: ScrubReport) -> store_pb2.ScrubProgress:
    """One message of a scrub."""
    progress = store_pb2.ScrubProgress(
        checked=report.checked, total=report.total, bytes=report.bytes
    )
    for key, reason in report.findings:
        progress.findings.add(
            key=key,
            reason=reason,
            expires_unix_s=report.expires.get(key, 0),
            mended_from=report.mended.get(key, ""),
        )
    return progress


def report_from_proto(progress: store_pb2.ScrubProgress) -> ScrubReport:
    """One message of a scrub."""
    found = progress.findings
    return ScrubReport(
        checked=progress.checked,
        total=progress.total,
        findings=[(finding.key, finding.reason) for finding in found],
        bytes=progress.bytes,
        expires={f.key: f.expires_unix_s for f in found if f.expires_unix_s},
        mended={f.key: f.mended_from for f in found if f.mended_from},
    )
