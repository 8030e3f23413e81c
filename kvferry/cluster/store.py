"""A store on this machine: the shared store's engine room, and a node's disk tier."""

import asyncio
import builtins
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from kvferry.cluster.backends import BlobBackend
from kvferry.cluster.index_rows import Held
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
from kvferry.cluster.space import StoreLimits
from kvferry.cluster.store_core import StoreCore
from kvferry.cluster.store_get import GetWork, read_pieces
from kvferry.cluster.store_put import LocalPut
from kvferry.cluster.store_scrub import batches, begin_scrub, scrub_some, unchecked
from kvferry.cluster.store_stat import describe
from kvferry.errors import FerryError, ProtocolError
from kvferry.proto.keys import BlobKey

__all__ = ["LocalStore", "StoreLimits"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class LocalStore:
    """A `BlobRepository` over one engine. SQLite and files are used in threads only."""

    def __init__(self, core: StoreCore, source: str) -> None:
        """Use `open`."""
        self._core, self._source = core, source
        # Answers do not queue behind fsyncs.
        self._writes = ThreadPoolExecutor(6, thread_name_prefix="store-write")
        self._reads = ThreadPoolExecutor(6, thread_name_prefix="store-read")

    @classmethod
    async def open(
        cls,
        backend: BlobBackend,
        limits: StoreLimits,
        *,
        source: str = "store",
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open a store, making its index anew if need be.

        Args:
            source: what `GetSession.source` says of blobs from here.
            clock: unix time in seconds.
        Raises:
            ConfigError: the root is in use by another process, or cannot be written to.
        """
        store = cls(StoreCore(backend, limits, clock=clock), source)
        try:
            await store._write(store._core.open)
        except BaseException:
            store._shut_pools()
            raise
        return store

    async def aclose(self) -> None:
        """End what runs, write noted uses, let go of the root. May be called twice."""
        await asyncio.to_thread(self._shut_pools)
        await asyncio.to_thread(self._core.close)

    def _shut_pools(self) -> None:
        self._writes.shutdown()
        self._reads.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _write(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writes, call, *args)

    async def _read(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reads, call, *args)

    async def run_maintenance(self, interval_s: float = 5.0) -> None:
        """Expiry and housekeeping, until cancelled. Nothing is wrong without it, only late."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._write(self._core.room.maintain)
            except FerryError as exc:
                self._core.counters[f"maintenance_{exc.reason}"] += 1
                log.warning("housekeeping of %s: %s", self._core.backend.url, exc)

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are committed, in the order asked."""
        return await self._read(self._core.has, keys)

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """None: the key is there already. Raises: StoreFullError, BlobTooLargeError."""
        if not await self._read(self._core.wanted, spec):
            self._core.counters["puts_present"] += 1
            return None
        return LocalPut(self._core, spec, self._writes)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """``length`` 0: to the end. A read of the whole blob is verified on the way.

        Raises: BlobNotFoundError, CorruptBlobError, ProtocolError (offset beyond the end).
        """
        reader, held = await self._read(self._core.reader, key)
        size = held.info.size
        if offset > size:
            reader.close()
            raise ProtocolError(f"offset {offset:,} is beyond the blob's {size:,} bytes")
        want = min(length, size - offset) if length else size - offset
        self._core.counters["gets"] += 1
        self._core.counters["get_bytes"] += want
        work = GetWork(self._core, key, reader, offset, want)
        pieces = read_pieces(work, self._reads)
        return GetSession(size, self._source, pieces, held.expires_s)

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Make staged blobs visible, all or none. Raises: BlobNotFoundError."""
        return await self._write(self._core.commit, keys)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of pages whose committed blobs cover all layers and heads."""
        return await self._read(self._core.lookup, query)

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """A lease against eviction: (lease id, how many of the keys are held)."""
        return await self._read(self._core.pin, keys, ttl_s)

    async def unpin(self, lease_id: str) -> bool:
        """End a lease. False: it was over already."""
        return await self._read(self._core.unpin, lease_id)

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there."""
        return await self._write(self._core.delete, keys)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """Batches of what is held, oldest use first."""
        left = query.limit or None
        async for held in self._held(query):
            infos = [h.info for h in held[:left]]
            yield infos
            if left is not None:
                left -= len(infos)
                if left <= 0:
                    return

    async def _held(self, query: ListQuery) -> AsyncIterator[Sequence[Held]]:
        after = (-1, 0, 0)
        while True:
            held, after = await self._read(self._core.listing, query, after)
            if not held:
                return
            yield held

    async def stat(self) -> RepositoryStat:
        """Counts and bytes."""
        return await self._read(describe, self._core)

    def stat_now(self) -> RepositoryStat:
        """As `stat`, blocking, from any thread: for metrics."""
        return describe(self._core)

    async def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """How much a namespace may hold from now on, 0: as much as there is room.

        Returns: how many of its blobs went for it. Raises: StoreUnavailableError.
        """
        return await self._write(self._core.set_quota, tag, name, quota_bytes)

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Read and verify everything; with ``repair`` damaged blobs are set aside.

        What was read longest ago comes first, so that one broken off is gone on with.
        """
        total = (await self.stat()).blobs
        checked = 0
        number = await self._read(begin_scrub, self._core)
        while held := await self._read(unchecked, self._core, number):
            for batch in batches(held):
                findings = await self._read(scrub_some, self._core, batch, repair, number)
                checked += len(batch)
                ends = {str(h.info.key): h.expires_s for h in batch if h.expires_s}
                yield ScrubReport(
                    checked,
                    max(total, checked),
                    findings,
                    bytes=sum(h.info.size for h in batch),
                    expires={key: ends[key] for key, _ in findings if key in ends},
                )
        if not checked:
            yield ScrubReport(0, 0)
