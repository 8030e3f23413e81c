"""Redis by itself, with as much of a `BlobRepository` as `kvferry migrate` needs.

It evicts whenever it likes and knows no pages, so that it answers no lookups: it is no
backend of a store.
"""

import asyncio
import builtins
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from kvferry.cluster.checked import checked_info
from kvferry.cluster.convert import info_from_header
from kvferry.cluster.redis.link import RedisLink
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
from kvferry.errors import (
    BlobNotFoundError,
    CodecError,
    CorruptBlobError,
    ProtocolError,
)
from kvferry.proto import container
from kvferry.proto.keys import BlobKey

_FIRST_READ = 16 * 1024
_BATCH = 64
_NO_STORE = "redis is a hot tier or an end of `kvferry migrate`, no store by itself"


class RedisRepository:
    """Blobs in Redis. Raises in every call: StoreUnavailableError, StoreTimeoutError."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def aclose(self) -> None:
        """Close the connections."""
        await self._link.aclose()

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are there."""
        return await self._link.has(keys)

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """None: the key is there already. Raises: ProtocolError: nothing is staged here."""
        if spec.stage:
            raise ProtocolError(_NO_STORE)
        return None if (await self.has([spec.key]))[0] else _RedisPut(self._link, spec)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """Raises: BlobNotFoundError, CorruptBlobError, ProtocolError (offset beyond the end)."""
        data = await self._link.get(key)
        if data is None:
            raise BlobNotFoundError(str(key))
        await asyncio.to_thread(checked_info, key, data)
        if offset > len(data):
            raise ProtocolError(f"offset {offset:,} is beyond the blob's {len(data):,} bytes")
        view = memoryview(data)[offset : offset + length if length else len(data)]

        async def chunks() -> AsyncIterator[memoryview]:
            yield view

        return GetSession(len(data), "redis", chunks())

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Nothing is ever staged here."""
        if keys:
            raise BlobNotFoundError(str(keys[0]))
        return 0

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """Refused."""
        raise ProtocolError(_NO_STORE)

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """Refused."""
        raise ProtocolError(_NO_STORE)

    async def unpin(self, lease_id: str) -> bool:
        """Refused."""
        raise ProtocolError(_NO_STORE)

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there."""
        return await self._link.delete(keys)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """Batches in no order. What is damaged is left out: a scrub tells of it."""
        left = query.limit or None
        async for keys in self._batches():
            found = await asyncio.gather(*(self._info(key) for key in keys))
            infos = [info for info in found if info is not None and _fits(info, query)][:left]
            if infos:
                yield infos
            if left is not None:
                left -= len(infos)
                if left <= 0:
                    return

    async def _batches(self) -> AsyncIterator[Sequence[BlobKey]]:
        batch: dict[BlobKey, None] = {}
        async for key in self._link.scan():
            batch[key] = None
            if len(batch) == _BATCH:
                yield list(batch)
                batch.clear()
        if batch:
            yield list(batch)

    async def _info(self, key: BlobKey) -> BlobInfo | None:
        start, size, left_ms = await self._link.head(key, _FIRST_READ)
        if not size:
            return None  # evicted since it was listed
        try:
            need = container.header_bytes_needed(start[: container.PREFIX_BYTES])
            if need > len(start):
                start, size, left_ms = await self._link.head(key, need)
            header = container.read_header(start, size)
            if container.key_of(header) != key:
                return None
        except CodecError:
            return None
        info = info_from_header(header, key, size)
        expires = int(time.time()) + -(-left_ms // 1000) if left_ms > 0 else 0
        return replace(info, expires_unix_s=expires)

    async def stat(self) -> RepositoryStat:
        """Counts and bytes of all that Redis holds, also what is not ours."""
        told = await self._link.info()
        return RepositoryStat(
            blobs=told.keys,
            bytes=told.used_bytes,
            budget_bytes=told.max_bytes,
            backend=self._link.url,
            counters=dict(self._link.counters),
        )

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Read and verify everything; with ``repair`` damaged values are deleted."""
        total, checked = (await self._link.info()).keys, 0
        async for keys in self._batches():
            findings, size = [], 0
            for key in keys:
                try:
                    size += (await self.open_get(key)).size
                except CodecError as exc:
                    findings.append((str(key), exc.reason))
                    if repair:
                        await self.delete([key])
                except BlobNotFoundError:
                    continue
            checked += len(keys)
            yield ScrubReport(checked, max(total, checked), findings, bytes=size)
        if not checked:
            yield ScrubReport(0, 0)


class _RedisPut:
    """Collects a blob, checks it whole, and writes it with one command."""

    def __init__(self, link: RedisLink, spec: PutSpec) -> None:
        self._link, self._spec = link, spec
        self._parts = bytearray()

    async def write(self, chunk: bytes | memoryview) -> None:
        """Raises: CorruptBlobError: more bytes than announced."""
        if len(self._parts) + len(chunk) > self._spec.size:
            raise CorruptBlobError("length", f"more bytes came than {self._spec.size:,}")
        self._parts += chunk

    async def finish(self) -> bool:
        """See `PutSession.finish`. Raises: BlobTooLargeError: more than Redis takes."""
        if len(self._parts) != self._spec.size:
            got = len(self._parts)
            raise CorruptBlobError("length", f"{got:,} bytes came of {self._spec.size:,}")
        data = memoryview(self._parts).toreadonly()
        await asyncio.to_thread(checked_info, self._spec.key, data)
        return await self._link.put(self._spec.key, data, self._spec.ttl_s, fresh=True)

    async def abort(self) -> None:
        """Nothing was written."""
        self._parts = bytearray()


def _fits(info: BlobInfo, query: ListQuery) -> bool:
    return (
        query.page_key in (b"", info.key.page_key)
        and query.model_id in (b"", info.model_id)
        and query.kind in ("", info.key.kind)
        and query.previous_key in (b"", info.previous_key)
    )
