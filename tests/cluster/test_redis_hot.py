"""Redis before a store: quicker when it is there, never wrong when it is not."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis_servers import Cluster, Redis, flush, one_redis, redis_cluster
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
    tail,
)

from kvferry.cluster.backends import FileBackend
from kvferry.cluster.redis.hot import HotOptions, HotStore
from kvferry.cluster.redis.link import RedisLink
from kvferry.cluster.redis.url import parse_redis_url
from kvferry.cluster.repository import TierStat
from kvferry.cluster.store import LocalStore
from kvferry.errors import BlobNotFoundError, ConfigError
from kvferry.proto.keys import BlobKey

BOTH = HotOptions(on_put=True)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with one_redis(tmp_path_factory.mktemp("one")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_cluster(tmp_path_factory.mktemp("three")) as servers:
        yield servers


@pytest.fixture
async def url(redis: Redis) -> str:
    await flush(redis.url)
    return redis.url


@asynccontextmanager
async def hot(
    root: Path, url: str, options: HotOptions = BOTH, **link: object
) -> AsyncIterator[tuple[HotStore, LocalStore]]:
    """(the store behind Redis, the store without it)."""
    async with local_store(FileBackend(root)) as cold:
        made = RedisLink(url, **{"timeout_s": 10.0, **link})  # type: ignore[arg-type]
        store = HotStore(cold, made, options)
        try:
            yield store, cold
        finally:
            await store.aclose()


async def settled(store: HotStore) -> TierStat:
    """The tier's counts, once nothing is on its way to it any more."""
    await store._fills.wait()
    return (await store.stat()).tiers[0]


async def source(store: HotStore, key: object) -> str:
    session = await store.open_get(key)  # type: ignore[arg-type]
    async for _ in session.chunks:
        pass
    return session.source


async def test_what_was_put_is_read_from_redis(tmp_path: Path, url: str) -> None:
    key, data = blob(size=3 * MIB)
    async with hot(tmp_path / "r", url) as (store, _), served(store) as client:
        await client.put(key, data)
        await settled(store)
        assert bytes(await client.get(key)) == data
        session = await client.open_get(key)
        assert (session.source, session.size) == ("hot", len(data))
        tier = await settled(store)
        assert (tier.name, tier.counters["fills"]) == ("redis", 1)
        assert tier.counters["hits"] >= 1


async def test_what_was_read_is_kept_for_the_next_reader(tmp_path: Path, url: str) -> None:
    key, data = blob(size=MIB)
    options = HotOptions(on_read=True, on_put=False)
    async with hot(tmp_path / "r", url, options) as (store, _):
        await put(store, key, data)
        assert [await source(store, key), (await settled(store)).counters["misses"]] == ["store", 1]
        assert await source(store, key) == "hot"
        assert await get(store, key) == data
    async with hot(tmp_path / "r", url, HotOptions(on_read=False)) as (store, _):
        other = blob(digest("other"))
        await put(store, *other)
        assert [await source(store, other[0]) for _ in range(2)] == ["store", "store"]
        assert await source(store, key) == "hot"  # by another store's reading


async def test_a_cluster_of_three_masters_shares_the_blobs(
    tmp_path: Path, cluster: Cluster
) -> None:
    made = pages(40)
    async with hot(tmp_path / "r", cluster.url) as (store, cold):
        for key, data in made:
            await put(store, key, data)
        assert (await settled(store)).counters["fills"] == len(made)
        for key, data in made:
            assert await get(store, key) == data
        assert (await store.lookup(query(chain(40)))).complete_pages == 40
        assert (await store.stat()).tiers[0].counters["hits"] == len(made)
        assert "gets" not in (await cold.stat()).counters
        assert await store.delete([key for key, _ in made[:30]]) == 30
    for member in cluster.members:
        assert member.ask("DBSIZE") > 0
    assert sum(member.ask("DBSIZE") for member in cluster.members) == 10


