"""A hard budget over the whole root, and who goes first when it is reached."""

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import (
    MIB,
    ROOT,
    Clock,
    blob,
    chain,
    digest,
    disk_bytes,
    get,
    local_store,
    pages,
    put,
    query,
    served,
    tail,
)

from kvferry.cluster.backends import FileBackend, MemoryBackend
from kvferry.cluster.repository import PutSpec
from kvferry.cluster.space import INDEX_SLACK_BYTES
from kvferry.cluster.store import LocalStore
from kvferry.errors import BlobTooLargeError, FerryError, QueueFullError, StoreFullError
from kvferry.proto.v1 import blob_pb2

BLOB = 100_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def small(clock: Clock) -> AsyncIterator[LocalStore]:
    """Ten blobs of `BLOB` bytes fit."""
    async with local_store(MemoryBackend(), clock=clock, budget_bytes=10 * (BLOB + 400)) as store:
        yield store


async def present(store: LocalStore, made: list[Any]) -> list[bool]:
    return await store.has([key for key, _ in made])


async def test_least_recently_used_goes_first(small: LocalStore, clock: Clock) -> None:
    made = [blob(digest(i), size=BLOB) for i in range(12)]
    for each in made[:10]:
        await put(small, *each)
        clock.now += 60
    await get(small, made[0][0])
    clock.now += 60
    await put(small, *made[10])
    await put(small, *made[11])
    assert await present(small, made) == [True, False, False, *[True] * 9]


async def test_a_lookup_is_a_use(small: LocalStore, clock: Clock) -> None:
    old, new = pages(5, "old", size=BLOB), pages(5, "new", size=BLOB)
    for each in old + new:
        await put(small, *each)
        clock.now += 60
    assert (await small.lookup(query(chain(5, "old")))).complete_pages == 5
    await put(small, *blob(digest("x"), size=BLOB))
    assert await present(small, old) == [True] * 5
    assert sum(await present(small, new)) == 4


async def test_a_chain_is_shortened_from_its_end(small: LocalStore, clock: Clock) -> None:
    for each in pages(5, "a", size=BLOB) + pages(5, "b", size=BLOB):
        await put(small, *each)
    for name in ("a", "b"):
        clock.now += 60
        assert (await small.lookup(query(chain(5, name)))).complete_pages == 5
    for i in range(3):
        await put(small, *blob(digest("x", i), size=BLOB))
    assert (await small.lookup(query(chain(5, "a")))).complete_pages == 2
    assert (await small.lookup(query(chain(5, "b")))).complete_pages == 5


async def test_a_chain_longer_than_the_budget_keeps_its_beginning(
    small: LocalStore, clock: Clock
) -> None:
    stored = 0
    for key, data in pages(15, size=BLOB):
        clock.now += 60
        try:
            stored += await put(small, key, data)
        except StoreFullError:
            continue
    assert stored == 10
    assert (await small.lookup(query(chain(15)))).complete_pages == 10


async def test_blobs_of_a_page_go_together(small: LocalStore, clock: Clock) -> None:
    halves = [blob(layers=part, size=BLOB) for part in ((0, 2), (2, 4))]
    for each in halves:
        await put(small, *each)
    clock.now += 60
    for i in range(9):
        await put(small, *blob(digest(i), size=BLOB))
    assert await present(small, halves) == [False, False]


async def test_calibrations_go_last(small: LocalStore, clock: Clock) -> None:
    calibration = blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION, size=BLOB)
    await put(small, *calibration)
    for i in range(30):
        clock.now += 60
        await put(small, *blob(digest(i), size=BLOB))
    assert await present(small, [calibration]) == [True]


