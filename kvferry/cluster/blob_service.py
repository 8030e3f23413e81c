"""A `BlobRepository` as the gRPC service BlobStore. The store and every node use this one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc

from kvferry import __version__
from kvferry.cluster import convert, convert_lookup, convert_stat, wire
from kvferry.cluster.guard import caller, callers_rule
from kvferry.cluster.handlers import stream, unary, upload
from kvferry.cluster.mend import Replica, scrub_and_mend
from kvferry.cluster.quotas import MAX_NAME_CHARS, MAX_QUOTA_BYTES, KeepsQuotas
from kvferry.cluster.repository import BlobRepository, GetSession, ListQuery, PutSession
from kvferry.cluster.server import Service
from kvferry.cluster.tokens import Right
from kvferry.errors import NotAllowedError, ProtocolError
from kvferry.proto.container import DEFAULT_LIMITS
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import store_pb2

LIST_BATCH = 1000
# Pages from which on an answer is put together off the event loop.
LONG_RUN = 200


class BlobStoreServicer:
    """Checks every field, asks the repository, and turns its errors into statuses."""

    def __init__(
        self,
        repository: BlobRepository,
        *,
        max_blob_bytes: int = DEFAULT_LIMITS.max_blob,
        on_failure: Callable[[str], None] | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        """``on_failure`` gets the reason of every refused or failed call, to be counted.

        ``replicas``: who may have whole copies of what a scrub finds damaged.
        """
        self._replicas = replicas
        self._repository = repository
        self._max_blob_bytes = max_blob_bytes
        self._on_failure = on_failure or (lambda reason: None)

    async def has(self, request: store_pb2.HasRequest) -> store_pb2.HasReply:
        """Has."""
        keys = convert.keys_from_proto(request.keys)
        return store_pb2.HasReply(present=await self._repository.has(keys))

    async def commit(self, request: store_pb2.CommitRequest) -> store_pb2.CommitReply:
        """Commit."""
        keys = convert.keys_from_proto(request.keys)
        return store_pb2.CommitReply(committed=await self._repository.commit(keys))

    async def lookup(self, request: store_pb2.LookupRequest) -> wire.Encoded:
        """Lookup."""
        query = convert_lookup.query_from_proto(request)
        result = await self._repository.lookup(query)
        if len(result.pages) < LONG_RUN:
            return wire.Encoded(convert_lookup.result_to_bytes(query, result))
        return wire.Encoded(await asyncio.to_thread(convert_lookup.result_to_bytes, query, result))

    async def pin(self, request: store_pb2.PinRequest) -> store_pb2.PinReply:
        """Pin: leases of 1 second to a day."""
        keys = convert.keys_from_proto(request.keys)
        if not 1 <= request.ttl_s <= convert.MAX_LEASE_S:
            raise ProtocolError(
                f"a lease of {request.ttl_s:,} s: 1 to {convert.MAX_LEASE_S:,} wanted"
            )
        lease, pinned = await self._repository.pin(keys, request.ttl_s)
        return store_pb2.PinReply(lease_id=lease, pinned=pinned)

    async def unpin(self, request: store_pb2.UnpinRequest) -> store_pb2.UnpinReply:
        """Unpin."""
        if not 0 < len(request.lease_id) <= 128:
            raise ProtocolError("lease id: 1 to 128 characters wanted")
        return store_pb2.UnpinReply(existed=await self._repository.unpin(request.lease_id))

    async def delete(self, request: store_pb2.DeleteRequest) -> store_pb2.DeleteReply:
        """Delete."""
        keys = convert.keys_from_proto(request.keys)
        return store_pb2.DeleteReply(deleted=await self._repository.delete(keys))

    async def stat(self, request: store_pb2.StatRequest) -> store_pb2.StatReply:
        """Stat."""
        stat = await self._repository.stat()
        bearer = caller()
        if bearer is not None and bearer.right < Right.ADMIN:
            # Whose leases they are, and what others hold and use, is not theirs to know.
            stat = replace(stat, leases=(), namespaces=())
        return convert_stat.stat_to_proto(stat, __version__)

    async def list(
        self, request: store_pb2.ListRequest
    ) -> AsyncGenerator[store_pb2.ListReply, None]:
        """List, at most `LIST_BATCH` entries a message."""
        query = convert.list_from_proto(request)
        _check_listing(query)
        async for batch in self._repository.list(query):
            if query.previous_key:  # which a repository may leave out of account
                batch = [info for info in batch if info.previous_key == query.previous_key]
            for at in range(0, len(batch), LIST_BATCH):
                entries = [convert.info_to_proto(info) for info in batch[at : at + LIST_BATCH]]
                yield store_pb2.ListReply(entries=entries)

    async def scrub(
        self, request: store_pb2.ScrubRequest
    ) -> AsyncGenerator[store_pb2.ScrubProgress, None]:
        """Scrub."""
        async for report in scrub_and_mend(self._repository, request.repair, self._replicas):
            yield convert_stat.report_to_proto(report)

    async def set_quota(self, request: store_pb2.SetQuotaRequest) -> store_pb2.SetQuotaReply:
        """SetQuota."""
        if not isinstance(self._repository, KeepsQuotas):
            raise ProtocolError("quotas are kept by the shared store, and this is none")
        if not request.tag or len(request.name) > MAX_NAME_CHARS:
            raise ProtocolError(f"quota: a tag, and at most {MAX_NAME_CHARS} characters of name")
        if request.bytes > MAX_QUOTA_BYTES:
            raise ProtocolError(f"quota of {request.bytes:,} bytes, at most {MAX_QUOTA_BYTES:,}")
        evicted = await self._repository.set_quota(request.tag, request.name, request.bytes)
        return store_pb2.SetQuotaReply(evicted=evicted)

    async def put(self, items: AsyncIterator[wire.PutItem]) -> store_pb2.PutReply:
        """Put: a header, then exactly the bytes it announced."""
        first = await anext(items, None)
        if not isinstance(first, store_pb2.PutRequest) or not first.HasField("header"):
            problem = first.problem if isinstance(first, wire.Malformed) else "want a PutHeader"
            raise ProtocolError(f"a put begins with its header: {problem}")
        spec = convert.spec_from_proto(first.header, self._max_blob_bytes)
        spec = replace(spec, rule=callers_rule())
        session = await self._repository.open_put(spec)
        if session is None:
            return store_pb2.PutReply(stored=False)
        async with _ending(session):
            if first.data:
                await session.write(first.data)
            async for item in items:
                await session.write(_data_of(item))
            return store_pb2.PutReply(stored=await session.finish())

    async def get(
        self, request: store_pb2.GetRequest
    ) -> AsyncGenerator[store_pb2.GetReply | wire.Chunk, None]:
        """Get: a header, then the bytes in chunks of at most 1 MiB."""
        key = BlobKey.from_proto(request.key)
        session = await self._repository.open_get(
            key, request.offset, request.length, request.local_only
        )
        header = store_pb2.GetHeader(size=session.size, source=session.source)
        yield store_pb2.GetReply(header=header)
        async with _closing(session):
            async for piece in session.chunks:
                for chunk in wire.chunks_of(piece):
                    yield chunk

    def service(self) -> Service:
        """To be given to `kvferry.cluster.server.start_server`."""
        count = self._on_failure
        handlers = {
            "Has": unary(self.has, store_pb2.HasRequest, count),
            "Put": upload(self.put, "Put", wire.deserialize_put, count),
            "Get": stream(self.get, store_pb2.GetRequest, count),
            "Commit": unary(self.commit, store_pb2.CommitRequest, count),
            "Lookup": unary(self.lookup, store_pb2.LookupRequest, count),
            "Pin": unary(self.pin, store_pb2.PinRequest, count),
            "Unpin": unary(self.unpin, store_pb2.UnpinRequest, count),
            "Delete": unary(self.delete, store_pb2.DeleteRequest, count),
            "List": stream(self.list, store_pb2.ListRequest, count),
            "Stat": unary(self.stat, store_pb2.StatRequest, count),
            "Scrub": stream(self.scrub, store_pb2.ScrubRequest, count),
            "SetQuota": unary(self.set_quota, store_pb2.SetQuotaRequest, count),
        }
        generic = grpc.method_handlers_generic_handler(wire.SERVICE, handlers)
        return Service(wire.SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))


def _check_listing(query: ListQuery) -> None:
    """A bearer lists what it can name, and calibrations; not the keys of other namespaces."""
    bearer = caller()
    named = query.page_key or query.previous_key or query.kind == "calibration"
    if bearer is not None and bearer.right < Right.ADMIN and not named:
        held = bearer.right.name.lower()
        raise NotAllowedError("a list of all blobs", "admin", held)


def _data_of(item: wire.PutItem) -> wire.Chunk:
    if isinstance(item, memoryview):
        return item
    if isinstance(item, wire.Malformed):
        raise ProtocolError(item.problem)
    if item.HasField("header"):
        raise ProtocolError("a put has one header only")
    return item.data


@asynccontextmanager
async def _ending(session: PutSession) -> AsyncIterator[None]:
    """Aborts a put that did not finish, also when its caller went away."""
    try:
        yield
    except BaseException:
        await asyncio.shield(session.abort())
        raise


@asynccontextmanager
async def _closing(session: GetSession) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if isinstance(session.chunks, AsyncGenerator):
            await session.chunks.aclose()


def blob_store_service(servicer: BlobStoreServicer) -> Service:
    """The service BlobStore, to be given to `kvferry.cluster.server.start_server`."""
    return servicer.service()