async def test_deleted_is_gone_from_both(tmp_path: Path, url: str, redis: Redis) -> None:
    key, data = blob()
    async with hot(tmp_path / "r", url) as (store, _):
        await put(store, key, data)
        await settled(store)
        assert redis.ask("DBSIZE") == 1
        assert await store.delete([key]) == 1
        assert redis.ask("DBSIZE") == 0
        with pytest.raises(BlobNotFoundError):
            await get(store, key)


async def test_what_another_process_deleted_is_not_served(tmp_path: Path, url: str) -> None:
    """Redis has it still: whoever deleted it did not know of Redis."""
    key, data = blob()
    async with hot(tmp_path / "r", url) as (store, cold):
        await put(store, key, data)
        await settled(store)
        await cold.delete([key])
        with pytest.raises(BlobNotFoundError):
            await get(store, key)
        assert (await settled(store)).counters["stale"] == 1


async def test_what_has_ended_is_not_served(tmp_path: Path, redis: Redis, url: str) -> None:
    key, data = tail(ROOT, "t")
    async with hot(tmp_path / "r", url) as (store, _):
        await put(store, key, data, ttl_s=4)
        await settled(store)
        assert await source(store, key) == "hot"
        assert 0 < redis.ask("PTTL", redis.ask("KEYS", "*")[0]) <= 4000
        await asyncio.sleep(4.1)
        assert await store.has([key]) == [False]
        with pytest.raises(BlobNotFoundError):
            await get(store, key)
    assert redis.ask("DBSIZE") == 0


async def test_damaged_values_are_dropped_and_the_store_is_read(
    tmp_path: Path, url: str, redis: Redis
) -> None:
    made = [blob(digest(i)) for i in range(3)]
    async with hot(tmp_path / "r", url) as (store, _):
        for each in made:
            await put(store, *each)
        await settled(store)
        names = {bytes(name).split(b"-")[1]: name for name in redis.ask("KEYS", "*")}
        first, second, third = (names[key.page_key.hex().encode()] for key, _ in made)
        redis.ask("SETRANGE", first, 200, b"damage")
        redis.ask("SET", second, redis.ask("GET", third))  # whole, and another page's
        redis.ask("SET", third, b"nonsense")
        for key, data in made:
            assert await get(store, key) == data
        tier = await settled(store)
        assert tier.counters["failed_corrupt"] == 2
        assert tier.counters["failed_identity"] == 1
        for key, data in made:  # filled anew
            assert await get(store, key) == data
        assert (await settled(store)).counters["hits"] == 3


async def test_without_redis_it_is_the_store(tmp_path: Path) -> None:
    made = pages(5)
    async with hot(tmp_path / "r", "redis://127.0.0.1:1") as (store, _), served(store) as client:
        for key, data in made:
            assert await client.put(key, data)
            assert bytes(await client.get(key)) == data
        assert (await client.lookup(query(chain(5)))).complete_pages == 5
        assert await client.delete([made[0][0]]) == 1
        tier = (await client.stat()).tiers[0]
        assert not tier.healthy
        assert tier.counters["failed_unavailable"] >= 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_redis_goes_away_and_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    made = pages(6)
    key, data = made[0]
    with one_redis(tmp_path) as server:
        async with hot(tmp_path / "r", server.url, timeout_s=0.5) as (store, _):
            for each in made:
                await put(store, *each)
            await settled(store)
            assert await source(store, key) == "hot"
            server.send(number)
            assert await store.delete([made[5][0]]) == 1
            for i in range(20):
                assert await get(store, made[i % 5][0]) == made[i % 5][1]
            tier = (await store.stat()).tiers[0]
            assert not tier.healthy
            # The breaker asks far less often than it is asked.
            reasons = ("failed_unavailable", "failed_timeout")
            assert 2 <= sum(tier.counters.get(r, 0) for r in reasons) < 60
            if number is signal.SIGKILL:
                server.stop()
                server.start()
            else:
                server.send(signal.SIGCONT)
            upkeep = asyncio.create_task(store.run_maintenance(0.1))
            for _ in range(200):
                if (await store.stat()).tiers[0].healthy and await source(store, key) == "hot":
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("redis is not used again")
            assert await get(store, key) == data
            for _ in range(100):
                if not store._fills._debts:
                    break
                await asyncio.sleep(0.1)
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            name = f"kvferry:page-{made[5][0].page_key.hex()}*"
            assert server.ask("KEYS", name) == []


