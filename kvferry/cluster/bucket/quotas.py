"""How much each namespace may hold of a bucket: one object says so, sweeps see to it.

Names of blobs do not tell whose they are, so that a sweep under quotas reads the header of one
blob of every page, once; without quotas it reads none.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvferry.cluster.bucket.layout import QUOTAS, UnitKey
from kvferry.cluster.bucket.memo import Memo
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.units import Units
from kvferry.cluster.quotas import Quota, dump_quotas, parse_quotas, with_quota
from kvferry.cluster.repository import NamespaceStat
from kvferry.errors import StoreUnavailableError

_KNOWN = 200_000
_TOGETHER = 32


class BucketQuotas:
    """Of one bucket. ``told`` is what the last sweep of this server counted."""

    def __init__(self, bucket: Bucket, units: Units) -> None:
        self._bucket, self._units = bucket, units
        self._tags: Memo[UnitKey, int] = Memo(_KNOWN)
        self.told: Sequence[NamespaceStat] = ()

    async def load(self) -> Mapping[int, Quota]:
        """Those in force. Raises: StoreUnavailableError: the object is damaged."""
        data = await self._bucket.get(QUOTAS)
        try:
            quotas = parse_quotas(data) if data else {}
        except ValueError as exc:
            problem = f"the object {QUOTAS} is damaged ({exc}): delete it and set quotas again"
            raise StoreUnavailableError(self._bucket.where, problem) from exc
        if not quotas:
            self.told = ()
        return quotas

    async def decide(self, tag: int, name: str, quota_bytes: int) -> None:
        """For all servers, from their next sweep on. Raises: QueueFullError: too many."""
        quotas = with_quota(await self.load(), tag, name, quota_bytes)
        await self._bucket.put(QUOTAS, dump_quotas(quotas))

    async def beyond(
        self,
        sizes: Mapping[UnitKey, int],
        order: Callable[[UnitKey], int],
        pinned: set[UnitKey],
    ) -> set[UnitKey]:
        """Units that must go: of each namespace over its quota those that ``order`` puts first.

        Args:
            sizes: bytes of each unit.
        """
        quotas = await self.load()
        if not quotas:
            return set()
        owned = await self._owned(sizes)
        held = Counter[int]()
        for unit, tag in owned.items():
            held[tag] += sizes[unit]
        going: set[UnitKey] = set()
        left = Counter(held)
        for unit in sorted(owned, key=lambda u: (order(u), u)):
            quota = quotas.get(owned[unit])
            if quota is not None and left[owned[unit]] > quota.bytes and unit not in pinned:
                going.add(unit)
                left[owned[unit]] -= sizes[unit]
        blobs = Counter(owned.values())
        none = Quota("", 0)
        self.told = [
            NamespaceStat(
                tag=tag,
                name=quotas.get(tag, none).name,
                blobs=blobs[tag],
                bytes=left[tag],
                quota_bytes=quotas.get(tag, none).bytes,
                counters={"evicted_bytes": held[tag] - left[tag]},
            )
            for tag in {*held, *quotas}
        ]
        return going

    async def _owned(self, units: Iterable[UnitKey]) -> dict[UnitKey, int]:
        wanted = [unit for unit in units if self._tags.get(unit) is None]
        for at in range(0, len(wanted), _TOGETHER):
            await asyncio.gather(*(self._read(unit) for unit in wanted[at : at + _TOGETHER]))
        return {unit: tag for unit in units if (tag := self._tags.get(unit)) is not None}

    async def _read(self, unit: UnitKey) -> None:
        parts = await self._units.load(unit)
        if parts:
            self._tags.put(unit, max(part.info.namespace_tag for part in parts))
