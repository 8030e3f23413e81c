"""The server as a hostile, clumsy or unlucky caller meets it."""

import asyncio
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from store_samples import MIB, ROOT, blob, digest, local_store, put, query, served

from kvferry.cluster import convert, convert_lookup, wire
from kvferry.cluster.backends import MemoryBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import (
    BlobInfo,
    CodecInfo,
    GetSession,
    LookupResult,
    PutSpec,
    TailFound,
)
from kvferry.cluster.server import start_server
from kvferry.errors import (
    BlobTooLargeError,
    ConfigError,
    CorruptBlobError,
    FerryError,
    InvalidKeyError,
    ProtocolError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2, store_pb2

KEY, DATA = blob()
Code = grpc.StatusCode


@pytest.fixture
async def client() -> AsyncIterator[BlobStoreClient]:
    async with local_store(MemoryBackend()) as store, served(store) as made:
        yield made


async def _raw_unary(client: BlobStoreClient, method: str, message: bytes) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(client.address) as channel:
        try:
            await channel.unary_unary(f"/{wire.SERVICE}/{method}")(message, timeout=10)
        except grpc.aio.AioRpcError as exc:
            return exc.code()
    return Code.OK


async def _raw_put(client: BlobStoreClient, *items: bytes) -> grpc.StatusCode:
    async def stream() -> AsyncIterator[bytes]:
        for item in items:
            yield item

    async with grpc.aio.insecure_channel(client.address) as channel:
        try:
            await channel.stream_unary(wire.PUT_METHOD)(stream(), timeout=10)
        except grpc.aio.AioRpcError as exc:
            return exc.code()
    return Code.OK


def _header(**fields: object) -> bytes:
    whole = {"key": KEY.to_proto(), "size": len(DATA)} | fields
    header = store_pb2.PutHeader(**whole)  # type: ignore[arg-type]
    return store_pb2.PutRequest(header=header).SerializeToString()


UNARY = ["Has", "Commit", "Lookup", "Pin", "Unpin", "Delete", "Stat"]


@pytest.mark.parametrize("method", UNARY)
async def test_malformed_message_is_refused(client: BlobStoreClient, method: str) -> None:
    assert await _raw_unary(client, method, b"\x0a\xff\xff\xff") not in (Code.OK, Code.UNAVAILABLE)
    assert (await client.stat()).blobs == 0


@pytest.mark.parametrize("method", UNARY)
async def test_oversized_message_is_refused(client: BlobStoreClient, method: str) -> None:
    raw = b"\x0a" + bytes([0x80, 0x80, 0x80, 0x04]) + b"x" * (8 * MIB)
    assert await _raw_unary(client, method, raw) is Code.RESOURCE_EXHAUSTED
    assert (await client.stat()).blobs == 0


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([], Code.INVALID_ARGUMENT),
        ([b"\xff\xff\xff"], Code.INVALID_ARGUMENT),
        ([wire.join_chunk(DATA)], Code.INVALID_ARGUMENT),
        ([_header(), b"\xff\xff"], Code.INVALID_ARGUMENT),
        ([_header(), _header()], Code.INVALID_ARGUMENT),
        ([_header(key=None)], Code.INVALID_ARGUMENT),
        ([_header(size=0)], Code.INVALID_ARGUMENT),
        ([_header(size=1 << 62)], Code.INVALID_ARGUMENT),
        ([_header(ttl_s=1 << 60)], Code.INVALID_ARGUMENT),
        ([_header(replaces=blob_pb2.BlobKey(kind=2))], Code.INVALID_ARGUMENT),
        ([_header()], Code.DATA_LOSS),
        ([_header(), wire.join_chunk(DATA[:-1])], Code.DATA_LOSS),
        ([_header(), wire.join_chunk(DATA), wire.join_chunk(b"x")], Code.DATA_LOSS),
        ([_header(), wire.join_chunk(DATA[:-1] + bytes([DATA[-1] ^ 1]))], Code.DATA_LOSS),
        ([_header(), wire.join_chunk(b"x" * (8 * MIB))], Code.RESOURCE_EXHAUSTED),
        ([_header(), wire.join_chunk(DATA)], Code.OK),
        ([_header(), *(wire.join_chunk(DATA[i : i + 1]) for i in range(len(DATA)))], Code.OK),
    ],
)
async def test_put_is_whole_and_sane_or_refused(
    client: BlobStoreClient, items: list[bytes], code: grpc.StatusCode
) -> None:
    assert await _raw_put(client, *items) is code
    assert await client.has([KEY]) == [code is Code.OK]
    assert (await client.stat()).in_flight_bytes == 0


