"""All blobs from one kind of store to another and back."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from redis_servers import flush, one_redis, redis_cluster
from store_samples import (
    MIB,
    ROOT,
    blob,
    chain,
    digest,
    get,
    local_store,
    pages,
    put,
    query,
    served,
    state,
    tail,
)

from kvferry.cluster.backends import FileBackend
from kvferry.cluster.migrate import Wanted, check_room, migrate, survey
from kvferry.cluster.open_store import open_store
from kvferry.cluster.repository import BlobRepository, ListQuery
from kvferry.cluster.served import OwnedRepository
from kvferry.cluster.space import StoreLimits
from kvferry.errors import ConfigError, CorruptBlobError, ProtocolError, StoreFullError
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

LIMITS = StoreLimits(budget_bytes=1 << 40)
ALL = Wanted()
OTHER = digest("another model")


def samples() -> list[tuple[BlobKey, bytes]]:
    """Every kind of blob, of two models, some of several parts."""
    return [
        *pages(6, size=20_000),
        *(blob(digest("split"), layers=part, tokens=(0, 256)) for part in ((0, 2), (2, 4))),
        *pages(3, "other", model=OTHER),
        tail(chain(6)[-1], "t", start=1536),
        state(chain(6)[-1], "s", 1546),
        blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION, size=MIB),
        blob(digest("c2"), kind=blob_pb2.BLOB_KIND_CALIBRATION, model=OTHER),
    ]


@pytest.fixture(scope="module")
def redis_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("redis")
    with one_redis(folder) as one, redis_cluster(folder) as cluster:
        yield {"redis": one.url, "cluster": cluster.url}


Places = Any


@pytest.fixture
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    """Opens stores by kind, each kind always the same one."""

    @asynccontextmanager
    async def opened(kind: str) -> AsyncIterator[OwnedRepository]:
        async with AsyncExitStack() as stack:
            if kind in ("redis", "cluster"):
                url = request.getfixturevalue("redis_urls")[kind]
            elif kind == "s3":
                url = request.getfixturevalue("moto").url(tmp_path.name)
            elif kind == "remote":
                local = await stack.enter_async_context(
                    local_store(FileBackend(tmp_path / "behind"))
                )
                url = (await stack.enter_async_context(served(local))).address
            else:
                url = f"file://{tmp_path / kind}"
            store = await open_store(url, LIMITS)
            stack.push_async_callback(store.aclose)
            yield store

    if "redis_urls" in request.fixturenames:
        for url in request.getfixturevalue("redis_urls").values():
            await flush(url)
    return opened


class Steps:
    """Hears of progress."""

    last = (0, 0)

    def __call__(self, blobs: int, size: int) -> None:
        assert blobs > self.last[0]
        self.last = (blobs, size)


async def held(store: BlobRepository) -> dict[BlobKey, bytes]:
    keys = [info.key async for batch in store.list(ListQuery()) for info in batch]
    return {key: await get(store, key) for key in keys}


@pytest.mark.parametrize(
    "way",
    [
        ["file", "other file"],
        ["file", "redis", "other file"],
        ["file", "cluster", "redis", "other file"],
        ["file", "remote", "other file"],
        ["redis", "remote", "cluster", "file"],
        ["file", "s3", "redis", "other file"],
    ],
    ids=" > ".join,
)
async def test_everything_arrives_whole_and_nothing_twice(
    place: Places, way: list[str], redis_urls: dict[str, str]
) -> None:
    made = samples()
    async with place(way[0]) as first:
        for key, data in made:
            assert await put(first, key, data)
    for source_kind, target_kind in pairwise(way):
        async with place(source_kind) as source, place(target_kind) as target:
            there = await survey(source, target, ALL)
            assert (there.missing, there.present) == (len(made), 0)
            assert there.missing_bytes == sum(len(data) for _, data in made)
            assert there.kinds["calibration"] == 2
            steps = Steps()
            moved = await migrate(source, target, ALL, progress=steps)
            assert (moved.copied, moved.present, moved.failures) == (len(made), 0, {})
            assert steps.last == (len(made), there.missing_bytes)
            again = await migrate(source, target, ALL)
            assert (again.copied, again.copied_bytes, again.present) == (0, 0, len(made))
            assert await held(target) == dict(made)
    async with place(way[-1]) as last:
        assert (await last.lookup(query(chain(6)))).complete_pages == 6
        assert len((await last.lookup(query(chain(6)))).tails) == 1


async def test_one_model_only(place: Places) -> None:
    made = samples()
    async with place("file") as source, place("other file") as target:
        for each in made:
            await put(source, *each)
        moved = await migrate(source, target, Wanted(model=OTHER.hex()[:20]))
        assert moved.copied == 4
        infos = [i async for batch in target.list(ListQuery()) for i in batch]
        assert {info.model_id for info in infos} == {OTHER}


@pytest.mark.parametrize("target_kind", ["other file", "redis", "remote", "s3"])
async def test_a_life_ends_there_when_it_would_have_here(
    place: Places, target_kind: str, redis_urls: dict[str, str]
) -> None:
    key, data = tail(ROOT, "t")
    lasting = blob()
    async with place("file") as source, place(target_kind) as target, place("third") as third:
        await put(source, key, data, ttl_s=500)
        await put(source, *lasting)
        await migrate(source, target, ALL)
        for each in (source, target):
            infos = [i async for batch in each.list(ListQuery()) for i in batch]
            ends = {info.key: info.expires_unix_s for info in infos}
            assert abs(ends[key] - time.time() - 500) < 20
            assert ends[lasting[0]] == 0
        await migrate(target, third, ALL)
        infos = [i async for batch in third.list(ListQuery()) for i in batch]
        assert any(abs(i.expires_unix_s - time.time() - 500) < 20 for i in infos)


async def test_damaged_blobs_stay_behind_and_are_named(place: Places, tmp_path: Path) -> None:
    made = samples()
    async with place("file") as source, place("other file") as target:
        for each in made:
            await put(source, *each)
        (path,) = (tmp_path / "file" / "blobs").glob("*/tail-*")
        with path.open("r+b") as file:
            file.seek(-100, 2)
            file.write(b"damage")
        moved = await migrate(source, target, ALL)
        assert (moved.copied, moved.failures) == (len(made) - 1, {"corrupt": 1})
        assert list(moved.failed) == [str(made[11][0])]
        assert made[11][0].kind == "tail"
        assert await target.has([made[11][0]]) == [False]


async def test_stopped_in_the_middle_it_goes_on_later(place: Places) -> None:
    made = pages(40)
    async with place("file") as source, place("remote") as target:
        for each in made:
            await put(source, *each)
        seen = 0

        def count(blobs: int, size: int) -> None:
            nonlocal seen
            seen = blobs

        moved = await migrate(
            source, target, ALL, parallel=3, progress=count, stopping=lambda: seen >= 10
        )
        assert moved.stopped
        assert 10 <= moved.copied <= 13
        rest = await migrate(source, target, ALL)
        assert rest.copied == len(made) - moved.copied
        assert await held(target) == dict(made)


async def test_a_target_without_room_is_refused_before_anything_goes(tmp_path: Path) -> None:
    made = pages(10, size=100_000)
    limits = StoreLimits(budget_bytes=700_000)
    source = await open_store("memory://", LIMITS)
    target = await open_store(f"file://{tmp_path}/t", limits)
    for each in made:
        await put(source, *each)
    there = await survey(source, target, ALL)
    with pytest.raises(StoreFullError):
        await check_room(target, there.missing_bytes)
    await check_room(target, 1000)
    await source.aclose()
    await target.aclose()


async def test_a_folder_in_use_says_so(tmp_path: Path) -> None:
    store = await open_store(f"file://{tmp_path}/r", LIMITS)
    with pytest.raises(ConfigError, match="no other running"):
        await open_store(f"file://{tmp_path}/r", LIMITS)
    await store.aclose()


async def test_redis_alone_is_no_store(redis_urls: dict[str, str]) -> None:
    store = await open_store(redis_urls["redis"], LIMITS)
    with pytest.raises(ProtocolError, match="hot tier"):
        await store.lookup(query(chain(1)))
    with pytest.raises(ProtocolError):
        await store.pin([], 1)
    await store.aclose()


async def test_redis_refuses_what_is_not_whole(redis_urls: dict[str, str]) -> None:
    await flush(redis_urls["redis"])
    store = await open_store(redis_urls["redis"], LIMITS)
    key, data = blob()
    with pytest.raises(CorruptBlobError):
        await put(store, key, data[:-1] + bytes([data[-1] ^ 1]))
    assert await store.has([key]) == [False]
    assert await asyncio.gather(*(put(store, key, data) for _ in range(3))) != [False] * 3
    assert [r.checked async for r in store.scrub(False)] == [1]
    assert await store.delete([key]) == 1
    await store.aclose()