async def test_leased_blobs_stay_until_the_lease_ends(small: LocalStore, clock: Clock) -> None:
    made = [blob(digest(i), size=BLOB) for i in range(10)]
    for each in made:
        await put(small, *each)
    lease, held = await small.pin([key for key, _ in made], 100)
    assert held == 10
    with pytest.raises(StoreFullError):
        await put(small, *blob(digest("x"), size=BLOB))
    assert await present(small, made) == [True] * 10
    await small.unpin(lease)
    assert await put(small, *blob(digest("x"), size=BLOB))
    rest = [
        key
        for key, there in zip([k for k, _ in made], await present(small, made), strict=True)
        if there
    ]
    await small.pin([*rest, blob(digest("x"))[0]], 100)
    clock.now += 101
    assert await put(small, *blob(digest("y"), size=BLOB))


async def test_leases_cannot_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.cluster.index.MAX_LEASES", 50)
    async with local_store(MemoryBackend()) as store:
        key, data = blob()
        await put(store, key, data)

        async def pin_many() -> None:
            for _ in range(51):
                await store.pin([key], 1000)

        with pytest.raises(QueueFullError):
            await pin_many()


async def test_expired_and_damaged_go_before_live_ones(small: LocalStore, clock: Clock) -> None:
    live = [blob(digest(i), size=BLOB) for i in range(8)]
    for each in live:
        await put(small, *each)
    clock.now += 60
    await put(small, *tail(ROOT, "t", size=BLOB), ttl_s=10)
    bad = blob(digest("bad"), size=BLOB)
    await put(small, *bad)
    small._core.set_aside(bad[0], "corrupt")
    assert (await small.stat()).quarantined == 1
    clock.now += 60
    for i in range(2):
        await put(small, *blob(digest("new", i), size=BLOB))
    assert await present(small, live) == [True] * 8
    assert (await small.stat()).quarantined == 0


async def test_what_can_never_fit_is_refused_at_once_and_evicts_nothing(small: LocalStore) -> None:
    made = [blob(digest(i), size=BLOB) for i in range(10)]
    for each in made:
        await put(small, *each)
    with pytest.raises(StoreFullError):
        await put(small, *blob(digest("x"), size=11 * BLOB))
    assert await present(small, made) == [True] * 10


async def test_blobs_beyond_the_cap_are_refused() -> None:
    async with local_store(MemoryBackend(), max_blob_bytes=1000) as store:
        with pytest.raises(BlobTooLargeError):
            await put(store, *blob(size=2000))


async def test_a_store_that_is_full_of_writes_under_way_says_so(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path / "r"), budget_bytes=16 * MIB) as store:
        key, data = blob(digest("a"), size=10 * MIB)
        session = await store.open_put(PutSpec(key=key, size=len(data)))
        assert session is not None
        await session.write(data[: 5 * MIB])
        for _ in range(500):
            if (await store.stat()).in_flight_bytes:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(StoreFullError):
            await put(store, *blob(digest("b"), size=10 * MIB))
        await session.abort()
        assert (await store.stat()).in_flight_bytes == 0
        assert await put(store, *blob(digest("c"), size=10 * MIB))


@pytest.mark.slow
async def test_disk_never_exceeds_the_budget_with_many_writers(tmp_path: Path) -> None:
    root, budget = tmp_path / "root", 6 * MIB
    most = 0
    running = True

    def look(store: LocalStore) -> int:
        # Nothing is evicted meanwhile: what goes and what comes must not both be counted.
        with store._core.room.lock:
            return disk_bytes(root)

    async def watch(store: LocalStore) -> None:
        nonlocal most
        while running:
            most = max(most, await asyncio.to_thread(look, store))
            await asyncio.sleep(0)

    async with (
        local_store(FileBackend(root), budget_bytes=budget) as store,
        served(store) as client,
    ):
        watcher = asyncio.create_task(watch(store))

        async def write(worker: int) -> int:
            refused = 0
            for i in range(25):
                key, data = blob(digest(worker, i), size=20_000 + 30_000 * ((worker * i) % 7))
                try:
                    await client.put(key, data, stage=i % 5 == 4)
                except StoreFullError:
                    refused += 1
            return refused

        refused = sum(await asyncio.gather(*(write(w) for w in range(6))))
        running = False
        await watcher
        stat = await store.stat()
        assert stat.bytes <= budget
        assert stat.in_flight_bytes == 0
        assert stat.blobs > 10
        assert stat.counters["evicted"] > 0
        assert refused < 150
    assert most <= budget
    assert most > budget // 2


