"""Damage is found and mended from whoever has a whole copy, at once or little by little."""

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry
from s3_servers import bucket_store, memory_bucket
from store_samples import (
    MIB,
    Clock,
    blob,
    chain,
    digest,
    get,
    local_store,
    pages,
    put,
    query,
    served,
)

from kvferry.cluster.backends import FileBackend, MemoryBackend
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.mend import RemoteReplica, scrub_and_mend
from kvferry.cluster.repository import ListQuery, ScrubReport
from kvferry.cluster.scrubber import Scrubber
from kvferry.cluster.store import LocalStore
from kvferry.proto.keys import BlobKey


def spoil(root: Path, key: BlobKey) -> None:
    """Flip bytes of a blob's file."""
    (path,) = (root / "blobs").glob(f"*/{key.kind}-{key.page_key.hex()}*")
    with path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"damage")


async def reports(client: BlobStoreClient) -> tuple[set[str], dict[str, str]]:
    """(damaged, mended) of a scrub that repairs."""
    found: list[ScrubReport] = [r async for r in client.scrub(True)]
    mended: dict[str, str] = {}
    for report in found:
        mended |= report.mended
    return {key for r in found for key, _ in r.findings}, mended


async def test_a_replica_gives_what_it_has_whole(tmp_path: Path) -> None:
    made = pages(5)
    root, other_root = tmp_path / "r", tmp_path / "other"
    async with (
        local_store(FileBackend(other_root)) as other,
        served(other) as peer,
        local_store(FileBackend(root)) as store,
        served(store, replicas=[RemoteReplica(BlobStoreClient("127.0.0.1:1", timeout_s=1.0)),
                                RemoteReplica(peer)]) as client,
    ):  # fmt: skip
        for each in made:
            await put(store, *each)
        for each in made[:3]:
            await put(other, *each)
        spoil(other_root, made[2][0])
        for i in (1, 2, 3):
            spoil(root, made[i][0])
        damaged, mended = await reports(client)
        assert damaged == {str(made[i][0]) for i in (1, 2, 3)}
        assert mended == {str(made[1][0]): peer.address}
        assert await get(store, made[1][0]) == made[1][1]
        assert await store.has([made[2][0], made[3][0]]) == [False, False]
        assert (await store.lookup(query(chain(5)))).complete_pages == 2
        assert await reports(client) == (set(), {})


async def test_without_repair_nothing_changes(tmp_path: Path) -> None:
    key, data = blob()
    async with (
        local_store(MemoryBackend()) as other,
        served(other) as peer,
        local_store(FileBackend(tmp_path / "r")) as store,
        served(store, replicas=[RemoteReplica(peer)]) as client,
    ):
        await put(store, key, data)
        await put(other, key, data)
        spoil(tmp_path / "r", key)
        found = [r async for r in client.scrub(False)]
        assert [f for r in found for f in r.findings] == [(str(key), "corrupt")]
        assert await store.has([key]) == [True]
        assert (await store.stat()).quarantined == 0


async def test_a_scrub_is_no_use_of_a_blob(tmp_path: Path) -> None:
    """Else it would make everything the most recently used, and eviction blind."""
    clock = Clock()
    async with local_store(FileBackend(tmp_path / "r"), clock=clock) as store:
        for each in pages(3):
            await put(store, *each)
        clock.now += 6000
        before = [i.used_unix_s async for b in store.list(ListQuery()) for i in b]
        assert [r.checked async for r in store.scrub(True)] == [3]
        await store._write(store._core.room.maintain)
        assert [i.used_unix_s async for b in store.list(ListQuery()) for i in b] == before
        stat = await store.stat()
        assert stat.counters.get("gets", 0) == 0
        assert stat.counters["scrubbed"] == 3


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"kvferry_store_scrub_{name}", labels) or 0.0


async def test_a_background_scrub_finds_and_mends_and_says_so(tmp_path: Path) -> None:
    made = pages(4)
    registry = CollectorRegistry()
    async with (
        local_store(MemoryBackend()) as other,
        served(other) as peer,
        local_store(FileBackend(tmp_path / "r")) as store,
    ):
        for each in made:
            await put(store, *each)
            await put(other, *each)
        await other.delete([made[3][0]])
        spoil(tmp_path / "r", made[0][0])
        spoil(tmp_path / "r", made[3][0])
        scrubber = Scrubber(store, float(1 << 40), [RemoteReplica(peer)], registry, rest_s=0.01)
        running = asyncio.create_task(scrubber.run())
        for _ in range(500):
            if value(registry, "passes_total") >= 2:
                break
            await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert value(registry, "damaged_blobs_total", reason="corrupt") == 2
        assert value(registry, "mended_blobs_total") == 1
        assert value(registry, "bytes_total") >= sum(len(d) for _, d in made)
        assert value(registry, "last_pass_unix_s") > 0
        assert await get(store, made[0][0]) == made[0][1]
        assert await store.has([made[3][0]]) == [False]


