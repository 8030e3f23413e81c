"""What one server at a time does for all: expiry, eviction by age and budget, mending.

Everything is judged from listings: names tell key, size and end of every blob. Nothing here
must happen once only: a second sweeper does the same work again, and no other harm.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from kvferry.cluster.bucket.changes import Changes
from kvferry.cluster.bucket.layout import (
    MARKED_KINDS,
    UnitKey,
    parse_blob_path,
    parse_marker_path,
    parse_staged_path,
)
from kvferry.cluster.bucket.memo import Memo
from kvferry.cluster.bucket.quotas import BucketQuotas
from kvferry.cluster.bucket.totals import Totals, count, write_totals
from kvferry.cluster.bucket.uses import stamp
from kvferry.errors import InvalidKeyError

log = logging.getLogger(__name__)

# Eviction goes on to this share of the budget, so that not every sweep has to evict.
_LOW_MARK = 0.95
# What is younger may still be in the hands of its writer.
_YOUNG_S = 60.0
_TOGETHER = 32
_EXAMINED = 200_000


@dataclass(slots=True)
class _Held:
    bytes: int = 0
    blobs: int = 0
    modified_s: float = 0.0
    ended: bool = False


class Sweeper:
    """Sweeps of one bucket."""

    def __init__(self, changes: Changes, quotas: BucketQuotas) -> None:
        self._changes, self._bucket, self._quotas = changes, changes.bucket, quotas
        # Incomplete pages that were looked at already, with as many blobs.
        self._examined: Memo[UnitKey, int] = Memo(_EXAMINED)

    async def run(self) -> Totals:
        """One sweep; what it leaves."""
        store = self._changes
        now = store.clock()
        for unit in await store.staging.replay(now - _YOUNG_S):
            await store.units.settle(unit)
        await self._drop_staged(now)
        leased = await store.pins.live(now)
        pinned = {UnitKey.of(key) for key in leased}
        held = await self._held(now)
        await self._expire([u for u, h in held.items() if h.ended and u not in pinned], now)
        markers = await self._markers()
        await self._mend(held, markers, now)
        uses, logs = await store.uses.merged()
        uses = {unit: at for unit, at in uses.items() if unit in held}
        used = {u: uses.get(u) or stamp(h.modified_s, 0) for u, h in held.items()}
        sizes = {u: h.bytes for u, h in held.items()}
        over_quota = await self._quotas.beyond(sizes, used.__getitem__, pinned)
        victims = self._victims(held, used, pinned, over_quota, now)
        await self._evict(victims)
        await store.uses.keep(uses, logs)
        totals = await count(self._bucket, len(leased), now)
        await write_totals(self._bucket, totals)
        store.counters["sweeps"] += 1
        return totals

    async def _held(self, now: float) -> dict[UnitKey, _Held]:
        units: dict[UnitKey, _Held] = {}
        async for batch in self._bucket.walk("blobs"):
            for entry in batch:
                try:
                    key, ends = parse_blob_path(entry.path)
                except InvalidKeyError:
                    continue
                held = units.setdefault(UnitKey.of(key), _Held())
                held.bytes += entry.size
                held.blobs += 1
                held.modified_s = max(held.modified_s, entry.modified_unix_s)
                held.ended = held.ended or 0 < ends <= now
        return units

    async def _markers(self) -> dict[UnitKey, str]:
        found: dict[UnitKey, str] = {}
        for kind in MARKED_KINDS:
            async for batch in self._bucket.walk(f"{kind}s"):
                for entry in batch:
                    try:
                        found[parse_marker_path(entry.path)[0]] = entry.path
                    except InvalidKeyError:
                        self._changes.counters["foreign"] += 1
        return found

    async def _drop_staged(self, now: float) -> None:
        over: list[str] = []
        async for batch in self._bucket.walk("staged"):
            for entry in batch:
                try:
                    deadline = parse_staged_path(entry.path)[2]
                except InvalidKeyError:
                    continue
                if deadline <= now:
                    over.append(entry.path)
        await self._changes.staging.drop(over)

    async def _expire(self, units: Iterable[UnitKey], now: float) -> None:
        async def expire(unit: UnitKey) -> None:
            gone = [part for part in await self._changes.units.load(unit) if not part.live(now)]
            await self._changes.remove(unit, gone)
            self._changes.counters["expired"] += len(gone)

        await _together(expire, units)

    async def _mend(
        self, held: Mapping[UnitKey, _Held], markers: Mapping[UnitKey, str], now: float
    ) -> None:
        """Markers without blobs go; pages that are whole without one get theirs."""
        stale = [unit for unit in markers if unit not in held]
        for unit in stale:
            # It may have come since the blobs were listed.
            if not await self._bucket.names(unit.blobs, 1):
                self._changes.units.forget(unit)
                await self._bucket.delete([markers[unit]])
                self._changes.counters["markers_removed"] += 1
        unmarked = [
            unit
            for unit, h in held.items()
            if unit.kind in MARKED_KINDS
            and unit not in markers
            and h.modified_s < now - _YOUNG_S
            and self._examined.get(unit) != h.blobs
        ]

        async def mend(unit: UnitKey) -> None:
            if await self._changes.units.settle(unit):
                self._changes.counters["markers_mended"] += 1
            else:
                self._examined.put(unit, held[unit].blobs)

        await _together(mend, unmarked)

    def _victims(
        self,
        held: Mapping[UnitKey, _Held],
        used: Mapping[UnitKey, int],
        pinned: set[UnitKey],
        over_quota: set[UnitKey],
        now: float,
    ) -> list[UnitKey]:
        """Those beyond their age or a quota, then the least recently used until the rest fits."""
        limits = self._changes.limits
        left = sum(h.bytes for h in held.values())
        over = left > limits.budget_bytes
        oldest = (now - limits.max_age_s) * 1e9 if limits.max_age_s else 0
        victims: list[UnitKey] = []
        for unit in sorted(held, key=lambda u: (u.kind == "calibration", used[u], u)):
            aged = used[unit] < oldest and unit.kind != "calibration"
            beyond = over and left > limits.budget_bytes * _LOW_MARK
            if unit not in pinned and (aged or beyond or unit in over_quota):
                victims.append(unit)
                left -= held[unit].bytes
        return victims

    async def _evict(self, victims: Iterable[UnitKey]) -> None:
        async def evict(unit: UnitKey) -> None:
            gone = await self._changes.units.load(unit)
            leased = pinned_now & {part.info.key for part in gone}
            if not leased:
                await self._changes.remove(unit, gone)
                self._changes.counters["evicted"] += len(gone)
                self._changes.counters["evicted_bytes"] += sum(p.info.size for p in gone)

        victims = list(victims)
        if not victims:
            return
        # Once more: a lease may have come while all this was read.
        pinned_now = await self._changes.pins.live(self._changes.clock())
        log.info("%s: %d pages are evicted", self._bucket.where, len(victims))
        await _together(evict, victims)


async def _together(call: Callable[[UnitKey], Awaitable[None]], units: Iterable[UnitKey]) -> None:
    waiting = list(units)
    for at in range(0, len(waiting), _TOGETHER):
        await asyncio.gather(*(call(unit) for unit in waiting[at : at + _TOGETHER]))
