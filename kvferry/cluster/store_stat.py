"""What a store on this machine says of itself: sums, tiers, namespaces, leases."""

from functools import partial

from kvferry.cluster.index_sums import leases, namespaces
from kvferry.cluster.quotas import described
from kvferry.cluster.repository import RepositoryStat, TierStat
from kvferry.cluster.store_core import StoreCore

# What the counters of a store say of its medium.
TIER_COUNTERS = {
    "gets": "hits",
    "get_bytes": "hit_bytes",
    "misses": "misses",
    "lost": "failed_lost",
    "quarantined": "failed_corrupt",
    "evicted": "evicted",
    "evicted_bytes": "evicted_bytes",
    "expired": "expired",
}


def describe(core: StoreCore) -> RepositoryStat:
    """Counts and bytes. Blocks."""
    now = core.clock()
    totals = core.index.ask(lambda index: index.totals())
    pages, pinned = core.index.ask(lambda index: index.counts(now))
    held = core.index.ask(lambda index: index.sums(namespaces))
    lent = core.index.ask(lambda index: index.sums(partial(leases, now_s=now)))
    room = core.room
    counters = dict(core.counters)
    with room.lock:
        return RepositoryStat(
            blobs=totals.blobs,
            bytes=room.space.used - room.space.in_flight,
            budget_bytes=core.limits.budget_bytes,
            in_flight_bytes=room.space.in_flight,
            pages_complete=pages,
            quarantined=room.quarantined,
            free_disk_bytes=core.backend.free_bytes() or 0,
            pinned=pinned,
            backend=core.backend.url,
            counters=counters,
            tiers=[
                TierStat(
                    name=core.backend.url.partition(":")[0],
                    blobs=totals.blobs,
                    bytes=totals.size,
                    budget_bytes=core.limits.budget_bytes,
                    counters={
                        TIER_COUNTERS[name]: count
                        for name, count in counters.items()
                        if name in TIER_COUNTERS
                    },
                )
            ],
            namespaces=described(held, room.quotas.all(), room.events),
            leases=lent,
        )
