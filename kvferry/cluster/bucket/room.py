"""How much a bucket holds, as one server knows it, and how much it may take in at once."""

import asyncio
from collections.abc import Callable, Mapping

from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.pins import Pins
from kvferry.cluster.bucket.totals import SMALL, Totals, count, read_totals
from kvferry.cluster.repository import BlobInfo, RepositoryStat
from kvferry.errors import StoreFullError

# Beyond the budget by this share, puts are refused until a sweep has made room.
_SLACK = 1 / 16


class Room:
    """Sums since the last count. For one event loop; `stat` from any thread."""

    def __init__(
        self,
        bucket: Bucket,
        pins: Pins,
        budget_bytes: int,
        in_flight_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._bucket, self._pins, self._clock = bucket, pins, clock
        self._budget, self._memory = budget_bytes, in_flight_bytes
        self._totals = Totals()
        self._in_flight = 0
        self._freed = asyncio.Condition()
        self._short = asyncio.Event()

    async def load(self) -> None:
        """Take over what another server counted, if that is newer."""
        found = await read_totals(self._bucket)
        if found.unix_s > self._totals.unix_s:
            self._totals = found

    def counted(self, totals: Totals) -> None:
        """After a count of one's own."""
        self._totals = totals

    async def refresh(self) -> None:
        """Count a bucket of few blobs; one of many was counted by the last sweep."""
        if self._totals.blobs < SMALL:
            now = self._clock()
            pinned = len(await self._pins.live(now))
            self._totals = await count(self._bucket, pinned, now)

    def added(self, info: BlobInfo) -> None:
        """A blob became visible."""
        self._totals.blobs += 1
        self._totals.bytes += info.size

    def removed(self, info: BlobInfo) -> None:
        """A blob was deleted."""
        self._totals.blobs = max(0, self._totals.blobs - 1)
        self._totals.bytes = max(0, self._totals.bytes - info.size)

    async def reserve(self, size: int) -> None:
        """Wait until there is memory for a put. Raises: StoreFullError."""
        held = self._totals.bytes + self._in_flight
        if held + size > self._budget:
            self._short.set()
        if held > self._budget * (1 + _SLACK):
            raise StoreFullError(self._bucket.where, size, 0)
        async with self._freed:
            await self._freed.wait_for(
                lambda: not self._in_flight or self._in_flight + size <= self._memory
            )
            self._in_flight += size

    async def release(self, size: int) -> None:
        """End of a reservation."""
        if size:
            async with self._freed:
                self._in_flight -= size
                self._freed.notify_all()

    async def wait_for_sweep(self, interval_s: float) -> None:
        """Until it is time, or the budget is exceeded."""
        try:
            async with asyncio.timeout(interval_s):
                await self._short.wait()
        except TimeoutError:
            pass
        self._short.clear()

    def stat(self, counters: Mapping[str, int]) -> RepositoryStat:
        """As last counted."""
        totals = self._totals
        return RepositoryStat(
            blobs=totals.blobs,
            bytes=totals.bytes,
            budget_bytes=self._budget,
            in_flight_bytes=self._in_flight,
            pages_complete=totals.complete_pages,
            quarantined=totals.quarantined,
            pinned=totals.pinned,
            backend=self._bucket.where,
            counters=dict(counters),
        )