async def test_a_budget_is_redis_own_limit_and_it_evicts(tmp_path: Path) -> None:
    budget = 6 * MIB
    made = [blob(digest(i), size=MIB // 2) for i in range(30)]
    with one_redis(tmp_path) as server:
        async with hot(tmp_path / "r", server.url, budget_bytes=budget) as (store, _):
            for each in made:
                await put(store, *each)
                await settled(store)
            assert int(server.setting("maxmemory")) == budget
            assert server.setting("maxmemory-policy") == "allkeys-lru"
            told = await store._link.info()
            assert 0 < told.keys < 12
            assert told.evicted > 15
            assert told.used_bytes <= budget + 200_000
            for key, data in made:
                assert await get(store, key) == data


async def test_redis_that_may_neither_be_told_nor_evict_is_full(tmp_path: Path) -> None:
    """As a server of somebody else's is set up."""
    options = ("--maxmemory", "3mb", "--rename-command", "CONFIG", "")
    with one_redis(tmp_path, *options) as server:
        async with hot(tmp_path / "r", server.url, budget_bytes=MIB) as (store, _):
            for i in range(8):
                each = blob(digest(i), size=MIB // 2)
                await put(store, *each)
                await settled(store)
                assert await get(store, each[0]) == each[1]
            tier = await settled(store)
            assert tier.healthy
            assert tier.counters["budget_refused"] == 1
            assert tier.counters["failed_full"] >= 1


async def test_large_blobs_do_not_go_there(tmp_path: Path, url: str, redis: Redis) -> None:
    key, data = blob(size=200_000)
    options = HotOptions(on_put=True, max_value_bytes=100_000)
    async with hot(tmp_path / "r", url, options, max_value_bytes=100_000) as (store, _):
        await put(store, key, data)
        assert [await source(store, key) for _ in range(2)] == ["store", "store"]
        await settled(store)
        assert redis.ask("DBSIZE") == 0
        # A value beyond the cap, by somebody else's doing, is not read as a whole.
        name = f"kvferry:{str(key).replace('/', '-')}"
        redis.ask("SET", name, data)
        assert await get(store, key) == data
        assert (await settled(store)).counters["failed_too_large"] == 1


async def test_parts_of_blobs_come_from_the_store(tmp_path: Path, url: str) -> None:
    key, data = blob()
    async with hot(tmp_path / "r", url) as (store, _):
        await put(store, key, data)
        await settled(store)
        session = await store.open_get(key, 10, 20)
        assert session.source == "store"
        assert b"".join([bytes(chunk) async for chunk in session.chunks]) == data[10:30]


async def test_a_read_that_is_broken_off_keeps_nothing_and_no_room(
    tmp_path: Path, url: str, redis: Redis
) -> None:
    key, data = blob(size=20 * MIB)
    async with hot(tmp_path / "r", url, HotOptions(on_read=True)) as (store, _):
        await put(store, key, data)
        session = await store.open_get(key)
        chunks = session.chunks
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        await settled(store)
        assert store._fills._bytes == 0
        assert redis.ask("DBSIZE") == 0
        assert await get(store, key) == data
        await settled(store)
        assert (redis.ask("DBSIZE"), store._fills._bytes) == (1, 0)


async def test_damage_in_the_store_is_mended_from_redis(tmp_path: Path, url: str) -> None:
    made = [*pages(4), tail(ROOT, "t")]
    async with hot(tmp_path / "r", url) as (store, cold), served(store) as client:
        for key, data in made[:4]:
            await client.put(key, data)
        await client.put(*made[4], ttl_s=1000)
        await settled(store)
        for part in ("page", "tail"):
            path = next((tmp_path / "r" / "blobs").glob(f"*/{part}-*"))
            with path.open("r+b") as file:
                file.seek(-100, 2)
                file.write(b"damage")
        found = [r async for r in client.scrub(False)]
        assert len([f for r in found for f in r.findings]) == 2
        assert not any(r.mended for r in found)
        repaired = [r async for r in client.scrub(True)]
        assert len({key for r in repaired for key in r.mended}) == 2
        again = [r async for r in client.scrub(False)]
        assert [f for r in again for f in r.findings] == []
        assert (again[-1].checked, (await client.stat()).quarantined) == (5, 2)
        for key, data in made:
            assert await get(cold, key) == data
        (mended,) = [i async for b in client.list() for i in b if i.key == made[4][0]]
        assert mended.expires_unix_s > 0


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1", "redis://h:1"),
        ("redis://h", "redis://h:6379"),
        ("redis://u:p%40ss@h:7/2", "redis://h:7/2"),
        ("rediss://:secret@h:1", "rediss://h:1"),
        ("redis+cluster://:x@a:1,b:2,[::1]:3", "redis+cluster://a:1,b:2,::1:3"),
    ],
)
def test_addresses_are_shown_without_passwords(url: str, shown: str) -> None:
    parsed = parse_redis_url(url)
    assert str(parsed) == shown
    assert "secret" not in repr(parsed)
    if "p%40ss" in url:
        assert (parsed.user, parsed.password, parsed.db) == ("u", "p@ss", 2)


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://h:0", "redis://h:99999", "redis://a:1,b:2", "redis+cluster://a:1/3",
     "http://h:1", "redis://:hunter2@h:x", "redis://h:1/x"],
)  # fmt: skip
def test_bad_addresses_are_refused_and_passwords_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_redis_url(url)
    assert "hunter2" not in str(found.value)


