"""A put from a hook: verified, durable on this node, then in the queue to the store."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Self

from kvferry.cluster.repository import PutSession, PutSpec
from kvferry.errors import CorruptBlobError, FerryError, StoreFullError
from kvferry.node.journal import Pending
from kvferry.node.memory_tier import Reservation
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue

# Longer than a store is ever down; ended as soon as the upload is.
LEASE_S = 30 * 86_400


class NodePut:
    """One put under way. The answer to `finish` is the promise that nothing is lost."""

    def __init__(
        self,
        tiers: Tiers,
        uploads: UploadQueue,
        spec: PutSpec,
        counters: Counter[str],
        room: Reservation | None,
        disk: PutSession | None,
    ) -> None:
        """Use `open`."""
        self._tiers, self._uploads, self._spec = tiers, uploads, spec
        self._counters, self._room, self._disk = counters, room, disk
        self._parts = bytearray()
        self._reserved = True

    @classmethod
    async def open(
        cls, tiers: Tiers, uploads: UploadQueue, spec: PutSpec, counters: Counter[str]
    ) -> Self:
        """Take room in queue, memory and disk. Raises: QueueFullError, StoreFullError."""
        try:
            uploads.reserve(spec.size)
        except FerryError as exc:
            counters[f"drop_{exc.reason}"] += 1
            raise
        room = tiers.memory.reserve(spec.size)
        try:
            local = PutSpec(key=spec.key, size=spec.size, ttl_s=spec.ttl_s, rule=spec.rule)
            disk = await tiers.open_disk_put(local)
            if disk is None and room is None and not await tiers.on_disk(spec.key):
                raise StoreFullError("the memory tier", spec.size, 0)
        except BaseException as exc:
            if isinstance(exc, FerryError):
                counters[f"drop_{exc.reason}"] += 1
            uploads.release(spec.size)
            if room is not None:
                room.release()
            raise
        return cls(tiers, uploads, spec, counters, room, disk)

    async def write(self, chunk: bytes | memoryview) -> None:
        """Raises: StoreFullError, CorruptBlobError (more bytes than announced)."""
        if self._room is not None:
            if len(self._parts) + len(chunk) > self._spec.size:
                self._counters["drop_corrupt"] += 1
                raise CorruptBlobError("size", f"more than the {self._spec.size:,} announced")
            self._parts += chunk
        if self._disk is not None:
            await self._guard(self._disk.write(chunk))

    async def finish(self) -> bool:
        """Verified and durable here, and in the journal of uploads.

        Raises: CorruptBlobError, IdentityMismatchError, StoreFullError.
        """
        spec = self._spec
        if self._room is not None and len(self._parts) != spec.size:
            self._counters["drop_corrupt"] += 1
            await self.abort()
            raise CorruptBlobError("size", f"{len(self._parts):,} of {spec.size:,} bytes came")
        if self._disk is not None:
            await self._guard(self._disk.finish())
            self._disk = None
        lease = await self._lease()
        if self._room is not None:
            pinned = not lease and self._uploads.active
            keep = self._tiers.keep(
                self._room, spec.key, bytes(self._parts), spec.ttl_s, pinned=pinned
            )
            await self._guard(keep)
        self._tiers.on_new(spec.key)
        self._parts = bytearray()
        expires = time.time() + spec.ttl_s if spec.ttl_s else 0.0
        item = Pending(
            key=spec.key,
            size=spec.size,
            expires_unix_s=expires,
            replaces=spec.replaces,
            lease=lease,
        )
        if self._uploads.active:
            await self._guard(self._uploads.add(item))
        self._give_room_back()
        if spec.replaces is not None and spec.replaces != spec.key:
            await self._uploads.cancel(spec.replaces)
            await self._tiers.delete([spec.replaces])
        self._counters["puts_accepted"] += 1
        return True

    async def _lease(self) -> str:
        """What keeps it on disk until its upload; empty: it is not there, or need not be."""
        disk = self._tiers.disk
        if disk is None or not self._uploads.active:
            return ""
        lease, held = await disk.pin([self._spec.key], LEASE_S)
        if held:
            return lease
        await disk.unpin(lease)
        return ""

    async def _guard(self, step: Awaitable[object]) -> None:
        try:
            await step
        except FerryError as exc:
            self._counters[f"drop_{exc.reason}"] += 1
            await self.abort()
            raise
        except asyncio.CancelledError:
            await self.abort()
            raise

    async def abort(self) -> None:
        """Forget all that was written; never raises."""
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.abort()
        if self._room is not None:
            self._room.release()
            self._room = None
        self._parts = bytearray()
        self._give_room_back()

    def _give_room_back(self) -> None:
        if self._reserved:
            self._reserved = False
            self._uploads.release(self._spec.size)