async def test_bad_fields_are_refused(client: BlobStoreClient) -> None:
    key = KEY.to_proto()
    many = [key] * (convert.MAX_KEYS + 1)
    bad = blob_pb2.BlobKey(kind=1, page_key=b"short")
    calls: list[tuple[str, object]] = [
        ("Has", store_pb2.HasRequest(keys=[bad])),
        ("Has", store_pb2.HasRequest(keys=many)),
        ("Delete", store_pb2.DeleteRequest(keys=many)),
        ("Commit", store_pb2.CommitRequest(keys=many)),
        ("Pin", store_pb2.PinRequest(keys=[key], ttl_s=0)),
        ("Pin", store_pb2.PinRequest(keys=[key], ttl_s=1 << 40)),
        ("Unpin", store_pb2.UnpinRequest(lease_id="x" * 10_000)),
        ("Lookup", store_pb2.LookupRequest(root=b"short")),
        ("Lookup", store_pb2.LookupRequest(root=ROOT, page_keys=[b"short"])),
        ("Lookup", store_pb2.LookupRequest(root=ROOT, layer_start=5, layer_end=2)),
        ("Lookup", store_pb2.LookupRequest(root=ROOT, codecs=["x" * 100])),
        ("Lookup", store_pb2.LookupRequest(root=ROOT, page_keys=[ROOT] * 65_537)),
    ]
    for method, request in calls:
        raw = request.SerializeToString()  # type: ignore[attr-defined]
        assert await _raw_unary(client, method, raw) is Code.INVALID_ARGUMENT, (method, request)


async def test_client_says_what_was_wrong(client: BlobStoreClient) -> None:
    with pytest.raises(ProtocolError, match="lease"):
        await client.pin([KEY], 0)
    with pytest.raises(CorruptBlobError, match="digest"):
        await client.put(KEY, DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(ProtocolError, match="page keys"):
        await client.lookup(query([ROOT] * 65_537))
    await client.put(KEY, DATA)
    with pytest.raises(ProtocolError, match="beyond"):
        await client.get(KEY, offset=1 << 40)


async def test_unknown_kinds_and_short_filters_of_a_listing_are_refused(
    client: BlobStoreClient,
) -> None:
    for request in (store_pb2.ListRequest(page_key=b"x"), store_pb2.ListRequest(kind=9)):  # type: ignore[arg-type]
        async with grpc.aio.insecure_channel(client.address) as channel:
            call = channel.unary_stream(f"/{wire.SERVICE}/List")(request.SerializeToString())
            with pytest.raises(grpc.aio.AioRpcError) as found:
                await call.read()
            assert found.value.code() is Code.INVALID_ARGUMENT


class _Peer:
    """A repository that answers reads as a broken or hostile peer would."""

    def __init__(self, size: int, *chunks: bytes, wait_s: float = 0) -> None:
        self.size, self.data, self.wait_s = size, chunks, wait_s
        self.ended = asyncio.Event()

    async def open_get(self, *args: object) -> GetSession:
        return GetSession(self.size, "peer", self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            for chunk in self.data:
                yield chunk
                await asyncio.sleep(self.wait_s)
        finally:
            self.ended.set()


@pytest.mark.parametrize(
    ("peer", "error"),
    [
        (_Peer(1 << 50, b"x"), BlobTooLargeError),
        (_Peer(10, b"x" * 11), ProtocolError),
        (_Peer(10, b"x" * 9), ProtocolError),
        (_Peer(len(DATA), DATA[:-1] + bytes([DATA[-1] ^ 1])), CorruptBlobError),
        (_Peer(0), CorruptBlobError),
    ],
)
async def test_client_trusts_no_peer(peer: _Peer, error: type[FerryError]) -> None:
    async with served(peer) as client:  # type: ignore[arg-type]
        with pytest.raises(error):
            await client.get(KEY)


async def test_slow_peer_ends_in_a_timeout_and_its_read_is_closed() -> None:
    peer = _Peer(100, *([b"x"] * 100), wait_s=0.05)
    async with served(peer) as client:  # type: ignore[arg-type]
        with pytest.raises(StoreTimeoutError):
            await client.get(KEY, timeout_s=0.2)
        await asyncio.wait_for(peer.ended.wait(), 10)


async def test_relayed_stream_carries_size_source_and_bytes(client: BlobStoreClient) -> None:
    key, data = blob(size=5 * MIB)
    await client.put(key, data)
    session = await client.open_get(key, 100, 3 * MIB)
    assert (session.size, session.source) == (len(data), "store")
    got = b"".join([bytes(chunk) async for chunk in session.chunks])
    assert got == data[100 : 100 + 3 * MIB]


class _Full:
    """A repository that refuses every put when its header is here."""

    async def open_put(self, spec: PutSpec) -> None:
        raise StoreFullError("here", spec.size, 0)


async def test_an_upload_that_is_refused_midway_says_why() -> None:
    """Also where the refusal comes while a chunk is being sent: one time in sixteen or so."""
    key, data = blob(size=3 * MIB)
    async with served(_Full()) as client:  # type: ignore[arg-type]
        for _ in range(80):
            with pytest.raises(StoreFullError):
                await client.put(key, data)


async def test_caller_that_goes_away_leaves_nothing() -> None:
    key, data = blob(size=3 * MIB)
    async with local_store(MemoryBackend()) as store, served(store) as client:
        started = asyncio.Event()

        async def stalls() -> AsyncIterator[bytes]:
            yield data[: 2 * MIB]
            started.set()
            await asyncio.sleep(60)
            yield data[2 * MIB :]

        spec = PutSpec(key=key, size=len(data))
        sending = asyncio.create_task(client.put_stream(spec, stalls()))
        await started.wait()
        await asyncio.sleep(0.3)  # so that the server has met the call at all
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        for _ in range(500):
            if (await store.stat()).counters.get("puts_aborted"):
                break
            await asyncio.sleep(0.02)
        assert (await store.stat()).in_flight_bytes == 0
        assert await client.has([key]) == [False]
        assert await client.put(key, data)


async def test_nobody_there_is_unavailable_and_recovery_is_quick() -> None:
    async with local_store(MemoryBackend()) as store:
        service = blob_store_service(BlobStoreServicer(store))
        server = await start_server([service], ["127.0.0.1:0"])
        address = server.addresses[0]
        async with BlobStoreClient(address, timeout_s=5.0) as client:
            assert await client.has([KEY]) == [False]
            await server.stop(0)
            with pytest.raises(StoreUnavailableError):
                await client.has([KEY])
            server = await start_server([service], [address])
            for _ in range(50):
                try:
                    assert await client.has([KEY]) == [False]
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.1)
            else:
                pytest.fail("the client did not come back")
            await server.stop(0)


async def test_health_and_reflection_answer(client: BlobStoreClient) -> None:
    async with grpc.aio.insecure_channel(client.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", wire.SERVICE):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await call.read()).list_services_response.service
        assert wire.SERVICE in {service.name for service in listed}
        call.cancel()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "127.example.com:0"])