async def test_the_sums_are_those_of_the_disk(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with local_store(FileBackend(root)) as store:
        made = [blob(digest(i), size=1000 + 9000 * i) for i in range(20)]
        for i, each in enumerate(made):
            await put(store, *each, stage=i % 4 == 3, ttl_s=100 if i % 3 == 0 else 0)
        await store.delete([key for key, _ in made[:5]])
        store._core.set_aside(made[6][0], "corrupt")
        stat = await store.stat()
        assert abs(stat.bytes - INDEX_SLACK_BYTES - disk_bytes(root)) < 40_000
    async with local_store(FileBackend(root)) as store:
        again = await store.stat()
        assert (again.blobs, again.quarantined) == (stat.blobs, stat.quarantined)
        assert abs(again.bytes - stat.bytes) < 600_000


async def test_a_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    made = [blob(digest(i), size=200_000) for i in range(20)]
    async with local_store(FileBackend(tmp_path / "r")) as store:
        for each in made:
            await put(store, *each)
    async with local_store(FileBackend(tmp_path / "r"), budget_bytes=2 * MIB) as store:
        stat = await store.stat()
        assert stat.bytes <= 2 * MIB
        assert 1 <= stat.blobs < 10
    assert disk_bytes(tmp_path / "r") <= 2 * MIB


async def test_the_reserve_of_the_disk_is_left_alone_and_the_store_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free space is what this test says; everything else is real."""
    free = 10 * MIB
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    async with (
        local_store(FileBackend(tmp_path / "r"), reserve_bytes=8 * MIB) as store,
        served(store) as client,
    ):
        assert await client.put(*blob(digest("a"), size=MIB))
        free = 8 * MIB
        with pytest.raises(StoreFullError):
            await client.put(*blob(digest("b"), size=3 * MIB))
        assert await client.has([blob(digest("a"))[0]]) == [True]
        free = 20 * MIB
        assert await client.put(*blob(digest("b"), size=3 * MIB))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_fails_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The write call fails as the kernel would make it; everything else is real."""
    real = os.write
    failing = True

    def write(handle: int, data: memoryview) -> int:
        if failing and len(data) > 100_000:
            raise OSError(code, os.strerror(code))
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    root = tmp_path / "r"
    async with local_store(FileBackend(root)) as store, served(store) as client:
        key, data = blob(size=MIB)
        with pytest.raises(FerryError) as found:
            await client.put(key, data)
        wanted = "full" if code in (errno.ENOSPC, errno.EDQUOT) else "unavailable"
        assert found.value.reason == wanted
        assert await client.has([key]) == [False]
        assert (await store.stat()).in_flight_bytes == 0
        assert list((root / "tmp").iterdir()) == []
        failing = False
        assert await client.put(key, data)
        assert bytes(await client.get(key)) == data


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB of its own."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=False)


async def test_a_real_full_disk(tiny_disk: Path) -> None:
    """The budget is far beyond what the disk has."""
    async with local_store(FileBackend(tiny_disk / "r")) as store, served(store) as client:
        stored = []
        (tiny_disk / "filler").write_bytes(b"x" * MIB)
        for i in range(8):
            key, data = blob(digest(i), size=900_000)
            assert await client.put(key, data)
            stored.append((key, data))
        assert (await store.stat()).counters["evicted"] > 0
        with pytest.raises(StoreFullError):
            await client.put(*blob(digest("big"), size=7 * MIB))
        key, data = stored[-1]
        assert bytes(await client.get(key)) == data
        (tiny_disk / "filler").unlink()
        assert await client.put(*blob(digest("after"), size=900_000))
