"""What was accepted goes to the store: a bounded queue, a journal, a few workers.

A store that cannot be reached is tried again for ever; one that refuses a blob (full,
another identity) has the last word: the blob is dropped and counted.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

from kvferry.cluster.backoff import Backoff
from kvferry.errors import FerryError, QueueFullError, StoreUnavailableError
from kvferry.node.journal import Journal, Pending
from kvferry.node.remotes import Remote
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

MAX_ITEMS = 4096
# So long a refused blob is not asked for again, and not encoded again in vain.
REFUSED_S = 60.0


class UploadQueue:
    """Blobs on their way to the store. Belongs to the event loop.

    Args:
        store: None: nothing is uploaded, so nothing is to be queued.
        read: a pending blob's bytes from this node's tiers. Raises: FerryError.
        done: called when a blob needs no upload any more.
    """

    def __init__(
        self,
        store: Remote | None,
        journal: Journal,
        limit_bytes: int,
        read: Callable[[BlobKey], Awaitable[bytes | memoryview]],
        done: Callable[[Pending], Awaitable[None]],
        counters: Counter[str],
    ) -> None:
        self._store, self._journal, self._limit = store, journal, limit_bytes
        self._read, self._done, self._counters = read, done, counters
        self._pending: OrderedDict[BlobKey, Pending] = OrderedDict()
        self._under_way: set[BlobKey] = set()
        self._refused: OrderedDict[BlobKey, float] = OrderedDict()
        self._held = self._reserved = 0
        self._changed = asyncio.Condition()
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether there is a store to upload to."""
        return self._store is not None

    @property
    def count(self) -> int:
        """Blobs that wait or are under way."""
        return len(self._pending)

    @property
    def held_bytes(self) -> int:
        """Their bytes."""
        return self._held

    def __contains__(self, key: BlobKey) -> bool:
        return key in self._pending

    def refused_lately(self, key: BlobKey) -> bool:
        """Whether the store would not have it a moment ago."""
        return self._refused.get(key, 0.0) > time.monotonic()

    def reserve(self, size: int) -> None:
        """Room for one more, to be given back by `release`.

        Raises: QueueFullError: the offer is dropped.
        """
        full = len(self._pending) >= MAX_ITEMS
        if self._closed or full or self._held + self._reserved + size > self._limit:
            raise QueueFullError("uploads", self._limit)
        self._reserved += size

    def release(self, size: int) -> None:
        """Give reserved room back."""
        self._reserved -= size

    async def add(self, item: Pending) -> None:
        """Accept; on disk when this returns. Raises: StoreUnavailableError (journal)."""
        await asyncio.to_thread(self._journal.add, [item])
        await self.requeue([item])

    async def requeue(self, items: list[Pending]) -> None:
        """Take items that the journal holds already."""
        async with self._changed:
            for item in items:
                if item.key not in self._pending:
                    self._pending[item.key] = item
                    self._held += item.size
            self._changed.notify_all()

    async def work(self) -> None:
        """One worker; runs until cancelled."""
        backoff = Backoff(first_s=0.1, most_s=5.0)
        while True:
            item = await self._take()
            try:
                finished = await self._upload(item)
                if finished:
                    backoff.reset()
                    await self._finish(item)
            finally:
                self._under_way.discard(item.key)
            if not finished:
                self._counters["upload_retries"] += 1
                await asyncio.sleep(backoff.next_s())

    async def _take(self) -> Pending:
        async with self._changed:
            while True:
                if self._store is not None:
                    for key, item in self._pending.items():
                        if key not in self._under_way:
                            self._under_way.add(key)
                            return item
                await self._changed.wait()

    async def _upload(self, item: Pending) -> bool:
        """Whether the item needs no further attempt."""
        assert self._store is not None  # noqa: S101 - `_take` gives nothing without one
        now = time.time()
        if 0 < item.expires_unix_s <= now:
            self._counters["upload_expired"] += 1
            return True
        ttl_s = max(1, int(item.expires_unix_s - now)) if item.expires_unix_s else 0
        try:
            data = await self._read(item.key)
        except FerryError as exc:
            self._counters[f"upload_lost_{exc.reason}"] += 1
            log.warning("%s was to be uploaded and is gone: %s", item.key, exc)
            return True
        started = time.monotonic()
        try:
            async with self._store.asking(short=False):
                await self._store.client.put(item.key, data, ttl_s=ttl_s, replaces=item.replaces)
        except StoreUnavailableError as exc:
            log.debug("upload of %s: %s", item.key, exc)
            return False
        except FerryError as exc:
            self._counters[f"upload_refused_{exc.reason}"] += 1
            log.warning("the store refused %s: %s", item.key, exc)
            self._refused[item.key] = time.monotonic() + REFUSED_S
            while len(self._refused) > MAX_ITEMS:
                self._refused.popitem(last=False)
            return True
        self._store.measured(len(data), time.monotonic() - started)
        self._counters["uploads_done"] += 1
        self._counters["uploads_bytes"] += len(data)
        return True

    async def cancel(self, key: BlobKey) -> None:
        """Forget a blob that is not wanted any more: its tail was replaced."""
        item = self._pending.get(key)
        if item is not None:
            await self._finish(item)

    async def _finish(self, item: Pending) -> None:
        try:
            await asyncio.to_thread(self._journal.remove, [item.key])
            await self._done(item)
        except FerryError as exc:
            # At worst it is uploaded once more after the next start.
            log.warning("%s: %s", item.key, exc)
        async with self._changed:
            if self._pending.get(item.key) is item:
                del self._pending[item.key]
                self._held -= item.size
            self._changed.notify_all()

    async def flush(self, timeout_s: float) -> bool:
        """Wait until what is pending now is done. False: not within the time."""
        wanted = set(self._pending)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: wanted.isdisjoint(self._pending))
        except TimeoutError:
            return False
        return True

    async def quiet(self, quiet_s: float, timeout_s: float) -> None:
        """Until nothing was put for ``quiet_s``, ``timeout_s`` at most."""
        end, since = time.monotonic() + timeout_s, time.monotonic()
        while time.monotonic() < min(since + quiet_s, end):
            if self._reserved:
                since = time.monotonic()
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Accept nothing more."""
        self._closed = True

    def reopen(self) -> None:
        """Accept again."""
        self._closed = False

    def left(self) -> list[Pending]:
        """What is not uploaded yet; the journal has it."""
        return list(self._pending.values())
