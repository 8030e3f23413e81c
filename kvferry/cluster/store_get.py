"""One read from a store: pieces read ahead in a thread, the digest checked on the way."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from kvferry.cluster.backends.base import BlobReader
from kvferry.cluster.blob_check import RunningDigest
from kvferry.cluster.store_core import StoreCore
from kvferry.errors import CorruptBlobError
from kvferry.proto.keys import BlobKey

READ_BYTES = 4 << 20


class GetWork:
    """The blocking part. Used by one thread at a time."""

    def __init__(
        self, core: StoreCore, key: BlobKey, reader: BlobReader, offset: int, length: int
    ) -> None:
        """A range that is the whole blob is verified; a part of one cannot be."""
        self._core, self._key, self._reader = core, key, reader
        self._at, self._end = offset, offset + length
        whole = offset == 0 and length == reader.size
        self._digest = RunningDigest(length) if whole else None

    def read(self) -> memoryview | None:
        """The next piece; None after the last.

        Raises: CorruptBlobError: the digest differs; the blob is set aside.
        """
        if self._at >= self._end:
            return None
        piece = self._reader.read(self._at, min(READ_BYTES, self._end - self._at))
        if not piece:
            raise self._damage("length", "the file ends before the blob does")
        self._at += len(piece)
        if self._digest is not None:
            self._digest.update(piece)
            if self._at >= self._end:
                self._judge(self._digest)
        return piece

    def _judge(self, digest: RunningDigest) -> None:
        try:
            digest.check()
        except CorruptBlobError:
            self._core.set_aside(self._key, CorruptBlobError.reason)
            raise

    def _damage(self, field: str, problem: str) -> CorruptBlobError:
        self._core.set_aside(self._key, CorruptBlobError.reason)
        return CorruptBlobError(field, problem)

    def close(self) -> None:
        """May be called twice."""
        self._reader.close()


async def read_pieces(work: GetWork, pool: ThreadPoolExecutor) -> AsyncIterator[memoryview]:
    """Pieces in order, one being read while another is sent."""
    loop = asyncio.get_running_loop()
    ahead = loop.run_in_executor(pool, work.read)
    try:
        while (piece := await asyncio.shield(ahead)) is not None:
            ahead = loop.run_in_executor(pool, work.read)
            yield piece
    finally:
        if not ahead.done():
            await asyncio.wait([ahead])
        if not ahead.cancelled():
            ahead.exception()
        work.close()
