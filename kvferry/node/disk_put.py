"""A put to the disk tier that counts against the day's writes."""

from kvferry.cluster.repository import PutSession
from kvferry.node.disk_writes import DiskWrites


class DiskPut:
    """Of the bytes reserved for it, those that were never written are given back."""

    def __init__(self, inner: PutSession, writes: DiskWrites, size: int) -> None:
        self._inner, self._writes, self._reserved = inner, writes, size

    async def write(self, chunk: bytes | memoryview) -> None:
        """See `PutSession.write`."""
        self._reserved -= len(chunk)
        await self._inner.write(chunk)

    async def finish(self) -> bool:
        """See `PutSession.finish`."""
        return await self._inner.finish()

    async def abort(self) -> None:
        """See `PutSession.abort`."""
        self._writes.refund(max(0, self._reserved))
        self._reserved = 0
        await self._inner.abort()
