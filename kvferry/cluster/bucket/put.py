"""One put into a bucket: checked while it comes in, an object only when it is whole.

Small blobs are held until their digest is checked and then written at once. Large ones are
uploaded in parts meanwhile; the upload is completed after the check, or aborted.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from kvferry.cluster.blob_check import Chunk, PutCheck
from kvferry.cluster.bucket.changes import Changes
from kvferry.cluster.bucket.layout import UnitKey, blob_path, staged_path
from kvferry.cluster.bucket.objects import PART_BYTES
from kvferry.cluster.bucket.units import REPLACES, STORED
from kvferry.cluster.repository import BlobInfo, PutSpec
from kvferry.errors import CorruptBlobError, StoreUnavailableError

# Hashing more than this at once is left to a thread.
_INLINE_BYTES = 128 * 1024
_QUEUED_CHUNKS = 4


class _Aborted(Exception):  # noqa: N818 - ends an upload that is not wanted any more
    pass


class BucketPut:
    """A `PutSession`. Chunks must not change until it has ended."""

    def __init__(self, changes: Changes, spec: PutSpec) -> None:
        self._changes, self._spec = changes, spec
        self._check = PutCheck(spec, changes.limits.max_blob_bytes)
        self._opened = time.monotonic()
        now = changes.clock()
        self._ends = int(now) + spec.ttl_s if spec.ttl_s else 0
        self._attributes = {STORED: str(int(now))}
        if spec.replaces is not None:
            self._attributes[REPLACES] = str(spec.replaces)
        deadline = int(now + changes.limits.staged_ttl_s)
        self._path = (
            staged_path(spec.key, self._ends, deadline)
            if spec.stage
            else blob_path(spec.key, self._ends)
        )
        self._received = 0
        self._held: list[Chunk] = []
        self._reserved = 0
        self._queue: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue(_QUEUED_CHUNKS)
        self._upload: asyncio.Task[None] | None = None

    async def write(self, chunk: Chunk) -> None:
        """Raises: CorruptBlobError, IdentityMismatchError, StoreFullError, ..."""
        self._received += len(chunk)
        if self._received > self._spec.size:
            raise CorruptBlobError("length", f"more bytes came than {self._spec.size:,}")
        if len(chunk) > _INLINE_BYTES:
            data = await asyncio.to_thread(self._check.take, chunk)
        else:
            data = self._check.take(chunk)
        if data is None or self._check.info is None:
            return
        if not self._reserved:
            await self._begin(self._check.info)
        if self._upload is None:
            self._held.append(data)
        else:
            await self._send(data)

    async def _begin(self, info: BlobInfo) -> None:
        await self._changes.check_agreement(info)
        await self._changes.room.reserve(self._spec.size)
        self._reserved = self._spec.size
        if self._spec.size > PART_BYTES:
            self._upload = asyncio.create_task(
                self._changes.bucket.put_stream(self._path, self._pieces(), self._attributes)
            )

    async def _pieces(self) -> AsyncIterator[Chunk]:
        while True:
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    async def _send(self, item: Chunk | BaseException | None) -> None:
        """Give the upload something more; what makes it fail is raised here."""
        if self._upload is None:
            return
        room = asyncio.create_task(self._queue.put(item))
        try:
            await asyncio.wait([room, self._upload], return_when=asyncio.FIRST_COMPLETED)
            if not room.done():
                self._upload.result()
                raise StoreUnavailableError(self._changes.bucket.where, "the upload ended early")
        finally:
            room.cancel()

    async def finish(self) -> bool:
        """See `PutSession.finish`."""
        store = self._changes
        try:
            info = self._check.finish()
            # Whoever puts goes away at times; half of what follows must not.
            stored = await asyncio.shield(asyncio.ensure_future(self._publish(info)))
        except Exception as exc:
            store.counters[f"put_{getattr(exc, 'reason', 'internal')}"] += 1
            raise
        store.counters["puts" if stored else "puts_present"] += 1
        store.counters["put_bytes"] += self._spec.size if stored else 0
        return stored

    async def _publish(self, info: BlobInfo) -> bool:
        store, spec = self._changes, self._spec
        async with store.lock(UnitKey.of(spec.key)):
            if store.put_since(spec.key, self._opened):
                await self._stop()
                return False
            new = await self._write()
            # Also where another server was first: it may have died before its marker.
            whole = await store.published(info, spec, self._path, new)
        await self._release()
        await store.complete(whole, spec.replaces)
        return new

    async def _write(self) -> bool:
        if self._upload is None:
            data = b"".join(self._held)
            return await self._changes.bucket.put(self._path, data, self._attributes, create=True)
        await self._send(None)
        await self._upload
        return True

    async def _stop(self) -> None:
        upload = self._upload
        if upload is not None and not upload.done():
            await self._send(_Aborted())
            await asyncio.wait([upload])
        if upload is not None and not upload.cancelled():
            upload.exception()
        await self._release()

    async def _release(self) -> None:
        self._held.clear()
        size, self._reserved = self._reserved, 0
        await self._changes.room.release(size)

    async def abort(self) -> None:
        """Never raises; nothing of the blob is left."""
        try:
            await self._stop()
        except Exception:
            self._changes.counters["abort_failed"] += 1
        self._changes.counters["puts_aborted"] += 1
