"""A `BlobRepository` over one bucket, of which any number of servers may run at once."""

import asyncio
import builtins
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Self

from kvferry.cluster.bucket import census
from kvferry.cluster.bucket.changes import Changes
from kvferry.cluster.bucket.claim import BucketClaim, Turn
from kvferry.cluster.bucket.get import checked, damage
from kvferry.cluster.bucket.layout import UnitKey
from kvferry.cluster.bucket.limits import BucketLimits
from kvferry.cluster.bucket.lookup import Lookups
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.put import BucketPut
from kvferry.cluster.bucket.quotas import BucketQuotas
from kvferry.cluster.bucket.sweep import Sweeper
from kvferry.cluster.bucket.units import Units
from kvferry.cluster.repository import (
    BlobInfo,
    GetSession,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSession,
    PutSpec,
    RepositoryStat,
    ScrubReport,
)
from kvferry.errors import (
    BlobNotFoundError,
    BlobTooLargeError,
    ConfigError,
    FerryError,
    StoreFullError,
    StoreUnavailableError,
)
from kvferry.proto import container
from kvferry.proto.keys import BlobKey

__all__ = ["BucketLimits", "BucketStore"]

log = logging.getLogger(__name__)


class BucketStore:
    """Stateless: all that it keeps in memory it can ask for again. For one event loop.

    Two contents for one key: whoever is second sees the first and is told so. Two servers
    that take the same key at the same moment both verify what they have, and the bucket
    keeps one of them: the first where it knows conditional writes, else the last. Either is
    a whole blob of that key, one read sees one of them, and reads of parts of both do not
    pass the reader's digest.
    """

    def __init__(
        self,
        bucket: Bucket,
        limits: BucketLimits,
        *,
        source: str = "store",
        clock: Callable[[], float] = time.time,
        turn: Turn | None = None,
    ) -> None:
        """Use `open`."""
        self.bucket, self.limits, self.clock = bucket, limits, clock
        self.counters: Counter[str] = bucket.counters
        self._source = source
        caps = container.Limits(max_blob=limits.max_blob_bytes)
        self.units = Units(bucket, caps, clock, limits.fresh_s)
        self.changes = Changes(bucket, limits, clock, self.units)
        self._lookups = Lookups(bucket, self.units)
        self._turn = turn or BucketClaim(bucket, clock, ttl_s=2 * limits.sweep_s)
        self._quotas = BucketQuotas(bucket, self.units)
        self._sweeper = Sweeper(self.changes, self._quotas)

    @classmethod
    async def open(
        cls,
        bucket: Bucket,
        limits: BucketLimits,
        *,
        source: str = "store",
        clock: Callable[[], float] = time.time,
        turn: Turn | None = None,
    ) -> Self:
        """Look whether the bucket can be read and written to.

        Args:
            source: what `GetSession.source` says of blobs from here.
            clock: unix time in seconds.
            turn: who sweeps; by default a claim in the bucket.
        Raises: ConfigError: it cannot, by the keys or the name that were given.
        """
        store = cls(bucket, limits, source=source, clock=clock, turn=turn)
        try:
            await bucket.put("sweep/hello", b"kvferry")
            await store.changes.room.load()
        except StoreUnavailableError as exc:
            allowed = f"a bucket that answers ({exc.problem})"
            raise ConfigError("backend", bucket.where, allowed) from exc
        return store

    async def aclose(self) -> None:
        """Write noted uses, let another server sweep. May be called twice."""
        try:
            await self.changes.uses.flush(self.clock())
            await self._turn.give_up()
        except FerryError as exc:
            log.warning("%s at the end: %s", self.bucket.where, exc)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def run_maintenance(self, interval_s: float = 0.0) -> None:
        """Sweeps in turn with other servers, until cancelled. ``interval_s`` 0: as set."""
        while True:
            await self.changes.room.wait_for_sweep(interval_s or self.limits.sweep_s)
            try:
                await self.sweep()
            except FerryError as exc:
                self.counters[f"maintenance_{exc.reason}"] += 1
                log.warning("housekeeping of %s: %s", self.bucket.where, exc)

    async def sweep(self) -> bool:
        """Expiry, eviction and mending, if it is this server's turn. False: it is not."""
        await self.changes.uses.flush(self.clock())
        if not await self._turn.mine():
            await self.changes.room.load()
            return False
        self.changes.room.counted(await self._sweeper.run())
        return True

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are committed, in the order asked; one listing a page."""
        now = self.clock()
        units = {UnitKey.of(key) for key in keys}
        listings = await asyncio.gather(*(self.bucket.names(unit.blobs) for unit in units))
        live = {
            key
            for listing in listings
            for key, ends in census.keys_in(listing)
            if not 0 < ends <= now
        }
        return [key in live for key in keys]

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """None: the key is there already. Raises: StoreFullError, BlobTooLargeError."""
        if spec.size > self.limits.max_blob_bytes:
            raise BlobTooLargeError("size", spec.size, self.limits.max_blob_bytes)
        if spec.size > self.limits.budget_bytes:
            raise StoreFullError(self.bucket.where, spec.size, self.limits.budget_bytes)
        if await self.changes.present(spec):
            self.counters["puts_present"] += 1
            return None
        return BucketPut(self.changes, spec)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """``length`` 0: to the end. A read of the whole blob is verified on the way.

        Raises: BlobNotFoundError, CorruptBlobError, ProtocolError (offset beyond the end).
        """
        reading, found = await self.changes.finder.read(key, offset, length)
        self.counters["gets"] += 1

        async def damaged() -> None:
            # Once more: it may have been damaged on its way only.
            self.counters["get_damaged"] += 1
            if reason := await damage(self.bucket, found.path):
                await self.changes.set_aside(key, found.path, reason)

        whole = not offset and not length
        chunks = checked(reading, damaged) if whole else reading.chunks
        return GetSession(reading.size, self._source, self._counted(chunks), found.ends)

    async def _counted(self, chunks: AsyncIterator[memoryview]) -> AsyncIterator[memoryview]:
        async for chunk in chunks:
            self.counters["get_bytes"] += len(chunk)
            yield chunk

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Make staged blobs visible, all or none; those that are already count too.

        Raises: BlobNotFoundError, IdentityMismatchError.
        """
        there = dict(zip(keys, await self.has(keys), strict=True))
        wanted = [key for key, held in there.items() if not held]
        units = {UnitKey.of(key) for key in wanted}
        found = await asyncio.gather(*(self.changes.staging.waiting(unit) for unit in units))
        waiting = {key: staged for part in found for key, staged in part.items()}
        for key in wanted:
            if key not in waiting:
                raise BlobNotFoundError(str(key))
        if wanted:
            await self.changes.commit([waiting[key] for key in wanted])
        return len(keys)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of pages whose committed blobs cover all layers and heads."""
        now = self.clock()
        result, used = await self._lookups.find(query, now)
        self.counters["lookups"] += 1
        self.counters["lookup_pages"] += len(query.page_keys)
        self.counters["lookup_pages_found"] += result.complete_pages
        self.changes.uses.note(used, now)
        return result

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """A lease against eviction: (lease id, how many of the keys are held)."""
        there = [key for key, held in zip(keys, await self.has(keys), strict=True) if held]
        lease = await self.changes.pins.add(there, int(self.clock()) + ttl_s)
        return lease, len(set(there))

    async def unpin(self, lease_id: str) -> bool:
        """End a lease. False: it was over already."""
        return await self.changes.pins.end(lease_id, self.clock())

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there, staged ones included."""
        units: dict[UnitKey, set[BlobKey]] = {}
        for key in keys:
            units.setdefault(UnitKey.of(key), set()).add(key)
        deleted = [await self.changes.delete(unit, wanted) for unit, wanted in units.items()]
        return sum(deleted)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """Batches of what is held, oldest use first."""
        left = query.limit or None
        async for parts in census.listing(self.changes, query):
            infos = [part.info for part in parts[:left]]
            yield infos
            if left is not None:
                left -= len(infos)
                if left <= 0:
                    return

    async def stat(self) -> RepositoryStat:
        """Counts and bytes: of the last sweep and what this server did since, or counted
        now where they are few."""
        await self.changes.room.refresh()
        return self.stat_now()

    def stat_now(self) -> RepositoryStat:
        """As last counted, from any thread: for metrics."""
        stat = self.changes.room.stat(dict(self.counters))
        return replace(stat, namespaces=self._quotas.told)

    async def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """How much a namespace may hold, 0: as much as there is room; sweeps see to it.

        Returns: 0: none of its blobs goes before the next sweep.
        """
        await self._quotas.decide(tag, name, quota_bytes)
        return 0

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Read and verify everything; with ``repair`` damaged blobs are set aside."""
        async for report in census.scrub(self.changes, repair):
            yield report
