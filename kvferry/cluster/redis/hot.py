"""Redis before a store: whole blobs in memory, the store's word on which there are.

The store behind is the authority. What lies in Redis is served only while the store says that
it holds the key, so that nothing deleted, expired or set aside comes back, also from a Redis
that was away when it happened; and only when digest and key are right. Redis may lose anything
at any time: then the store is read, and nothing is wrong, only slower.
"""

import asyncio
import builtins
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from kvferry.cluster.checked import checked_info
from kvferry.cluster.mend import scrub_and_mend
from kvferry.cluster.quotas import KeepsQuotas
from kvferry.cluster.redis.fills import Fills
from kvferry.cluster.redis.hot_put import HotPut
from kvferry.cluster.redis.link import RedisInfo, RedisLink
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
    TierStat,
)
from kvferry.cluster.served import ServedStore
from kvferry.errors import BlobNotFoundError, CodecError, ProtocolError, StoreError
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

SOURCE = "hot"


@dataclass(frozen=True, slots=True, kw_only=True)
class HotOptions:
    """What goes into Redis, and for how long.

    Attributes:
        max_value_bytes: larger blobs are left to the store.
        ttl_s: of a value; never beyond the blob's own end. 0: until Redis evicts it.
        on_read: what was read from the store is kept.
        on_put: what was put is kept.
    """

    max_value_bytes: int = 64 << 20
    ttl_s: int = 86_400
    on_read: bool = True
    on_put: bool = False


class HotStore:
    """A `ServedStore` that reads whole blobs from Redis where it can. One event loop."""

    def __init__(
        self,
        cold: ServedStore,
        link: RedisLink,
        options: HotOptions,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cold, self._link, self._options, self._clock = cold, link, options, clock
        self._counters: Counter[str] = Counter()
        self._fills = Fills(cold, link, self._counters)
        self._told = RedisInfo()

    async def aclose(self) -> None:
        """End what runs; close Redis and the store."""
        await self._fills.aclose()
        await self._link.aclose()
        await self._cold.aclose()

    async def run_maintenance(self, interval_s: float = 5.0) -> None:
        """The store's own, and news of Redis, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._cold.run_maintenance())
            tasks.create_task(self._look_after(interval_s))

    async def _look_after(self, interval_s: float) -> None:
        while True:
            with suppress(StoreError):
                self._told = await self._link.info()
                await self._fills.settle_debts()
            await asyncio.sleep(interval_s)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """Whole blobs from Redis first; parts, which nobody could verify, from the store.

        Raises: as the store does.
        """
        if offset or length:
            return await self._cold.open_get(key, offset, length, local_only)
        held, data = await asyncio.gather(self._cold.has([key]), self._look(key))
        if data is not None and held[0]:
            self._counters["hits"] += 1
            self._counters["hit_bytes"] += len(data)
            return GetSession(len(data), SOURCE, _once(data))
        if data is not None:
            self._counters["stale"] += 1
            self._fills.owe([key])
        session = await self._cold.open_get(key, local_only=local_only)
        if not self._options.on_read or session.size > self._options.max_value_bytes:
            return session
        return replace(session, chunks=self._kept(key, session))

    async def _look(self, key: BlobKey) -> bytes | None:
        """A value, if it is there, in time, and what it should be."""
        try:
            data = await self._link.get(key)
            if data is None:
                self._counters["misses"] += 1
                return None
            await asyncio.to_thread(checked_info, key, data)
        except CodecError as exc:
            self._counters[f"failed_{exc.reason}"] += 1
            log.warning("%s is damaged in %s (%s) and dropped there", key, self._link.url, exc)
            self._fills.owe([key])
            return None
        except StoreError:
            return None  # the link has counted it
        return data

    async def _kept(
        self, key: BlobKey, session: GetSession
    ) -> AsyncGenerator[bytes | memoryview, None]:
        """Pass a blob on, and keep it once it went through whole."""
        room = self._fills.reserve(session.size)
        parts: builtins.list[bytes | memoryview] = []
        try:
            async for chunk in session.chunks:
                if room:
                    parts.append(chunk)
                yield chunk
            if room:
                room = False
                self._fill(key, parts, session.size, session.expires_unix_s)
        finally:
            if room:
                self._fills.release(session.size)
            if isinstance(session.chunks, AsyncGenerator):
                await session.chunks.aclose()

    def _fill(
        self, key: BlobKey, parts: Sequence[bytes | memoryview], size: int, expires: int
    ) -> None:
        ttl_s = self._options.ttl_s
        if expires:
            left = expires - int(self._clock())
            ttl_s = min(ttl_s, left) if ttl_s else left
            if ttl_s <= 0:
                self._fills.release(size)
                return
        self._fills.add(key, parts, size, ttl_s)

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """To the store; a copy to Redis once it is there, if so configured."""
        session = await self._cold.open_put(spec)
        small = spec.size <= self._options.max_value_bytes
        if session is None or spec.stage or not (self._options.on_put and small):
            return session
        if not self._fills.reserve(spec.size):
            return session
        expires = int(self._clock()) + spec.ttl_s if spec.ttl_s else 0
        return HotPut(
            session,
            lambda parts: self._fill(spec.key, parts, spec.size, expires),
            lambda: self._fills.release(spec.size),
        )

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """From the store, then from Redis; where that is away, as soon as it is back."""
        deleted = await self._cold.delete(keys)
        self._fills.owe(keys)
        with suppress(StoreError):
            await self._fills.settle_debts()
        return deleted

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """The store's own; Redis gives whole copies of what was damaged."""
        async for report in scrub_and_mend(self._cold, repair, [_HotReplica(self._link)]):
            yield report

    async def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """Of the store. Raises: ProtocolError: it keeps none."""
        if not isinstance(self._cold, KeepsQuotas):
            raise ProtocolError("this store keeps no quotas")
        return await self._cold.set_quota(tag, name, quota_bytes)

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """What the store says."""
        return await self._cold.has(keys)

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """In the store."""
        return await self._cold.commit(keys)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """In the store."""
        return await self._cold.lookup(query)

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """In the store."""
        return await self._cold.pin(keys, ttl_s)

    async def unpin(self, lease_id: str) -> bool:
        """In the store."""
        return await self._cold.unpin(lease_id)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """Of the store."""
        async for batch in self._cold.list(query):
            yield batch

    async def stat(self) -> RepositoryStat:
        """Of the store, and the tier before it."""
        return self._with_tier(await self._cold.stat())

    def stat_now(self) -> RepositoryStat:
        """As `stat`, blocking, from any thread: for metrics."""
        return self._with_tier(self._cold.stat_now())

    def _with_tier(self, stat: RepositoryStat) -> RepositoryStat:
        told = self._told
        tier = TierStat(
            name="redis",
            blobs=told.keys,
            bytes=told.used_bytes,
            budget_bytes=told.max_bytes,
            healthy=self._link.healthy,
            counters={**self._link.counters, **self._counters, "evicted": told.evicted},
        )
        return replace(stat, tiers=[tier, *stat.tiers])


class _HotReplica:
    """Redis as the one who has a whole copy."""

    def __init__(self, link: RedisLink) -> None:
        self.name = link.url
        self._link = link

    async def fetch(self, key: BlobKey) -> bytes:
        """Raises: BlobNotFoundError, StoreUnavailableError."""
        data = await self._link.get(key)
        if data is None:
            raise BlobNotFoundError(str(key))
        return data


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
