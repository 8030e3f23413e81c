"""What waits for its upload: where its bytes are, and what lets go of them afterwards."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from kvferry.errors import BlobNotFoundError
from kvferry.node.journal import Journal, Pending
from kvferry.node.put_session import LEASE_S
from kvferry.node.repository import NodeRepository
from kvferry.node.spool import Spool
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)


class PendingBlobs:
    """Between the upload queue and what keeps its blobs: tiers, or the spool without a disk."""

    def __init__(self, repository: NodeRepository, journal: Journal, spool: Spool) -> None:
        self._repository, self._journal, self._spool = repository, journal, spool

    @property
    def _uploads(self) -> UploadQueue:
        return self._repository.uploads

    async def read(self, key: BlobKey) -> bytes | memoryview:
        """Bytes of a blob that waits. Raises: FerryError."""
        try:
            return await self._repository.read_pending(key)
        except BlobNotFoundError:
            return await asyncio.to_thread(self._spool.read, key)

    async def uploaded(self, item: Pending) -> None:
        """It needs no upload any more."""
        await self._repository.uploaded(item)
        await asyncio.to_thread(self._spool.remove, item.key)

    async def resume(self) -> None:
        """Go on with what an earlier run accepted."""
        items = await asyncio.to_thread(self._journal.load)
        await asyncio.to_thread(self._spool.keep_only, [item.key for item in items])
        if not self._uploads.active:
            return
        await self._uploads.requeue(await self._held(items))
        if items:
            log.info("%d blobs of an earlier run wait for their upload", len(items))

    async def _held(self, items: Sequence[Pending]) -> list[Pending]:
        """With leases of this run: those of the last are gone if the index was."""
        disk = self._repository.tiers.disk
        if disk is None:
            return list(items)
        held = [replace(item, lease=(await disk.pin([item.key], LEASE_S))[0]) for item in items]
        await asyncio.to_thread(self._journal.add, held)
        for item in items:
            if item.lease:
                await disk.unpin(item.lease)
        return held

    async def save(self) -> None:
        """At the end: what lives in memory only goes to the spool, for the next start."""
        memory = self._repository.tiers.memory
        for item in self._uploads.left():
            held = None if item.lease else memory.get(item.key)
            if held is not None:  # not on disk
                await asyncio.to_thread(self._spool.write, item.key, held.data)
        left = len(self._uploads.left())
        if left:
            log.info("%d blobs stay in the journal for the next start", left)