async def test_plaintext_stays_on_loopback(address: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        await start_server([], [address])


async def test_remote_plaintext_has_to_be_allowed() -> None:
    server = await start_server([], ["0.0.0.0:0"], allow_remote_plaintext=True)
    await server.stop(0)


async def test_a_port_in_use_is_refused() -> None:
    server = await start_server([], ["127.0.0.1:0"])
    with pytest.raises(ConfigError, match="free"):
        await start_server([], [server.addresses[0]])
    await server.stop(0)


async def test_unix_socket_is_its_owners_only_and_is_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "run" / "node.sock"
    async with local_store(MemoryBackend()) as store:
        async with served(store, f"unix:{path}") as client:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert await client.put(KEY, DATA)
            with pytest.raises(ConfigError, match="no other process"):
                await start_server([], [f"unix:{path}"])
            assert bytes(await client.get(KEY)) == DATA
        assert not path.exists()


async def test_socket_left_by_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with local_store(MemoryBackend()) as store, served(store, f"unix:{path}") as client:
        assert await client.has([KEY]) == [False]


async def test_long_listings_and_lookups_come_whole() -> None:
    keys = [digest(i) for i in range(2300)]
    async with local_store(MemoryBackend()) as store, served(store) as client:
        for i, key in enumerate(keys):
            before = keys[i - 1] if i else ROOT
            made = blob(key, previous=before, tokens=(i * 256, i * 256 + 256), size=10)
            await put(store, *made)
        listed = [info async for batch in client.list() for info in batch]
        assert {info.key.page_key for info in listed} == set(keys)
        assert (await client.lookup(query(keys))).complete_pages == len(keys)


async def test_bad_key_in_an_answer_is_an_error_of_ours() -> None:
    entry = store_pb2.BlobEntry(key=blob_pb2.BlobKey(kind=1, page_key=b"short"))
    with pytest.raises(InvalidKeyError):
        convert.info_from_proto(entry)
    reply = store_pb2.LookupReply(complete_pages=3)
    with pytest.raises(ProtocolError):
        convert_lookup.result_from_proto(query([ROOT]), reply)


def test_an_answer_too_long_for_a_message_is_a_shorter_run() -> None:
    keys = [digest(i) for i in range(4000)]
    codec = CodecInfo(name="raw", version=1, params_json="x" * 16_000)
    info = replace(_info_of(*blob()), codec=codec)
    result = LookupResult(
        pages=[[info]] * len(keys), tails=[TailFound(tail_key=ROOT, tokens=1, blobs=[info])]
    )
    reply = store_pb2.LookupReply.FromString(convert_lookup.result_to_bytes(query(keys), result))
    assert 1000 < reply.complete_pages < 4000
    assert not reply.tails
    assert reply.ByteSize() < wire.MAX_REPLY_BYTES
    assert (
        convert_lookup.result_from_proto(query(keys), reply).complete_pages == reply.complete_pages
    )


def _info_of(key: BlobKey, data: bytes) -> BlobInfo:
    return convert.info_from_header(container.read_header(data), key, len(data))
