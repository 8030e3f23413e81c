"""A store or node that runs elsewhere, as a `BlobRepository`."""

import asyncio
import builtins
import contextlib
from collections.abc import AsyncIterator, Sequence

from kvferry.cluster.client import BlobStoreClient
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
from kvferry.errors import CorruptBlobError
from kvferry.proto.keys import BlobKey

# Listing everything takes as long as whoever reads does with what was listed so far.
LIST_TIMEOUT_S = 86_400.0
CHUNKS_AHEAD = 4


class RemoteStore:
    """Owns its client. Raises in every call what `BlobStoreClient` does."""

    def __init__(self, client: BlobStoreClient) -> None:
        self._client = client

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are held."""
        return await self._client.has(keys)

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """A stream to the other side; whether the key is there turns out at its end."""
        return _RemotePut(self._client, spec)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """A stream from the other side."""
        return await self._client.open_get(key, offset, length, local_only=local_only)

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Make staged blobs visible."""
        return await self._client.commit(keys)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of complete pages."""
        return await self._client.lookup(query)

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """A lease."""
        return await self._client.pin(keys, ttl_s)

    async def unpin(self, lease_id: str) -> bool:
        """End it."""
        return await self._client.unpin(lease_id)

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there."""
        return await self._client.delete(keys)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """What is held, oldest use first."""
        async for batch in self._client.list(query, timeout_s=LIST_TIMEOUT_S):
            yield batch

    async def stat(self) -> RepositoryStat:
        """Counts and bytes."""
        return await self._client.stat()

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Have everything verified."""
        async for report in self._client.scrub(repair):
            yield report


class _RemotePut:
    """Chunks on their way, a few at a time; the other side verifies them."""

    def __init__(self, client: BlobStoreClient, spec: PutSpec) -> None:
        self._spec, self._sent = spec, 0
        self._chunks: asyncio.Queue[bytes | memoryview | None] = asyncio.Queue(CHUNKS_AHEAD)
        self._call = asyncio.create_task(client.put_stream(spec, self._outgoing()))

    async def _outgoing(self) -> AsyncIterator[bytes | memoryview]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

    async def write(self, chunk: bytes | memoryview) -> None:
        """Raises: what the other side refuses the put with."""
        self._sent += len(chunk)
        if self._sent > self._spec.size:
            raise CorruptBlobError("length", f"more bytes came than {self._spec.size:,}")
        await self._give(chunk)

    async def finish(self) -> bool:
        """See `PutSession.finish`."""
        await self._give(None)
        return await self._call

    async def _give(self, chunk: bytes | memoryview | None) -> None:
        """Hand a chunk over, unless the call has ended: nobody would take it then."""
        giving = asyncio.ensure_future(self._chunks.put(chunk))
        try:
            await asyncio.wait([giving, self._call], return_when=asyncio.FIRST_COMPLETED)
        finally:
            giving.cancel()
        if self._call.done() and chunk is not None:
            self._call.result()  # raises what it was refused with, if it was

    async def abort(self) -> None:
        """Break the call off; never raises."""
        self._call.cancel()
        with contextlib.suppress(BaseException):
            await self._call
