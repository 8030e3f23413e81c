"""The node daemon as a `BlobRepository`: its tiers first, then peers, then the store."""

import asyncio
import builtins
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

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
    FerryError,
    ProtocolError,
    StoreError,
    StoreUnavailableError,
)
from kvferry.node.journal import Pending
from kvferry.node.local_lookup import look_up_locally, merge_local, with_states_of
from kvferry.node.near import mark_near
from kvferry.node.put_session import NodePut
from kvferry.node.remotes import Peers, Remote
from kvferry.node.tiers import Data, Tiers, checked_info
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 2.0
# A peer that stops in the middle must leave time for the store.
PEER_GET_S = 5.0
PARALLEL_FETCHES = 8


def _reach(found: LookupResult) -> tuple[int, int]:
    return found.complete_pages, len(found.tails)


class NodeRepository:
    """What hooks on this machine are served. Belongs to the event loop.

    Args:
        store: None: there is no store, blobs stay on this node and its peers.
        timeout_s: of one transfer.
        on_activity: called whenever a hook asks for something.
    """

    def __init__(
        self,
        tiers: Tiers,
        uploads: UploadQueue,
        peers: Peers,
        store: Remote | None,
        counters: Counter[str],
        timeout_s: float,
        on_activity: Callable[[], None] = lambda: None,
    ) -> None:
        self._active = on_activity
        self.tiers, self.uploads, self.peers, self.store = tiers, uploads, peers, store
        self.counters, self._timeout_s = counters, timeout_s
        self._fetches: dict[BlobKey, asyncio.Task[tuple[Data, str]]] = {}
        self._slots = asyncio.Semaphore(PARALLEL_FETCHES)
        self._keeping: set[asyncio.Task[None]] = set()

    # -- reads --------------------------------------------------------------------

    async def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which need not be put: in the store, on their way to it, or refused by it lately.

        Where the store cannot be asked: which are here.
        """
        self._active()
        if self.store is not None:
            try:
                async with self.store.asking():
                    held = await self.store.client.has(keys, timeout_s=LOOKUP_TIMEOUT_S)
                return [there or self._no_use(key) for key, there in zip(keys, held, strict=True)]
            except FerryError as exc:
                self.counters[f"store_{exc.reason}"] += 1
        return await self.tiers.has(keys)

    def _no_use(self, key: BlobKey) -> bool:
        return key in self.uploads or self.uploads.refused_lately(key)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """From the nearest place that has it whole.

        Raises: BlobNotFoundError, StoreUnavailableError, CorruptBlobError (nobody has it
            undamaged), ProtocolError (offset beyond the end).
        """
        if not local_only:
            self._active()
        data, source = await self.fetch(key, local_only)
        if offset > len(data):
            raise ProtocolError(f"offset {offset:,} is beyond the blob's {len(data):,} bytes")
        view = memoryview(data)[offset : offset + length if length else len(data)]

        async def chunks() -> AsyncIterator[memoryview]:
            yield view

        return GetSession(len(data), source, chunks())

    async def fetch(self, key: BlobKey, local_only: bool = False) -> tuple[Data, str]:
        """(verified bytes, where from). Callers for one key share one transfer."""
        try:
            return await self.tiers.read(key)
        except (StoreError, CodecError) as exc:
            if local_only:
                raise
            first: FerryError = exc
        task = self._fetches.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch_elsewhere(key, first))
            self._fetches[key] = task
            task.add_done_callback(lambda _: self._fetches.pop(key, None))
        return await asyncio.shield(task)

    async def _fetch_elsewhere(self, key: BlobKey, first: FerryError) -> tuple[Data, str]:
        async with self._slots:
            worst = first
            for remote in [*await self.peers.holders(key), *([self.store] if self.store else [])]:
                is_store = remote is self.store
                kind = "store" if is_store else "peer"
                try:
                    limit_s = self._timeout_s if is_store else min(self._timeout_s, PEER_GET_S)
                    data = await remote.get(key, local_only=not is_store, timeout_s=limit_s)
                    await asyncio.to_thread(checked_info, key, data)
                except FerryError as exc:
                    self.counters[f"{kind}_{exc.reason}"] += 1
                    if not isinstance(exc, BlobNotFoundError):
                        worst = exc
                    continue
                self.counters[f"hits_{kind}"] += 1
                self.counters[f"fetched_bytes_{kind}"] += len(data)
                await self._keep(key, data)
                return data, "store" if is_store else f"peer:{remote.name}"
        self.counters["misses"] += 1
        raise worst

    async def _keep(self, key: BlobKey, data: Data) -> None:
        await self.tiers.remember(key, data)
        # The caller need not wait for the disk.
        task = asyncio.create_task(self.tiers.store_on_disk(key, data))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """From the store; ``partial`` from this node and its peers where it is gone."""
        return await mark_near(self.tiers, await self._look_up(query))

    async def _look_up(self, query: LookupQuery) -> LookupResult:
        self._active()
        if self.store is not None and not query.local_only:
            try:
                async with self.store.asking():
                    result = await self.store.client.lookup(query, timeout_s=LOOKUP_TIMEOUT_S)
                return await self._with_pending(query, result)
            except FerryError as exc:
                self.counters[f"lookup_{exc.reason}"] += 1
        local = await look_up_locally(self.tiers, query)
        if query.local_only:
            return local
        return merge_local([local, *await self._ask_peers(query)], query)

    async def _with_pending(self, query: LookupQuery, found: LookupResult) -> LookupResult:
        """Pages that are all here, but not all in the store yet, count as well."""
        if not self.uploads.count:
            return found
        own = await self.tiers.complete_run(query)
        more = _reach(own) > _reach(found)
        return with_states_of(own, found) if more else with_states_of(found, own)

    async def _ask_peers(self, query: LookupQuery) -> list[LookupResult]:
        asked = replace(query, local_only=True)

        async def ask(peer: Remote) -> LookupResult:
            async with peer.asking():
                return await peer.client.lookup(asked)

        answers = await asyncio.gather(
            *(ask(peer) for peer in self.peers.all), return_exceptions=True
        )
        return [answer for answer in answers if isinstance(answer, LookupResult)]

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """What the store holds; what this node holds where the store is gone."""
        if self.store is not None:
            try:
                timeout_s = LOOKUP_TIMEOUT_S if query.kind == "calibration" else None
                async with self.store.asking(short=False):
                    answer = self.store.client.list(query, timeout_s=timeout_s)
                    batches = [batch async for batch in answer]
            except FerryError as exc:
                self.counters[f"list_{exc.reason}"] += 1
            else:
                for batch in batches:
                    yield batch
                return
        yield await self.tiers.list(query)

    # -- writes -------------------------------------------------------------------

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """Accept a blob for upload. Raises: QueueFullError, StoreFullError."""
        self._active()
        if spec.key in self.uploads:
            return None
        if spec.stage:
            raise ProtocolError("a node daemon does not stage: put to the store itself")
        return await NodePut.open(self.tiers, self.uploads, spec, self.counters)

    async def uploaded(self, item: Pending) -> None:
        """An upload is done or dropped: what kept the blob here lets go of it."""
        self.tiers.memory.unpin(item.key)
        if item.lease and self.tiers.disk is not None:
            await self.tiers.disk.unpin(item.lease)

    async def read_pending(self, key: BlobKey) -> Data:
        """Bytes of a blob that waits for its upload. Raises: FerryError."""
        return (await self.tiers.read(key))[0]

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Nothing is ever staged here."""
        if keys:
            raise BlobNotFoundError(str(keys[0]))
        return 0

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """A lease in the store."""
        store = self._need_store()
        async with store.asking():
            return await store.client.pin(keys, ttl_s)

    async def unpin(self, lease_id: str) -> bool:
        """End a lease in the store."""
        store = self._need_store()
        async with store.asking():
            return await store.client.unpin(lease_id)

    def _need_store(self) -> Remote:
        if self.store is None:
            raise StoreUnavailableError("the store", "this node has none configured")
        return self.store

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """Here and in the store; how many were in either."""
        here = await self.tiers.delete(keys)
        if self.store is None:
            return here
        async with self.store.asking():
            return max(here, await self.store.client.delete(keys))

    # -- what it is ---------------------------------------------------------------

    async def stat(self) -> RepositoryStat:
        """Of this node's own tiers."""
        return await asyncio.to_thread(self.stat_now)

    def stat_now(self) -> RepositoryStat:
        """As `stat`, blocking, from any thread: for metrics."""
        memory = self.tiers.memory
        disk = self.tiers.disk.stat_now() if self.tiers.disk is not None else None
        return RepositoryStat(
            blobs=len(memory) + (disk.blobs if disk else 0),
            bytes=memory.held_bytes + (disk.bytes if disk else 0),
            budget_bytes=memory.budget_bytes + (disk.budget_bytes if disk else 0),
            in_flight_bytes=memory.in_flight_bytes + (disk.in_flight_bytes if disk else 0),
            quarantined=disk.quarantined if disk else 0,
            free_disk_bytes=disk.free_disk_bytes if disk else 0,
            pinned=self.uploads.count,
            backend=f"node, {'memory and disk' if disk else 'memory'}",
            counters=dict(self.counters),
        )

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Of the disk tier."""
        if self.tiers.disk is None:
            yield ScrubReport(0, 0)
            return
        async for report in self.tiers.disk.scrub(repair):
            yield report

    async def settle(self) -> None:
        """Wait for copies that are being written to disk."""
        await asyncio.gather(*self._keeping, return_exceptions=True)


class PeerView:
    """What other nodes are served: this node's own blobs, read only, never passed on."""

    def __init__(self, inner: NodeRepository) -> None:
        self._inner = inner

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are here."""
        return await self._inner.tiers.has(keys)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """From this node's tiers only. Raises: BlobNotFoundError."""
        self._inner.counters["peer_requests"] += 1
        return await self._inner.open_get(key, offset, length, local_only=True)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """What is here."""
        return await look_up_locally(self._inner.tiers, query)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """What is here."""
        yield await self._inner.tiers.list(query)

    async def stat(self) -> RepositoryStat:
        """Of this node."""
        return await self._inner.stat()

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """Refused: blobs are put to one's own node, or to the store."""
        raise ProtocolError("peers only read from this node")

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Refused."""
        raise ProtocolError("peers only read from this node")

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """Refused."""
        raise ProtocolError("peers only read from this node")

    async def unpin(self, lease_id: str) -> bool:
        """Refused."""
        raise ProtocolError("peers only read from this node")

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """Refused."""
        raise ProtocolError("peers only read from this node")

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Refused."""
        raise ProtocolError("peers only read from this node")
        yield  # makes it a generator, as the contract has it
