"""Objects of a bucket, asynchronously: small ones whole, large ones as streams.

Every call is retried with growing pauses until its deadline, and every failure counted by
reason. What lists here sees what was put before (S3, Ceph and MinIO are consistent so).
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kvferry.cluster.bucket.failures import reason_of, unavailable, worth_retrying
from kvferry.cluster.bucket.s3 import s3_store
from kvferry.cluster.bucket.url import BucketUrl
from kvferry.errors import BlobTooLargeError, StoreUnavailableError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MIB = 1 << 20
PART_BYTES = 8 * MIB
DEADLINE_S = 15.0
PARALLEL = 64
_PAGE = 1000
_DELETE_BATCH = 500
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing. ``size`` in bytes."""

    path: str
    size: int
    modified_unix_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """An object being read: ``size`` of all of it, and the bytes asked for."""

    size: int
    attributes: Mapping[str, str]
    chunks: AsyncIterator[memoryview]


class Bucket:
    """A bucket, or a part of one. Usable from one event loop.

    Raises in every call, beside what is named there: StoreUnavailableError,
    StoreTimeoutError. ``counters`` get "bucket_REASON" for every failed request.
    """

    def __init__(
        self,
        store: "ObjectStore",
        where: str,
        *,
        prefix: str = "",
        conditional: bool = True,
        counters: Counter[str] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """``store``: any of obstore's. ``where``: its name in messages."""
        import obstore
        from obstore import exceptions

        self._obs, self._exceptions = obstore, exceptions
        self._store, self.where = store, where
        self._prefix = f"{prefix}/" if prefix else ""
        self._conditional = conditional
        self.counters = Counter() if counters is None else counters
        self._deadline_s = deadline_s
        self._slots = asyncio.Semaphore(PARALLEL)

    @classmethod
    def open(cls, url: BucketUrl, **options: Any) -> Self:
        """Over S3, with keys from the environment as obstore takes them.

        Raises: ConfigError: the extra is missing, or the bucket cannot be named so.
        """
        return cls(
            s3_store(url), url.text, prefix=url.prefix, conditional=url.conditional_put, **options
        )

    async def _try(self, call: Callable[[], Awaitable[T]]) -> T:
        """Until it succeeds, fails for good, or the deadline is over."""
        end = time.monotonic() + self._deadline_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async with self._slots:
                    left = end - time.monotonic()
                    async with asyncio.timeout(max(left, 0.05)):
                        return await call()
            except FileNotFoundError as exc:
                if "NoSuchBucket" in str(exc):
                    raise StoreUnavailableError(self.where, "there is no such bucket") from exc
                raise
            except (self._exceptions.AlreadyExistsError, self._exceptions.PreconditionError):
                raise
            except (self._exceptions.BaseError, OSError) as exc:
                reason = reason_of(exc)
                self.counters[f"bucket_{reason}"] += 1
                pause_now = pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries
                over = time.monotonic() + pause_now >= end
                if over or not worth_retrying(reason):
                    raise unavailable(self.where, reason, exc) from exc
            self.counters["bucket_retries"] += 1
            await asyncio.sleep(pause_now)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def get(self, path: str, most: int = 4 * MIB) -> bytes | None:
        """A small object whole; None: it is not there. Raises: BlobTooLargeError."""

        async def call() -> bytes:
            reply = await self._obs.get_async(self._store, self._prefix + path)
            if reply.meta["size"] > most:
                raise BlobTooLargeError(path, reply.meta["size"], most)
            return bytes(await reply.bytes_async())

        try:
            return await self._try(call)
        except FileNotFoundError:
            return None

    async def head(self, path: str) -> int | None:
        """Bytes of an object; None: it is not there."""

        async def call() -> int:
            return int((await self._obs.head_async(self._store, self._prefix + path))["size"])

        try:
            return await self._try(call)
        except FileNotFoundError:
            return None

    async def read(self, path: str, start: int = 0, end: int = 0) -> Reading:
        """Bytes ``start`` to ``end`` (0: to the last one), which must not be none.

        Raises: FileNotFoundError.
        """

        async def call() -> Any:
            options: dict[str, Any] = {}
            if end:
                options["range"] = (start, end)
            elif start:
                options["range"] = {"offset": start}
            return await self._obs.get_async(
                self._store,
                self._prefix + path,
                options=options or None,
            )

        reply = await self._try(call)
        return Reading(reply.meta["size"], dict(reply.attributes), self._chunks(reply))

    async def _chunks(self, reply: Any) -> AsyncIterator[memoryview]:
        stream = aiter(reply.stream(min_chunk_size=MIB))
        while True:
            try:
                async with asyncio.timeout(self._deadline_s):
                    chunk = await anext(stream, None)
            except (self._exceptions.BaseError, OSError) as exc:
                reason = reason_of(exc)
                self.counters[f"bucket_{reason}"] += 1
                raise unavailable(self.where, reason, exc) from exc
            if chunk is None:
                return
            yield memoryview(chunk)

    async def put(
        self,
        path: str,
        data: bytes,
        attributes: Mapping[str, str] | None = None,
        *,
        create: bool = False,
    ) -> bool:
        """Write an object at once. False: ``create`` was said, and it is there already.

        Where the server knows no conditional PUT, ``create`` writes it again.
        """

        async def call() -> None:
            wanted: dict[str, Any] = {"mode": "create"} if create and self._conditional else {}
            if attributes:
                wanted["attributes"] = dict(attributes)
            await self._obs.put_async(
                self._store, self._prefix + path, data, use_multipart=False, **wanted
            )

        try:
            await self._try(call)
        except (self._exceptions.AlreadyExistsError, self._exceptions.PreconditionError):
            return False
        except StoreUnavailableError as exc:
            if not (create and self._conditional and "501" in str(exc)):
                raise
            self._conditional = False  # NotImplemented: this server never will
            await self._try(call)
        return True

    async def put_stream(
        self, path: str, pieces: AsyncIterator[Any], attributes: Mapping[str, str]
    ) -> None:
        """Write an object from pieces; nothing is there unless ``pieces`` ends well.

        What ``pieces`` raises is raised here, and the upload aborted. Not retried.
        """
        try:
            await self._obs.put_async(
                self._store,
                self._prefix + path,
                pieces,
                attributes=dict(attributes),
                chunk_size=PART_BYTES,
                max_concurrency=2,
            )
        except (self._exceptions.BaseError, OSError) as exc:
            reason = reason_of(exc)
            self.counters[f"bucket_{reason}"] += 1
            raise unavailable(self.where, reason, exc) from exc

    async def copy(self, old: str, new: str) -> bool:
        """A second object with the same bytes and attributes. False: there is none."""
        try:
            await self._try(
                lambda: self._obs.copy_async(self._store, self._prefix + old, self._prefix + new)
            )
        except FileNotFoundError:
            return False
        return True

    async def delete(self, paths: Sequence[str]) -> None:
        """Any number; those that are not there are none the less gone."""
        for at in range(0, len(paths), _DELETE_BATCH):
            batch = [self._prefix + path for path in paths[at : at + _DELETE_BATCH]]
            try:
                await self._try(lambda batch=batch: self._obs.delete_async(self._store, batch))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    async def names(self, folder: str, most: int = 0) -> list[Listed]:
        """Objects under a folder, in order of their paths; the first ``most`` (0: all)."""
        found: list[Listed] = []
        async with aclosing(self.walk(folder)) as batches:
            async for batch in batches:
                found += batch
                if most and len(found) >= most:
                    return found[:most]
        return found

    async def walk(self, folder: str) -> AsyncGenerator[list[Listed], None]:
        """The same in batches; goes on where it was after a failure."""
        last = ""
        while True:
            # A listing is begun anew for each thousand: a failed one can be asked again.
            batch = await self._try(lambda last=last: self._page(folder, last))  # type: ignore[misc]
            if batch:
                yield batch
            if len(batch) < _PAGE:
                return
            last = batch[-1].path

    async def _page(self, folder: str, after: str) -> list[Listed]:
        stream = self._obs.list(
            self._store,
            prefix=self._prefix + folder,
            offset=self._prefix + after if after else None,
            chunk_size=_PAGE,
        )
        async for batch in stream:
            cut = len(self._prefix)
            return [
                Listed(meta["path"][cut:], meta["size"], meta["last_modified"].timestamp())
                for meta in batch
            ]
        return []
