"""What nodes and commands call: the verbs of BlobStore, asynchronous.

Every call has a deadline. What the other side raised is raised here again; what the
transport does wrong becomes `StoreUnavailableError` or `StoreTimeoutError`.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Self, TypeAlias

import grpc.aio

from kvferry.cluster import convert, convert_lookup, convert_stat, wire
from kvferry.cluster.channel import open_channel
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.early_answer import answered
from kvferry.cluster.repository import (
    BlobInfo,
    GetSession,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSpec,
    RepositoryStat,
    ScrubReport,
)
from kvferry.cluster.status import rpc_errors
from kvferry.cluster.throttle import Throttle
from kvferry.cluster.transfer import Receiver, data_of
from kvferry.errors import ProtocolError, StoreTimeoutError
from kvferry.proto.container import DEFAULT_LIMITS
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import store_pb2
from kvferry.proto.v1.store_pb2_grpc import BlobStoreStub

if TYPE_CHECKING:
    from kvferry.proto.v1.store_pb2_grpc import BlobStoreAsyncStub

# Where a node daemon has a blob that crosses no link on its way to a hook.
NEAR_SOURCES = ("memory", "disk")

_GetCall: TypeAlias = "grpc.aio.UnaryStreamCall[wire.Outgoing, wire.GetItem]"


class BlobStoreClient:
    """A store or a node daemon, at HOST:PORT or unix:PATH. Connects when first used.

    Usable from one event loop. Raises in every call, beside what is named there:
    StoreUnavailableError, StoreTimeoutError, ProtocolError.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        max_blob_bytes: int = DEFAULT_LIMITS.max_blob,
        throttle: Throttle | None = None,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """``timeout_s``: deadline of each call that is not given its own. ``throttle``: for
        blobs that `put` and `get` send over a link. ``credentials``: for TCP."""
        self.address = address
        self._throttle = throttle or Throttle()
        self._timeout_s = timeout_s
        self._max_blob_bytes = max_blob_bytes
        self._channel = open_channel(address, wire.MAX_REPLY_BYTES, credentials)
        self._stub: BlobStoreAsyncStub = BlobStoreStub(self._channel)
        self._put = self._channel.stream_unary(
            wire.PUT_METHOD, wire.serialize, store_pb2.PutReply.FromString
        )
        self._get = self._channel.unary_stream(
            wire.GET_METHOD, wire.serialize, wire.deserialize_get
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls under way fail."""
        await self._channel.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """For other services of the same server."""
        return self._channel

    def _deadline(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    async def has(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> list[bool]:
        """Which are held, in the order asked. Any number: asked in batches."""
        found: list[bool] = []
        with rpc_errors(self.address):
            for at in range(0, len(keys), convert.MAX_KEYS):
                batch = [k.to_proto() for k in keys[at : at + convert.MAX_KEYS]]
                request = store_pb2.HasRequest(keys=batch)
                reply = await self._stub.Has(request, timeout=self._deadline(timeout_s))
                if len(reply.present) != len(batch):
                    raise ProtocolError(f"{self.address}: has answered for other keys")
                found.extend(reply.present)
        return found

    async def put(
        self,
        key: BlobKey,
        data: wire.Chunk,
        *,
        stage: bool = False,
        ttl_s: int = 0,
        replaces: BlobKey | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Store a blob; returns when it is durable. False: it was there already.

        Raises: StoreFullError, CorruptBlobError, BlobTooLargeError, IdentityMismatchError.
        """
        spec = PutSpec(key=key, size=len(data), stage=stage, ttl_s=ttl_s, replaces=replaces)
        await self._throttle.take(len(data))

        async def chunks() -> AsyncIterator[wire.Chunk]:
            for chunk in wire.chunks_of(data):
                yield chunk

        return await self.put_stream(spec, chunks(), timeout_s=timeout_s)

    async def put_stream(
        self,
        spec: PutSpec,
        chunks: AsyncIterator[wire.Chunk],
        *,
        timeout_s: float | None = None,
    ) -> bool:
        """As `put`, from an iterator that gives ``spec.size`` bytes in all."""

        async def items() -> AsyncIterator[store_pb2.PutRequest | wire.Chunk]:
            yield store_pb2.PutRequest(header=convert.spec_to_proto(spec))
            async for chunk in chunks:
                for part in wire.chunks_of(chunk):
                    yield part

        with rpc_errors(self.address):
            reply = await answered(self._put(items(), timeout=self._deadline(timeout_s)))
            return bool(reply.stored)

    async def get(
        self,
        key: BlobKey,
        offset: int = 0,
        length: int = 0,
        *,
        verify: bool = True,
        local_only: bool = False,
        timeout_s: float | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> memoryview:
        """The blob, or ``length`` bytes of it from ``offset`` (0: to the end).

        ``verify``: check the digest, where the range is the whole blob. ``on_bytes`` is told,
        as they come, how many are here.
        Raises: BlobNotFoundError, CorruptBlobError, BlobTooLargeError.
        """
        receiver = Receiver(self.address, offset, length, self._max_blob_bytes)
        end = time.monotonic() + self._deadline(timeout_s)
        with rpc_errors(self.address):
            call = self._open(key, offset, length, local_only, timeout_s)
            try:
                async for item in call:
                    receiver.take(item)
                    if on_bytes is not None:
                        on_bytes(receiver.received)
            finally:
                call.cancel()
        data = receiver.finish(verify)
        if receiver.source not in NEAR_SOURCES:
            left = end - time.monotonic()
            if not await self._throttle.take(len(data), left):
                rate = self._throttle.bytes_per_s
                raise StoreTimeoutError(self.address, f"throttled to {rate:,.0f} bytes/s")
        return data

    async def open_get(
        self,
        key: BlobKey,
        offset: int = 0,
        length: int = 0,
        *,
        local_only: bool = False,
        timeout_s: float | None = None,
    ) -> GetSession:
        """As `get`, but a stream: for relays. Neither capped nor verified here."""
        with rpc_errors(self.address):
            call = self._open(key, offset, length, local_only, timeout_s)
            items = aiter(call)
            first = await anext(items, None)
        if not isinstance(first, store_pb2.GetReply) or not first.HasField("header"):
            call.cancel()
            raise ProtocolError(f"{self.address}: a get's answer must begin with its header")
        return GetSession(
            first.header.size, first.header.source, self._chunks(call, items, first.data)
        )

    def _open(
        self, key: BlobKey, offset: int, length: int, local_only: bool, timeout_s: float | None
    ) -> _GetCall:
        request = store_pb2.GetRequest(
            key=key.to_proto(), offset=offset, length=length, local_only=local_only
        )
        return self._get(request, timeout=self._deadline(timeout_s))

    async def _chunks(
        self, call: _GetCall, items: AsyncIterator[wire.GetItem], head: bytes
    ) -> AsyncIterator[wire.Chunk]:
        try:
            with rpc_errors(self.address):
                if head:
                    yield head
                async for item in items:
                    yield data_of(self.address, item)
        finally:
            call.cancel()

    async def commit(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> int:
        """Make staged blobs visible, all or none. Raises: BlobNotFoundError."""
        request = store_pb2.CommitRequest(keys=[k.to_proto() for k in keys])
        with rpc_errors(self.address):
            reply = await self._stub.Commit(request, timeout=self._deadline(timeout_s))
        return reply.committed

    async def lookup(self, query: LookupQuery, *, timeout_s: float | None = None) -> LookupResult:
        """Longest run of complete pages, and the tails at its end."""
        request = convert_lookup.query_to_proto(query)
        with rpc_errors(self.address):
            reply = await self._stub.Lookup(request, timeout=self._deadline(timeout_s))
        return convert_lookup.result_from_proto(query, reply)

    async def pin(
        self, keys: Sequence[BlobKey], ttl_s: int, *, timeout_s: float | None = None
    ) -> tuple[str, int]:
        """A lease against eviction: (lease id, how many of the keys are held)."""
        request = store_pb2.PinRequest(keys=[k.to_proto() for k in keys], ttl_s=ttl_s)
        with rpc_errors(self.address):
            reply = await self._stub.Pin(request, timeout=self._deadline(timeout_s))
        return reply.lease_id, reply.pinned

    async def unpin(self, lease_id: str, *, timeout_s: float | None = None) -> bool:
        """End a lease. False: it was over already."""
        request = store_pb2.UnpinRequest(lease_id=lease_id)
        with rpc_errors(self.address):
            reply = await self._stub.Unpin(request, timeout=self._deadline(timeout_s))
        return reply.existed

    async def delete(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> int:
        """How many were there."""
        request = store_pb2.DeleteRequest(keys=[k.to_proto() for k in keys])
        with rpc_errors(self.address):
            reply = await self._stub.Delete(request, timeout=self._deadline(timeout_s))
        return reply.deleted

    async def stat(self, *, timeout_s: float | None = None) -> RepositoryStat:
        """Counts and bytes."""
        with rpc_errors(self.address):
            request = store_pb2.StatRequest()
            reply = await self._stub.Stat(request, timeout=self._deadline(timeout_s))
        return convert_stat.stat_from_proto(reply)

    async def list(
        self, query: ListQuery | None = None, *, timeout_s: float | None = None
    ) -> AsyncIterator[Sequence[BlobInfo]]:
        """Batches of what is held, oldest use first."""
        request = convert.list_to_proto(query or ListQuery())
        with rpc_errors(self.address):
            async for reply in self._stub.List(request, timeout=self._deadline(timeout_s)):
                yield [convert.info_from_proto(entry) for entry in reply.entries]

    async def scrub(
        self, repair: bool = False, *, timeout_s: float = 3600.0
    ) -> AsyncIterator[ScrubReport]:
        """Have everything re-read and verified; reports come while it runs."""
        request = store_pb2.ScrubRequest(repair=repair)
        with rpc_errors(self.address):
            async for report in self._stub.Scrub(request, timeout=timeout_s):
                yield convert_stat.report_from_proto(report)

    async def set_quota(
        self, tag: int, name: str, quota_bytes: int, *, timeout_s: float | None = None
    ) -> int:
        """How much a namespace may hold, 0: as much as there is room; how many blobs went.

        Raises: ProtocolError: what answers keeps no quotas (a node daemon, say).
        """
        request = store_pb2.SetQuotaRequest(tag=tag, name=name, bytes=quota_bytes)
        with rpc_errors(self.address):
            reply = await self._stub.SetQuota(request, timeout=self._deadline(timeout_s))
        return reply.evicted
