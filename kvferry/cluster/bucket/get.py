"""One read from a bucket: one request, the digest checked on the way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from kvferry.cluster.blob_check import RunningDigest
from kvferry.cluster.bucket.layout import UnitKey, blob_path, parse_blob_path
from kvferry.cluster.bucket.objects import Bucket, Reading
from kvferry.cluster.bucket.units import Units
from kvferry.errors import (
    BlobNotFoundError,
    CodecError,
    CorruptBlobError,
    InvalidKeyError,
    ProtocolError,
)
from kvferry.proto.keys import BlobKey

_INLINE_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Found:
    """Where a blob lies. ``size``: in bytes; 0: not known yet."""

    path: str
    ends: int
    size: int = 0


class Finder:
    """From a key to an object: names say when a blob ends, keys do not."""

    def __init__(self, bucket: Bucket, units: Units, clock: Callable[[], float]) -> None:
        self._bucket, self._units, self._clock = bucket, units, clock

    def guess(self, key: BlobKey) -> Found:
        """Without a request: as its page's marker says, or as a blob that never ends."""
        for part in self._units.known(UnitKey.of(key)) or ():
            if part.info.key == key:
                return Found(part.path, part.ends, part.info.size)
        return Found(blob_path(key), 0)

    async def ask(self, key: BlobKey) -> list[Found]:
        """All objects of a key, also ended ones; the one that lasts longest first."""
        found: list[Found] = []
        for entry in await self._bucket.names(UnitKey.of(key).blobs):
            try:
                other, ends = parse_blob_path(entry.path)
            except InvalidKeyError:
                continue
            if other == key:
                found.append(Found(entry.path, ends, entry.size))
        found.sort(key=lambda f: (f.ends == 0, f.ends), reverse=True)
        return found

    async def read(self, key: BlobKey, offset: int, length: int) -> tuple[Reading, Found]:
        """Open a blob for reading. Raises: BlobNotFoundError, ProtocolError."""
        guess = self.guess(key)
        if guess.ends == 0 or guess.ends > self._clock():
            try:
                return await self._open(guess, offset, length), guess
            except FileNotFoundError:
                pass
        for found in await self.ask(key):
            if 0 < found.ends <= self._clock():
                continue
            try:
                return await self._open(found, offset, length), found
            except FileNotFoundError:
                continue
        unit = UnitKey.of(key)
        if self._units.known(unit) is not None:
            # It was evicted by another server, or lost: its page is not complete any more.
            await self._units.settle(unit)
        raise BlobNotFoundError(str(key))

    async def _open(self, found: Found, offset: int, length: int) -> Reading:
        if not offset and not length:
            return await self._bucket.read(found.path)
        size = found.size or await self._bucket.head(found.path)
        if size is None:
            raise FileNotFoundError(found.path)
        if offset > size:
            raise ProtocolError(f"offset {offset:,} is beyond the blob's {size:,} bytes")
        end = min(size, offset + length) if length else size
        if offset == end:
            return Reading(size, {}, _nothing())
        return await self._bucket.read(found.path, offset, end)


async def _nothing() -> AsyncIterator[memoryview]:
    return
    yield


async def checked(
    reading: Reading, on_damage: Callable[[], Awaitable[None]]
) -> AsyncIterator[memoryview]:
    """The chunks of a whole blob; its digest is compared before the last of them is given.

    Raises: CorruptBlobError, after ``on_damage``.
    """
    digest = RunningDigest(reading.size)
    last: memoryview | None = None
    try:
        async for chunk in reading.chunks:
            if len(chunk) > _INLINE_BYTES:
                await asyncio.to_thread(digest.update, chunk)
            else:
                digest.update(chunk)
            if last is not None:
                yield last
            last = chunk
        digest.check()
    except CorruptBlobError:
        await on_damage()
        raise
    if last is not None:
        yield last


async def damage(bucket: Bucket, path: str) -> str:
    """Read an object to its end: why it is no whole blob; empty where it is one, or gone."""

    async def nothing() -> None:
        return

    try:
        async for _ in checked(await bucket.read(path), nothing):
            pass
    except FileNotFoundError:
        return ""
    except CodecError as exc:
        return exc.reason
    return ""