async def test_a_slow_scrub_reads_little_at_a_time(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path / "r"), budget_bytes=200 * MIB) as store:
        for i in range(6):
            await put(store, *blob(digest(i), size=5 * MIB))
        found = [r async for r in store.scrub(False)]
        assert [r.checked for r in found] == [1, 2, 3, 4, 5, 6]
        assert all(5 * MIB < r.bytes < 6 * MIB for r in found)
        registry = CollectorRegistry()
        running = asyncio.create_task(Scrubber(store, 1000.0, [], registry).run())
        for _ in range(300):
            if value(registry, "bytes_total"):
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert value(registry, "bytes_total") < 6 * MIB
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_blob_keeps_its_end_when_it_is_mended(tmp_path: Path) -> None:
    key, data = blob()

    async def ends(store: LocalStore) -> list[int]:
        return [i.expires_unix_s async for b in store.list(ListQuery()) for i in b]

    async with (
        local_store(MemoryBackend()) as other,
        served(other) as peer,
        local_store(FileBackend(tmp_path / "r")) as store,
    ):
        await put(store, key, data, ttl_s=1000)
        await put(other, key, data)
        (before,) = await ends(store)
        spoil(tmp_path / "r", key)
        async for _ in scrub_and_mend(store, True, [RemoteReplica(peer)]):
            pass
        (after,) = await ends(store)
        assert abs(after - before) <= 2


async def test_a_scrub_broken_off_is_gone_on_with_after_a_restart(tmp_path: Path) -> None:
    made = [blob(digest(i), size=5 * MIB) for i in range(6)]
    read = []
    async with local_store(FileBackend(tmp_path / "r"), budget_bytes=100 * MIB) as store:
        for each in made:
            await put(store, *each)
        scrub = store.scrub(False)
        read += [(await anext(scrub)).checked for _ in range(4)]
        await scrub.aclose()  # type: ignore[attr-defined]
    for key, _ in made:
        spoil(tmp_path / "r", key)
    async with local_store(FileBackend(tmp_path / "r"), budget_bytes=100 * MIB) as store:
        scrub = store.scrub(False)
        first = [(await anext(scrub)).findings[0][0] for _ in range(2)]
        await scrub.aclose()  # type: ignore[attr-defined]
        assert set(first) == {str(key) for key, _ in made[4:]}
        again = [r async for r in store.scrub(False)]
        assert len({key for r in again for key, _ in r.findings}) == 6


async def test_what_comes_in_during_a_scrub_does_not_keep_it_from_its_end(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path / "r")) as store:
        for each in pages(3):
            await put(store, *each)
        scrub, checked = store.scrub(False), 0
        async for report in scrub:
            checked = report.checked
            await put(store, *blob(digest("new", checked)))
            assert checked <= 3
        assert checked == 3
        assert [r.checked async for r in store.scrub(False)] == [4]


async def test_a_bucket_is_mended_too_and_says_what_it_read() -> None:
    made = pages(3)
    bucket = memory_bucket()
    async with (
        local_store(MemoryBackend()) as other,
        served(other) as peer,
        bucket_store(bucket) as store,
        served(store, replicas=[RemoteReplica(peer)]) as client,
    ):
        for key, data in made:
            await put(store, key, data, ttl_s=1000)
            await put(other, key, data)
        (path,) = [e.path for e in await bucket.names(f"blobs/page/{made[1][0].page_key.hex()}")]
        whole = bytes(await bucket.get(path) or b"")
        await bucket.put(path, whole[:-50] + b"damage" + whole[-44:])
        found = [r async for r in client.scrub(True)]
        assert sum(r.bytes for r in found) == sum(len(data) for _, data in made)
        assert {k: v for r in found for k, v in r.mended.items()} == {str(made[1][0]): peer.address}
        assert await get(store, made[1][0]) == made[1][1]
        # Its end is in its name.
        (again,) = [e.path for e in await bucket.names(path.rpartition("/")[0])]
        assert abs(int(again.partition("@")[2]) - int(path.partition("@")[2])) <= 2
