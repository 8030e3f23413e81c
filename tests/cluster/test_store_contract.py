"""What every store promises, whatever stands behind it and however it is reached."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis_servers import flush, one_redis, redis_cluster
from s3_servers import bucket_store, memory_bucket
from store_samples import (
    MIB,
    ROOT,
    Clock,
    Direct,
    backend_at,
    blob,
    chain,
    digest,
    local_store,
    pages,
    put,
    query,
    served,
    tail,
)

from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.redis.hot import HotOptions, HotStore
from kvferry.cluster.redis.link import RedisLink
from kvferry.cluster.repository import ListQuery
from kvferry.cluster.tag_rule import TagRule
from kvferry.errors import (
    BlobNotFoundError,
    BlobTooLargeError,
    CorruptBlobError,
    FerryError,
    IdentityMismatchError,
    ProtocolError,
    WrongNamespaceError,
)
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

Store = BlobStoreClient | Any


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def hot_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("redis")
    with one_redis(folder) as one, redis_cluster(folder) as cluster:
        yield {"redis": one.url, "cluster": cluster.url}


BACKENDS = [
    "memory",
    "file",
    "file over tcp",
    "file over unix",
    "memory over tcp",
    "bucket",
    "s3 over tcp",
    pytest.param("ceph over tcp", marks=pytest.mark.ceph),
]


@asynccontextmanager
async def opened(
    kind: str, request: pytest.FixtureRequest, root: Path, clock: Clock
) -> AsyncIterator[Any]:
    """A store of one kind: "memory", "file", a bucket, or "file behind" Redis or a cluster."""
    cold_kind, _, hot = kind.partition(" behind ")
    async with AsyncExitStack() as stack:
        servers = {"s3": "moto", "ceph": "ceph"}
        if cold_kind in ("memory", "file"):
            cold: Any = local_store(backend_at(cold_kind, root), clock=clock)
        else:
            named = servers.get(cold_kind)
            where = request.getfixturevalue(named).url() if named else memory_bucket()
            cold = bucket_store(where, clock=clock)
        store: Any = await stack.enter_async_context(cold)
        if hot:
            url = request.getfixturevalue("hot_urls")[hot]
            await flush(url)
            link = RedisLink(url, timeout_s=20.0)
            store = HotStore(store, link, HotOptions(on_put=True), clock=clock)
            stack.push_async_callback(store.aclose)
        yield store


@pytest.fixture(params=[*BACKENDS, "file behind redis", "bucket behind cluster over tcp"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> AsyncIterator[Store]:
    kind, _, way = request.param.partition(" over ")
    async with opened(kind, request, tmp_path / "root", clock) as local:
        if not way:
            yield Direct(local)
            return
        address = "127.0.0.1:0" if way == "tcp" else f"unix:{tmp_path}/run/s.sock"
        async with served(local, address) as client:
            yield client


@pytest.mark.parametrize("size", [1, 2000, MIB - 100, 5 * MIB + 7])
async def test_what_is_put_comes_back(store: Store, size: int) -> None:
    key, data = blob(size=size)
    assert await store.has([key]) == [False]
    assert await store.put(key, data)
    assert await store.has([key]) == [True]
    assert bytes(await store.get(key)) == data
    assert bytes(await store.get(key, offset=10, length=7)) == data[10:17]
    assert bytes(await store.get(key, offset=len(data) - 3)) == data[-3:]
    assert bytes(await store.get(key, offset=len(data))) == b""
    assert bytes(await store.get(key, offset=5, length=len(data) * 2)) == data[5:]
    with pytest.raises(ProtocolError):
        await store.get(key, offset=len(data) + 1)


async def test_absent_is_not_found(store: Store) -> None:
    with pytest.raises(BlobNotFoundError):
        await store.get(blob()[0])
    assert await store.has([]) == []


async def test_has_keeps_the_order_asked(store: Store) -> None:
    made = pages(6)
    for key, data in made[::2]:
        await store.put(key, data)
    wanted = [made[i][0] for i in (5, 0, 0, 3, 4, 2)]
    assert await store.has(wanted) == [False, True, True, False, True, True]


async def test_second_put_keeps_first(store: Store) -> None:
    key, first = blob(payload=b"first")
    same, second = blob(payload=b"second")
    assert same == key
    assert await store.put(key, first)
    assert not await store.put(key, second)
    assert bytes(await store.get(key)) == first


async def test_two_writers_of_one_key(store: Store) -> None:
    key, data = blob(size=2 * MIB)
    results = await asyncio.gather(*(store.put(key, data) for _ in range(6)))
    assert sum(results) == 1
    assert bytes(await store.get(key)) == data
    stat = await store.stat()
    assert (stat.blobs, stat.in_flight_bytes) == (1, 0)


@pytest.mark.parametrize("at", [0, 7, 9, 40, 600, -33, -1])
async def test_a_flipped_bit_is_refused(store: Store, at: int) -> None:
    key, data = blob()
    bad = bytearray(data)
    bad[at] ^= 0x10
    with pytest.raises(FerryError) as found:
        await store.put(key, bytes(bad))
    assert found.value.reason in ("corrupt", "version", "too_large", "identity")
    assert await store.has([key]) == [False]
    assert (await store.stat()).in_flight_bytes == 0
    assert await store.put(key, data)


@pytest.mark.parametrize(
    "data", [b"x", b"hello, I am no blob at all " * 100, b"KVFERRY\x01" + b"\xff" * 500]
)
async def test_foreign_bytes_are_refused(store: Store, data: bytes) -> None:
    with pytest.raises(CorruptBlobError):
        await store.put(blob()[0], data)


async def test_a_blob_belongs_to_its_own_key_only(store: Store) -> None:
    key, data = blob()
    for other in (
        blob(digest("other"))[0],
        blob(layers=(0, 2))[0],
        blob(heads=(0, 1))[0],
        blob(codec="zstd")[0],
        BlobKey("calibration", key.page_key),
    ):
        with pytest.raises(IdentityMismatchError):
            await store.put(other, data)
        assert await store.has([other]) == [False]


@pytest.mark.parametrize(
    "odd",
    [
        {"model": digest("another model")},
        {"model_layers": 5},
        {"model_heads": 3},
        {"previous": digest("elsewhere")},
        {"tokens": (256, 512)},
    ],
    ids=lambda odd: next(iter(odd)),
)
async def test_blobs_of_a_page_agree(store: Store, odd: dict[str, Any]) -> None:
    await store.put(*blob(layers=(0, 2)))
    with pytest.raises(IdentityMismatchError):
        await store.put(*blob(layers=(2, 4), **odd))
    assert (await store.lookup(query([digest("page")]))).complete_pages == 0
    await store.put(*blob(layers=(2, 4)))
    assert (await store.lookup(query([digest("page")]))).complete_pages == 1


async def test_header_fields_beyond_reason_are_refused(store: Store) -> None:
    with pytest.raises(BlobTooLargeError):
        await store.put(*blob(params='{"x": "' + "y" * 20_000 + '"}'))


async def test_staged_blobs_show_after_their_commit(store: Store) -> None:
    made = [blob(layers=(0, 2)), blob(layers=(2, 4))]
    keys = [key for key, _ in made]
    for key, data in made:
        assert await store.put(key, data, stage=True)
    assert not await store.put(*made[0], stage=True)
    assert await store.has(keys) == [False, False]
    with pytest.raises(BlobNotFoundError):
        await store.get(keys[0])
    assert (await store.lookup(query([digest("page")]))).complete_pages == 0
    assert await store.commit(keys) == 2
    assert await store.has(keys) == [True, True]
    assert (await store.lookup(query([digest("page")]))).complete_pages == 1
    assert await store.commit(keys) == 2


async def test_a_commit_is_all_or_none(store: Store) -> None:
    key, data = blob(layers=(0, 2))
    await store.put(key, data, stage=True)
    with pytest.raises(BlobNotFoundError):
        await store.commit([key, blob(layers=(2, 4))[0]])
    assert await store.has([key]) == [False]


async def test_staged_blobs_that_disagree_are_not_committed(store: Store) -> None:
    one, two = blob(layers=(0, 2)), blob(layers=(2, 4), model=digest("other"))
    for key, data in (one, two):
        await store.put(key, data, stage=True)
    with pytest.raises(IdentityMismatchError):
        await store.commit([one[0], two[0]])
    assert await store.has([one[0], two[0]]) == [False, False]


async def test_staged_and_forgotten_is_dropped(store: Store, clock: Clock) -> None:
    key, data = blob()
    await store.put(key, data, stage=True)
    clock.now += 599
    assert not await store.put(key, data)
    clock.now += 2
    with pytest.raises(BlobNotFoundError):
        await store.commit([key])
    assert await store.put(key, data)


async def test_time_to_live(store: Store, clock: Clock) -> None:
    key, data = blob()
    assert await store.put(key, data, ttl_s=100)
    clock.now += 99
    assert await store.has([key]) == [True]
    clock.now += 2
    assert await store.has([key]) == [False]
    assert (await store.lookup(query([digest("page")]))).complete_pages == 0
    with pytest.raises(BlobNotFoundError):
        await store.get(key)
    assert [i async for batch in store.list(ListQuery()) for i in batch] == []
    assert await store.put(key, data)
    clock.now += 10**7
    assert bytes(await store.get(key)) == data


async def test_a_later_put_prolongs_a_life(store: Store, clock: Clock) -> None:
    key, data = blob()
    await store.put(key, data, ttl_s=100)
    assert not await store.put(key, data, ttl_s=50)
    clock.now += 90
    assert not await store.put(key, data, ttl_s=100)
    clock.now += 90
    assert bytes(await store.get(key)) == data
    assert not await store.put(key, data)
    clock.now += 10**6
    assert bytes(await store.get(key)) == data


async def test_delete(store: Store) -> None:
    made = pages(3)
    for key, data in made:
        await store.put(key, data)
    keys = [key for key, _ in made]
    assert await store.delete([keys[1], keys[1], blob(digest("no"))[0]]) == 1
    assert await store.has(keys) == [True, False, True]
    assert (await store.lookup(query(chain(3)))).complete_pages == 1
    assert (await store.stat()).blobs == 2


async def test_leases_end_by_themselves_or_by_hand(store: Store, clock: Clock) -> None:
    key, data = blob()
    await store.put(key, data)
    lease, held = await store.pin([key, blob(digest("no"))[0]], 100)
    assert held == 1
    assert (await store.stat()).pinned == 1
    assert await store.unpin(lease)
    assert not await store.unpin(lease)
    assert not await store.unpin("nonsense")
    lease, _ = await store.pin([key], 100)
    clock.now += 101
    assert (await store.stat()).pinned == 0
    assert not await store.unpin(lease)


async def test_listing_filters(store: Store) -> None:
    made = [*pages(4), tail(ROOT, "t"), blob(digest("m"), model=digest("m2"))]
    key, data = blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION, codec="ferry")
    for each in [*made, (key, data)]:
        await store.put(*each)

    async def listed(**filters: Any) -> set[BlobKey]:
        return {i.key async for b in store.list(ListQuery(**filters)) for i in b}

    assert await listed() == {k for k, _ in [*made, (key, data)]}
    assert await listed(kind="tail") == {made[4][0]}
    assert await listed(kind="calibration") == {key}
    assert await listed(model_id=digest("m2")) == {made[5][0]}
    assert await listed(page_key=chain(4)[2]) == {made[2][0]}
    assert len(await listed(limit=3)) == 3


async def test_listing_tells_what_the_header_said(store: Store, clock: Clock) -> None:
    key, data = blob(layers=(1, 3), heads=(1, 2), tokens=(512, 768), codec="zstd")
    await store.put(key, data)
    ((info,),) = [batch async for batch in store.list(ListQuery())]
    assert (info.key, info.size) == (key, len(data))
    assert (info.layers, info.heads, info.tokens) == ((1, 3), (1, 2), (512, 768))
    assert (info.model_layers, info.model_heads) == (4, 2)
    assert (info.codec.name, info.codec.version, info.previous_key) == ("zstd", 1, ROOT)
    assert abs(info.stored_unix_s - clock.now) < 2
    assert info.expires_unix_s == 0


async def test_listings_tell_when_a_blob_ends(store: Store, clock: Clock) -> None:
    """Whoever moves blobs to another store needs it."""
    key, data = blob()
    await store.put(key, data, ttl_s=100)
    ((info,),) = [batch async for batch in store.list(ListQuery())]
    (page,) = (await store.lookup(query([digest("page")]))).pages
    for found in (info, *page):
        assert abs(found.expires_unix_s - clock.now - 100) < 2


async def test_calibration_keeps_its_ranges_in_the_listing(store: Store) -> None:
    key, data = blob(
        digest("cal"), kind=blob_pb2.BLOB_KIND_CALIBRATION, layers=(2, 4), codec="ferry"
    )
    await store.put(key, data)
    assert bytes(await store.get(key)) == data
    ((info,),) = [batch async for batch in store.list(ListQuery(kind="calibration"))]
    assert (info.key, info.layers, info.codec.name) == (key, (2, 4), "ferry")


async def test_stat_and_scrub_of_a_healthy_store(store: Store) -> None:
    made = pages(3)
    for key, data in made:
        await store.put(key, data)
    stat = await store.stat()
    assert (stat.blobs, stat.pages_complete, stat.quarantined) == (3, 3, 0)
    assert sum(len(d) for _, d in made) <= stat.bytes <= stat.budget_bytes == 64 * MIB
    reports = [r async for r in store.scrub(repair=True)]
    assert (reports[-1].checked, reports[-1].total) == (3, 3)
    assert all(not r.findings for r in reports)
    assert await store.has([key for key, _ in made]) == [True] * 3


@pytest.mark.parametrize("kind", ["memory", "file", "bucket", "file behind redis"])
async def test_a_writer_is_held_to_its_own_namespace(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> None:
    rule = TagRule("guests", own=7, others={8: "ours"})
    async with opened(kind, request, tmp_path / "root", clock) as store:
        for tag, stage in ((8, False), (9, False), (8, True)):
            key, data = blob(digest(tag), namespace=tag, size=20_000)
            with pytest.raises(WrongNamespaceError):
                await put(store, key, data, chunk=3000, rule=rule, stage=stage)
            assert await store.has([key]) == [False]
        for tag in (0, 7):
            assert await put(store, *blob(digest(tag), namespace=tag), rule=rule)
        assert (await store.stat()).blobs == 2
