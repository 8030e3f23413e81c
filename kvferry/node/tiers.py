"""Memory, then disk: what this machine holds of the cluster's blobs, verified and whole."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from kvferry.cluster.checked import checked_info as checked_info
from kvferry.cluster.repository import (
    BlobInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSession,
    PutSpec,
)
from kvferry.cluster.store import LocalStore
from kvferry.errors import (
    BlobNotFoundError,
    CorruptBlobError,
    FerryError,
)
from kvferry.node.disk_put import DiskPut
from kvferry.node.disk_writes import DiskWrites
from kvferry.node.memory_tier import MemoryBlob, MemoryTier, Reservation
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

Data = bytes | memoryview


class Tiers:
    """This node's own blobs. Belongs to the event loop.

    Args:
        disk: None: memory only.
        writes: what may be written to ``disk`` in a day; None: whatever comes.
        on_new: called with the key of every blob that is here from now on.
    """

    def __init__(
        self,
        memory: MemoryTier,
        disk: LocalStore | None,
        counters: Counter[str],
        writes: DiskWrites | None = None,
    ) -> None:
        self.memory, self.disk, self._counters = memory, disk, counters
        self.writes = writes
        self.on_new: Callable[[BlobKey], None] = lambda key: None

    async def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are here."""
        on_disk = await self.disk.has(keys) if self.disk is not None else [False] * len(keys)
        return [key in self.memory or held for key, held in zip(keys, on_disk, strict=True)]

    async def read(self, key: BlobKey) -> tuple[Data, str]:
        """(bytes, "memory" or "disk"). Raises: BlobNotFoundError, CorruptBlobError."""
        held = self.memory.get(key)
        if held is not None:
            self._counters["hits_memory"] += 1
            return held.data, "memory"
        if self.disk is None:
            raise BlobNotFoundError(str(key))
        try:
            session = await self.disk.open_get(key)
            parts = [bytes(chunk) async for chunk in session.chunks]
        except CorruptBlobError:
            self._counters["corrupt_disk"] += 1
            raise
        data = b"".join(parts)
        self._counters["hits_disk"] += 1
        await self.remember(key, data)
        return data, "disk"

    async def remember(self, key: BlobKey, data: Data, ttl_s: int = 0) -> BlobInfo | None:
        """Keep verified bytes in memory, if there is room; None: there is not."""
        room = self.memory.reserve(len(data))
        if room is None:
            return None
        return await self.keep(room, key, data, ttl_s)

    async def keep(
        self, room: Reservation, key: BlobKey, data: Data, ttl_s: int = 0, pinned: bool = False
    ) -> BlobInfo:
        """Turn reserved room into a held blob. Raises: as `checked_info`."""
        try:
            info = await asyncio.to_thread(checked_info, key, data)
            expires = time.time() + ttl_s if ttl_s else 0.0
            room.commit(MemoryBlob(info, data, expires), pinned)
        finally:
            room.release()
        self.on_new(key)
        return info

    async def open_disk_put(self, spec: PutSpec) -> PutSession | None:
        """None: no disk, it is there already, or no more is to be written today.

        Raises: StoreFullError, BlobTooLargeError.
        """
        if self.disk is None:
            return None
        session = await self.disk.open_put(spec)
        if session is None or self.writes is None:
            return session
        if not self.writes.reserve(spec.size):
            self._counters["disk_refused_write_budget"] += 1
            await session.abort()
            return None
        if self.writes.due:
            await asyncio.to_thread(self.writes.save)
        return DiskPut(session, self.writes, spec.size)

    async def on_disk(self, key: BlobKey) -> bool:
        """Whether it is in the disk tier."""
        return self.disk is not None and (await self.disk.has([key]))[0]

    async def store_on_disk(self, key: BlobKey, data: Data, ttl_s: int = 0) -> None:
        """Keep a copy for after a restart; a disk that is full or failing is counted only."""
        try:
            spec = PutSpec(key=key, size=len(data), ttl_s=ttl_s)
            session = await self.open_disk_put(spec)
            if session is None:
                return
            try:
                await session.write(data)
                await session.finish()
                self.on_new(key)
            except BaseException:
                await session.abort()
                raise
        except FerryError as exc:
            self._counters[f"disk_refused_{exc.reason}"] += 1
            log.info("%s is not kept on disk: %s", key, exc)

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were here."""
        here = await self.has(keys)
        for key in keys:
            self.memory.remove(key)
        if self.disk is not None:
            await self.disk.delete(keys)
        return sum(here)

    async def count(self) -> int:
        """About how many are here."""
        return len(self.memory) + ((await self.disk.stat()).blobs if self.disk is not None else 0)

    async def keys(self) -> AsyncIterator[Sequence[BlobKey]]:
        """Batches of what is here; what is in both tiers comes twice."""
        yield [info.key for info in self.memory.infos()]
        if self.disk is not None:
            async for batch in self.disk.list(ListQuery()):
                yield [info.key for info in batch]

    async def of_page(self, page_key: bytes) -> list[BlobInfo]:
        """Blobs under one page key, in either tier."""
        found = {info.key: info for info in self.memory.of_page(page_key)}
        if self.disk is not None:
            async for batch in self.disk.list(ListQuery(page_key=page_key)):
                found.update({info.key: info for info in batch})
        return list(found.values())

    async def complete_run(self, query: LookupQuery) -> LookupResult:
        """The longest run of pages held on disk with all layers and heads of the model."""
        if self.disk is None:
            return LookupResult(pages=[])
        return await self.disk.lookup(query)

    async def list(self, query: ListQuery) -> list[BlobInfo]:
        """What is held and fits ``query``."""
        found = {
            info.key: info
            for info in self.memory.infos()
            if (not query.page_key or info.key.page_key == query.page_key)
            and (not query.model_id or info.model_id == query.model_id)
            and (not query.kind or info.key.kind == query.kind)
        }
        if self.disk is not None:
            async for batch in self.disk.list(query):
                found.update({info.key: info for info in batch})
        infos = list(found.values())
        return infos[: query.limit] if query.limit else infos
