"""What is on its way into Redis, and what must go from there. Bounded; in the background."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from kvferry.cluster.redis.link import PIPELINE, RedisLink
from kvferry.cluster.repository import BlobRepository
from kvferry.errors import StoreError
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

WAITING_BYTES = 256 << 20
WAITING_BLOBS = 256
WORKERS = 2
# Deletions that Redis has not heard of yet. Beyond so many their values are left to their time
# to live: they are never served, as the store says that they are gone.
MOST_DEBTS = 100_000


class Fills:
    """Belongs to one event loop."""

    def __init__(self, cold: BlobRepository, link: RedisLink, counters: Counter[str]) -> None:
        self._cold, self._link, self._counters = cold, link, counters
        self._waiting: asyncio.Queue[tuple[BlobKey, Sequence[bytes | memoryview], int, int]]
        self._waiting = asyncio.Queue(WAITING_BLOBS)
        self._bytes = 0
        self._debts: dict[BlobKey, None] = {}
        self._workers: list[asyncio.Task[None]] = []

    def reserve(self, size: int) -> bool:
        """Take room for a blob's bytes. False: there is none, or Redis is away."""
        if not self._link.healthy or self._bytes + size > WAITING_BYTES:
            self._counters["fills_skipped"] += 1
            return False
        self._bytes += size
        return True

    def release(self, size: int) -> None:
        """Give room back."""
        self._bytes -= size

    def add(self, key: BlobKey, parts: Sequence[bytes | memoryview], size: int, ttl_s: int) -> None:
        """Have a whole, verified blob written. Its room was reserved, and is given back."""
        if not self._workers:
            self._workers = [asyncio.create_task(self._work()) for _ in range(WORKERS)]
        try:
            self._waiting.put_nowait((key, parts, size, ttl_s))
        except asyncio.QueueFull:
            self._counters["fills_skipped"] += 1
            self.release(size)

    async def _work(self) -> None:
        while True:
            key, parts, size, ttl_s = await self._waiting.get()
            try:
                await self._write(key, parts, ttl_s)
            except StoreError:
                self._counters["fills_failed"] += 1  # why is among the link's counters
            except Exception:
                self._counters["fills_failed"] += 1
                log.exception("%s is not kept in %s", key, self._link.url)
            finally:
                self.release(size)
                self._waiting.task_done()

    async def _write(self, key: BlobKey, parts: Sequence[bytes | memoryview], ttl_s: int) -> None:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        await self._link.put(key, data, ttl_s)
        self._counters["fills"] += 1
        # A deletion that came meanwhile has gone by before there was anything to delete.
        if not (await self._cold.has([key]))[0]:
            self.owe([key])
            await self.settle_debts()

    def owe(self, keys: Sequence[BlobKey]) -> None:
        """These must go from Redis."""
        room = MOST_DEBTS - len(self._debts)
        self._debts.update(dict.fromkeys(keys[:room]))
        self._counters["deletes_forgotten"] += max(0, len(keys) - room)

    async def settle_debts(self) -> None:
        """Delete what must go. Raises: StoreUnavailableError; the rest is still owed."""
        while self._debts:
            batch = list(self._debts)[:PIPELINE]
            self._counters["deleted"] += await self._link.delete(batch)
            for key in batch:
                self._debts.pop(key, None)

    async def wait(self) -> None:
        """Until nothing is on its way."""
        await self._waiting.join()

    async def aclose(self) -> None:
        """What was not written yet is not written."""
        for worker in self._workers:
            worker.cancel()
        with suppress(StoreError):
            await self.settle_debts()
        await asyncio.gather(*self._workers, return_exceptions=True)
