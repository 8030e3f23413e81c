"""Quotas of namespaces: everyone evicts their own."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_samples import (
    MIB,
    Clock,
    blob,
    chain,
    digest,
    disk_bytes,
    local_store,
    pages,
    put,
    query,
    served,
    tail,
)

from kvferry.cluster.backends import FileBackend, MemoryBackend
from kvferry.cluster.quotas import FILE_NAME
from kvferry.cluster.repository import ListQuery, NamespaceStat
from kvferry.cluster.store import LocalStore
from kvferry.errors import ConfigError, ProtocolError, StoreFullError

BLOB = 100_000
OURS, THEIRS = 0xFFFF_0000_0000_0001, 7
FIVE = 5 * (BLOB + 500)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(clock: Clock) -> AsyncIterator[LocalStore]:
    async with local_store(MemoryBackend(), clock=clock) as made:
        yield made


def of(store_stat: object, tag: int) -> NamespaceStat:
    found = [use for use in store_stat.namespaces if use.tag == tag]  # type: ignore[attr-defined]
    return found[0] if found else NamespaceStat(tag=tag)


async def test_a_namespace_over_its_quota_evicts_its_own_oldest(
    store: LocalStore, clock: Clock
) -> None:
    theirs = [blob(digest("theirs", i), size=BLOB, namespace=THEIRS) for i in range(8)]
    for each in theirs:
        await put(store, *each)
    clock.now += 600
    assert await store.set_quota(OURS, "ours", FIVE) == 0
    ours = [blob(digest("ours", i), size=BLOB, namespace=OURS) for i in range(9)]
    for each in ours:
        assert await put(store, *each)
        clock.now += 60
    assert await store.has([key for key, _ in theirs]) == [True] * 8
    assert await store.has([key for key, _ in ours]) == [False] * 4 + [True] * 5
    stat = await store.stat()
    assert (of(stat, OURS).blobs, of(stat, OURS).quota_bytes) == (5, FIVE)
    assert of(stat, OURS).bytes <= FIVE
    assert of(stat, OURS).counters["evicted"] == 4
    assert of(stat, THEIRS).counters.get("evicted", 0) == 0
    assert (of(stat, THEIRS).blobs, of(stat, THEIRS).quota_bytes) == (8, 0)


async def test_what_is_staged_and_being_written_counts(store: LocalStore) -> None:
    await store.set_quota(OURS, "ours", FIVE)
    ours = [blob(digest(i), size=BLOB, namespace=OURS) for i in range(7)]
    for each in ours[:5]:
        await put(store, *each, stage=True)
    with pytest.raises(StoreFullError, match="quota of namespace ours"):
        await put(store, *ours[5])
    await store.commit([key for key, _ in ours[:5]])
    assert await put(store, *ours[5])
    results = await asyncio.gather(
        *(put(store, *blob(digest("at once", i), size=BLOB, namespace=OURS)) for i in range(8)),
        return_exceptions=True,
    )
    assert any(done is True for done in results)
    assert of(await store.stat(), OURS).bytes <= FIVE


async def test_the_beginning_of_a_chain_is_not_evicted_for_its_end(
    store: LocalStore, clock: Clock
) -> None:
    await store.set_quota(OURS, "ours", FIVE)
    stored = 0
    for each in pages(8, size=BLOB, namespace=OURS):
        clock.now += 60
        try:
            stored += await put(store, *each)
        except StoreFullError:
            continue
    assert stored == 5
    assert (await store.lookup(query(chain(8)))).complete_pages == 5
    assert of(await store.stat(), OURS).counters["refused_quota"] == 3


async def test_a_lower_quota_holds_at_once(store: LocalStore, clock: Clock) -> None:
    ours = [blob(digest(i), size=BLOB, namespace=OURS) for i in range(10)]
    for each in ours:
        await put(store, *each)
        clock.now += 60
    assert await store.set_quota(OURS, "ours", FIVE) == 5
    assert await store.has([key for key, _ in ours]) == [False] * 5 + [True] * 5
    assert await store.set_quota(OURS, "ours", 0) == 0
    assert await put(store, *blob(digest("x"), size=5 * BLOB, namespace=OURS))


async def test_leased_blobs_stay_and_others_are_refused(store: LocalStore, clock: Clock) -> None:
    ours = [blob(digest(i), size=BLOB, namespace=OURS) for i in range(5)]
    for each in ours:
        await put(store, *each)
    await store.pin([key for key, _ in ours], 1000)
    assert await store.set_quota(OURS, "ours", FIVE) == 0
    with pytest.raises(StoreFullError):
        await put(store, *blob(digest("x"), size=BLOB, namespace=OURS))
    assert await put(store, *blob(digest("y"), size=BLOB, namespace=THEIRS))
    assert await store.has([key for key, _ in ours]) == [True] * 5
    clock.now += 1001
    assert await put(store, *blob(digest("x"), size=BLOB, namespace=OURS))


async def test_what_has_ended_makes_room_first(store: LocalStore, clock: Clock) -> None:
    await store.set_quota(OURS, "ours", FIVE)
    live = [blob(digest(i), size=BLOB, namespace=OURS) for i in range(4)]
    for each in live:
        await put(store, *each)
    await put(store, *tail(digest("no page"), "t", size=BLOB, namespace=OURS), ttl_s=10)
    clock.now += 20
    assert await put(store, *blob(digest("new"), size=BLOB, namespace=OURS))
    assert await store.has([key for key, _ in live]) == [True] * 4
    counters = of(await store.stat(), OURS).counters
    assert (counters["expired"], counters.get("evicted", 0)) == (1, 0)


async def test_quotas_and_sums_survive_a_restart_and_a_lost_index(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with local_store(FileBackend(root)) as store:
        await store.set_quota(OURS, "ours", FIVE)
        for i in range(3):
            await put(store, *blob(digest(i), size=BLOB, namespace=OURS))
            await put(store, *blob(digest("t", i), size=BLOB, namespace=THEIRS))
            await put(store, *blob(digest("n", i), size=BLOB))
        before = [of(await store.stat(), tag) for tag in (OURS, THEIRS, 0)]
        assert [use.blobs for use in before] == [3, 3, 3]
    for lost in (False, True):
        if lost:
            for path in root.glob("index.sqlite*"):
                path.unlink()
        async with local_store(FileBackend(root)) as store:
            stat = await store.stat()
            after = [of(stat, tag) for tag in (OURS, THEIRS, 0)]
            assert [(u.blobs, u.bytes) for u in after] == [(u.blobs, u.bytes) for u in before]
            assert (of(stat, OURS).quota_bytes, of(stat, OURS).name) == (FIVE, "ours")
    async with local_store(FileBackend(root)) as store:
        for i in range(6):
            await put(store, *blob(digest("more", i), size=BLOB, namespace=OURS))
        stat = await store.stat()
        assert of(stat, OURS).bytes <= FIVE
        assert of(stat, THEIRS).blobs == 3
        await store.delete([i.key async for b in store.list(ListQuery()) for i in b])
        assert [use.blobs for use in (await store.stat()).namespaces if use.blobs] == []
        assert disk_bytes(root) < MIB


async def test_damaged_and_replaced_blobs_count_no_more(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path / "r")) as store:
        page, old = blob(namespace=OURS), tail(digest("page"), "old", 256, namespace=OURS)
        new = tail(digest("page"), "new", 256, namespace=OURS)
        await put(store, *page)
        await put(store, *old)
        assert of(await store.stat(), OURS).blobs == 2
        await put(store, *new, replaces=old[0])
        assert of(await store.stat(), OURS).blobs == 2
        store._core.set_aside(page[0], "corrupt")
        stat = of(await store.stat(), OURS)
        assert (stat.blobs, stat.counters["quarantined"]) == (1, 1)


async def test_a_damaged_file_of_quotas_is_not_taken_for_none(tmp_path: Path) -> None:
    root = tmp_path / "r"
    async with local_store(FileBackend(root)) as store:
        await store.set_quota(OURS, "ours", FIVE)
    value = json.loads((root / FILE_NAME).read_text())
    assert value["quotas"][f"{OURS:016x}"] == {"name": "ours", "bytes": FIVE}
    (root / FILE_NAME).write_text("{")
    with pytest.raises(ConfigError, match="quotas"):
        async with local_store(FileBackend(root)):
            pass


async def test_over_the_wire(store: LocalStore) -> None:
    async with served(store) as client:
        await put(store, *blob(namespace=OURS, size=BLOB))
        assert await client.set_quota(OURS, "ours", 1000) == 1
        stat = await client.stat()
        assert (of(stat, OURS).name, of(stat, OURS).quota_bytes) == ("ours", 1000)
        with pytest.raises(StoreFullError, match="quota of namespace ours"):
            await client.put(*blob(namespace=OURS, size=BLOB))
        with pytest.raises(ProtocolError, match="tag"):
            await client.set_quota(0, "nobody", 5)
        with pytest.raises(ProtocolError, match="at most"):
            await client.set_quota(1, "x", 1 << 63)
        listed = [i async for b in client.list() for i in b]
        assert listed == []
        await client.put(*blob(namespace=THEIRS))
        (info,) = [i async for b in client.list() for i in b]
        assert info.namespace_tag == THEIRS
