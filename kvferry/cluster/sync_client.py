"""The client for synchronous callers, above all the model's process.

The same client in an event loop of its own thread: measured as fast as grpc's
synchronous one, and there is one implementation of everything. All methods may be
called from any thread, and block the calling thread only.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Self, TypeVar

import grpc.aio

from kvferry.cluster import wire
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.loop_thread import LoopThread
from kvferry.cluster.repository import (
    BlobInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
    RepositoryStat,
    ScrubReport,
)
from kvferry.cluster.throttle import Throttle
from kvferry.errors import FerryError, StoreTimeoutError
from kvferry.proto.container import DEFAULT_LIMITS
from kvferry.proto.keys import BlobKey

T = TypeVar("T")


class SyncBlobStoreClient:
    """The verbs of `BlobStoreClient`, blocking. Arguments and errors are the same."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        max_blob_bytes: int = DEFAULT_LIMITS.max_blob,
        loop_thread: LoopThread | None = None,
        throttle: Throttle | None = None,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """``loop_thread``: one to share; without it the client has, and closes, its own."""
        self.address = address
        self._own = loop_thread is None
        self._thread = loop_thread or LoopThread()
        try:
            self._client = self._thread.run(
                _connect(address, timeout_s, max_blob_bytes, throttle, credentials)
            )
        except BaseException:
            if self._own:
                self._thread.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._thread.run(self._client.aclose())
        if self._own:
            self._thread.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection; belongs to this client's event loop."""
        return self._client.channel

    def has(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> list[bool]:
        """Which are held, in the order asked."""
        return self._thread.run(self._client.has(keys, timeout_s=timeout_s))

    def put(
        self,
        key: BlobKey,
        data: wire.Chunk,
        *,
        stage: bool = False,
        ttl_s: int = 0,
        replaces: BlobKey | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Store a blob; returns when it is durable. False: it was there already."""
        return self._thread.run(
            self._client.put(
                key, data, stage=stage, ttl_s=ttl_s, replaces=replaces, timeout_s=timeout_s
            )
        )

    def put_later(
        self,
        key: BlobKey,
        data: wire.Chunk,
        *,
        ttl_s: int = 0,
        replaces: BlobKey | None = None,
        timeout_s: float | None = None,
    ) -> Future[bool]:
        """`put` that goes on by itself; its answer or error comes with the future."""
        return self._thread.start(
            self._client.put(key, data, ttl_s=ttl_s, replaces=replaces, timeout_s=timeout_s)
        )

    def get(
        self,
        key: BlobKey,
        offset: int = 0,
        length: int = 0,
        *,
        verify: bool = True,
        local_only: bool = False,
        timeout_s: float | None = None,
    ) -> memoryview:
        """The blob, or a range of it."""
        return self._thread.run(
            self._client.get(
                key, offset, length, verify=verify, local_only=local_only, timeout_s=timeout_s
            )
        )

    def get_many(
        self,
        keys: Sequence[BlobKey],
        *,
        parallel: int = 4,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> list[memoryview | FerryError]:
        """Blobs in the order asked; in place of one that failed, its error.

        ``timeout_s``: for all of them together, from now.
        """
        answers: dict[int, memoryview | FerryError] = dict(
            self.get_each(keys, parallel=parallel, verify=verify, timeout_s=timeout_s)
        )
        return [answers[index] for index in range(len(keys))]

    def get_each(
        self,
        keys: Sequence[BlobKey],
        *,
        parallel: int = 4,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> Generator[tuple[int, memoryview | FerryError], None, None]:
        """(index of a key, its blob or error) as they come; fetched in the order asked.

        Fetching starts at the first answer asked for and goes on meanwhile; a caller that
        closes the iterator ends it. ``timeout_s``: as in `get_many`.
        """
        arrived: SimpleQueue[tuple[int, memoryview | FerryError] | None] = SimpleQueue()
        fetching = self._thread.start(
            self._get_each(keys, parallel, verify, timeout_s, arrived.put)
        )
        try:
            while (item := arrived.get()) is not None:
                yield item
            fetching.result()
        finally:
            fetching.cancel()

    async def _get_each(
        self,
        keys: Sequence[BlobKey],
        parallel: int,
        verify: bool,
        timeout_s: float | None,
        deliver: Callable[[tuple[int, memoryview | FerryError] | None], None],
    ) -> None:
        slots = asyncio.Semaphore(parallel)
        loop = asyncio.get_running_loop()
        end = None if timeout_s is None else loop.time() + timeout_s

        async def one(index: int) -> None:
            async with slots:
                left = None if end is None else end - loop.time()
                try:
                    if left is not None and left <= 0:  # grpc may answer even then
                        raise StoreTimeoutError(self.address, "the time for all of them is over")
                    found = await self._client.get(keys[index], verify=verify, timeout_s=left)
                except FerryError as exc:
                    deliver((index, exc))
                else:
                    deliver((index, found))

        try:
            await asyncio.gather(*(one(index) for index in range(len(keys))))
        finally:
            deliver(None)

    def commit(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> int:
        """Make staged blobs visible, all or none."""
        return self._thread.run(self._client.commit(keys, timeout_s=timeout_s))

    def lookup(self, query: LookupQuery, *, timeout_s: float | None = None) -> LookupResult:
        """Longest run of complete pages, and the tails at its end."""
        return self._thread.run(self._client.lookup(query, timeout_s=timeout_s))

    def pin(
        self, keys: Sequence[BlobKey], ttl_s: int, *, timeout_s: float | None = None
    ) -> tuple[str, int]:
        """A lease against eviction: (lease id, how many of the keys are held)."""
        return self._thread.run(self._client.pin(keys, ttl_s, timeout_s=timeout_s))

    def unpin(self, lease_id: str, *, timeout_s: float | None = None) -> bool:
        """End a lease."""
        return self._thread.run(self._client.unpin(lease_id, timeout_s=timeout_s))

    def delete(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> int:
        """How many were there."""
        return self._thread.run(self._client.delete(keys, timeout_s=timeout_s))

    def stat(self, *, timeout_s: float | None = None) -> RepositoryStat:
        """Counts and bytes."""
        return self._thread.run(self._client.stat(timeout_s=timeout_s))

    def set_quota(
        self, tag: int, name: str, quota_bytes: int, *, timeout_s: float | None = None
    ) -> int:
        """How much a namespace may hold; how many blobs went for it."""
        return self._thread.run(self._client.set_quota(tag, name, quota_bytes, timeout_s=timeout_s))

    def list(
        self, query: ListQuery | None = None, *, timeout_s: float | None = None
    ) -> Iterator[Sequence[BlobInfo]]:
        """Batches of what is held, oldest use first."""
        batches = self._client.list(query, timeout_s=timeout_s)
        while (batch := self._thread.run(_next(batches))) is not None:
            yield batch

    def scrub(self, repair: bool = False, *, timeout_s: float = 3600.0) -> Iterator[ScrubReport]:
        """Have everything re-read and verified; reports come while it runs."""
        reports = self._client.scrub(repair, timeout_s=timeout_s)
        while (report := self._thread.run(_next(reports))) is not None:
            yield report


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


async def _connect(
    address: str,
    timeout_s: float,
    max_blob_bytes: int,
    throttle: Throttle | None,
    credentials: Credentials,
) -> BlobStoreClient:
    return BlobStoreClient(
        address,
        timeout_s=timeout_s,
        max_blob_bytes=max_blob_bytes,
        throttle=throttle,
        credentials=credentials,
    )
