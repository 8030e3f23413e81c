"""The node daemon as a `BlobRepository`: its tiers first, then peers, then the store."""

import asyncio
import builtins
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

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
from kvferry.node.admission import admit
from kvferry.node.exchange import Exchange
from kvferry.node.hand_over import HandedOver
from kvferry.node.journal import Pending
from kvferry.node.lookups import LOOKUP_TIMEOUT_S, Lookups
from kvferry.node.put_session import NodePut
from kvferry.node.remotes import Peers, Remote
from kvferry.node.tiers import Data, Tiers
from kvferry.node.upload_queue import UploadQueue
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import node_pb2
from kvferry.settings import NodeSettings


class NodeRepository:
    """What hooks on this machine are served. Belongs to the event loop.

    Args:
        store: None: there is no store, blobs stay on this node and its peers.
        on_activity: called whenever a hook asks for something.

    Attributes:
        exchange: what goes on between this node and its peers.
    """

    def __init__(
        self,
        settings: NodeSettings,
        incarnation: int,
        tiers: Tiers,
        uploads: UploadQueue,
        peers: Peers,
        store: Remote | None,
        counters: Counter[str],
        on_activity: Callable[[], None] = lambda: None,
    ) -> None:
        self.tiers, self.uploads, self.peers, self.store = tiers, uploads, peers, store
        self.counters, self._on_activity = counters, on_activity
        self._active_s = time.monotonic()
        self.exchange = Exchange(
            settings,
            incarnation,
            tiers,
            uploads,
            peers,
            store,
            counters,
            quiet_s=lambda: time.monotonic() - self._active_s,
        )
        self._lookups = Lookups(tiers, uploads, self.exchange.directory, store, counters)

    def _active(self) -> None:
        self._active_s = time.monotonic()
        self._on_activity()

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

    async def admit(
        self, keys: Sequence[BlobKey], again: bool = False
    ) -> "builtins.list[node_pb2.Admission.ValueType]":
        """What of a hook's offer shall be put; see `kvferry.node.admission`."""
        held = await self.has(keys)
        return admit(keys, held, self.exchange.second_use, self.counters, again)

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
        if not local_only:
            self.exchange.read(key)
        try:
            return await self.tiers.read(key)
        except (StoreError, CodecError) as exc:
            if local_only:
                raise
            return await self.exchange.fetching.fetch(key, exc)

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """From the store; ``partial`` from this node and its peers where it is gone."""
        self._active()
        return await self._lookups.lookup(query)

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

    async def hand_over(self, deadline_s: float) -> HandedOver:
        """Give what only this node has to the store, or else to peers, within the time.

        For a node that is about to sleep or to be drained; it goes on as it was.
        """
        return await self.exchange.hand_over.run(deadline_s)

    async def settle(self) -> None:
        """Wait for copies that are being written to disk, and write what is remembered."""
        await self.exchange.settle()
