"""One put into a store: checked while it comes in, visible only when it is whole."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvferry.cluster.backends.base import BlobWriter
from kvferry.cluster.blob_check import Chunk, PutCheck
from kvferry.cluster.repository import BlobInfo, PutSpec
from kvferry.cluster.store_core import StoreCore
from kvferry.errors import CorruptBlobError

WRITE_BATCH_BYTES = 4 << 20

T = TypeVar("T")


class PutWork:
    """The blocking part: checks, room, file. Used by one thread at a time."""

    def __init__(self, core: StoreCore, spec: PutSpec) -> None:
        self._core, self._spec = core, spec
        self._check = PutCheck(spec, core.limits.max_blob_bytes)
        self._info: BlobInfo | None = None
        self._writer: BlobWriter | None = None
        self._charged = 0

    def consume(self, chunks: Sequence[Chunk]) -> None:
        """Raises: CorruptBlobError, IdentityMismatchError, StoreFullError, ..."""
        for chunk in chunks:
            data = self._check.take(chunk)
            if data is None or self._check.info is None:
                continue
            if self._writer is None:
                self._writer = self._begin(self._check.info)
            self._writer.write(data)

    def _begin(self, info: BlobInfo) -> BlobWriter:
        """Take room for the blob, now that its header is here."""
        self._core.check_agreement(info)
        charged = self._core.backend.charge(self._spec.size)
        self._core.room.reserve(charged, info)
        self._info, self._charged = info, charged
        return self._core.backend.create()

    def finish(self, chunks: Sequence[Chunk]) -> bool:
        """Take the last bytes, verify, make durable, make visible."""
        self.consume(chunks)
        info = self._check.finish()
        if self._writer is None:
            raise CorruptBlobError("length", "nothing was written")
        self._writer.seal()
        stored = self._core.publish(self._writer, info, self._spec, self._charged)
        if stored:
            self._charged = 0
        self.discard()
        return stored

    def discard(self) -> None:
        """Forget what was written, if it was not published. May be called twice."""
        if self._writer is not None:
            self._writer.discard()
        charged, self._charged = self._charged, 0
        if charged and self._info is not None:
            self._core.room.release(charged, self._info)


class LocalPut:
    """The session: batches what comes, and writes one batch while the next arrives.

    Chunks must not change until the put has ended.
    """

    def __init__(self, core: StoreCore, spec: PutSpec, pool: ThreadPoolExecutor) -> None:
        self._core, self._spec, self._pool = core, spec, pool
        self._work = PutWork(core, spec)
        self._waiting: list[Chunk] = []
        self._waiting_bytes = 0
        self._received = 0
        self._job: asyncio.Future[Any] | None = None

    async def write(self, chunk: Chunk) -> None:
        """Raises: CorruptBlobError (more bytes than announced), StoreFullError, ..."""
        self._received += len(chunk)
        if self._received > self._spec.size:
            raise CorruptBlobError("length", f"more bytes came than {self._spec.size:,}")
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes >= WRITE_BATCH_BYTES:
            await self._settle()
            self._job = self._submit(self._work.consume, self._taken())

    async def finish(self) -> bool:
        """See `PutSession.finish`."""
        try:
            await self._settle()
            done = self._submit(self._work.finish, self._taken())
            # The caller may go away; the thread does not: let it end before it is judged.
            self._job = done
            stored = await asyncio.shield(done)
        except Exception as exc:
            self._core.counters[f"put_{getattr(exc, 'reason', 'internal')}"] += 1
            raise
        self._core.counters["puts" if stored else "puts_present"] += 1
        self._core.counters["put_bytes"] += self._spec.size if stored else 0
        return stored

    async def abort(self) -> None:
        """Never raises; waits for the thread that writes, as it cannot be stopped."""
        if self._job is not None:
            await asyncio.wait([self._job])
            if not self._job.cancelled():
                self._job.exception()
        # Not in the store's pool: it may be shut down already.
        await asyncio.to_thread(self._work.discard)
        self._core.counters["puts_aborted"] += 1

    def _taken(self) -> list[Chunk]:
        taken, self._waiting = self._waiting, []
        self._waiting_bytes = 0
        return taken

    async def _settle(self) -> None:
        if self._job is not None:
            await asyncio.shield(self._job)

    def _submit(self, call: Callable[..., T], *args: object) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._pool, call, *args)