async def test_a_cluster_that_loses_a_master_costs_time_only(tmp_path: Path) -> None:
    made = pages(30)
    with redis_cluster(tmp_path) as servers:
        async with hot(tmp_path / "r", servers.url, timeout_s=1.0) as (store, _):
            for each in made:
                await put(store, *each)
            await settled(store)
            servers.members[1].stop()
            for key, data in made:
                assert await get(store, key) == data
            tier = (await store.stat()).tiers[0]
            assert sum(n for name, n in tier.counters.items() if name.startswith("failed_")) >= 1
            assert await store.delete([key for key, _ in made]) == len(made)
            for key, _ in made:
                with pytest.raises(BlobNotFoundError):
                    await get(store, key)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_befalls_redis_reads_are_right(
    tmp_path: Path, url: str, redis: Redis, seed: int
) -> None:
    """A store of two processes' doing, and a Redis to which anything may happen."""
    chance = random.Random(seed)
    made = [blob(digest(seed, i), size=chance.randrange(1, 40_000)) for i in range(12)]
    other = RedisLink(url, timeout_s=10.0)
    held: dict[BlobKey, bytes] = {}
    async with hot(tmp_path / "r", url) as (store, cold):
        for _ in range(250):
            key, data = chance.choice(made)
            what = chance.choice(("put", "read", "read", "read", "delete", "behind", "redis"))
            if what == "put":
                await put(store, key, data)
                held[key] = data
            elif what == "delete":
                assert await store.delete([key]) == (key in held)
                held.pop(key, None)
            elif what == "behind":  # by another process, which knows no Redis
                await cold.delete([key])
                held.pop(key, None)
            elif what == "redis":
                names = redis.ask("KEYS", "kvferry:*")
                name = chance.choice(names) if names else b"kvferry:nonsense"
                befalls = chance.choice(("damage", "flush", "foreign", "late"))
                if befalls == "damage":
                    redis.ask("SETRANGE", name, chance.randrange(1000), b"\xff\x00\xff")
                elif befalls == "flush":
                    redis.ask("FLUSHALL")
                elif befalls == "foreign":
                    redis.ask("SET", name, made[0][1])
                else:  # a value that was deleted comes back
                    await other.put(key, data)
            elif key in held:
                assert await get(store, key) == held[key]
            else:
                with pytest.raises(BlobNotFoundError):
                    await get(store, key)
        await settled(store)
        assert store._fills._bytes == 0
        assert (await store.stat()).tiers[0].counters["hits"] > 5
    await other.aclose()
