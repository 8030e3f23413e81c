"""The index can be lost, damaged or wrong; the files are what counts."""

import asyncio
import os
import sqlite3
from collections.abc import Callable
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
    get,
    local_store,
    pages,
    put,
    query,
    served,
    tail,
)

from kvferry.cluster.backends import FileBackend, open_backend
from kvferry.cluster.blob_name import blob_name, parse_blob_name
from kvferry.cluster.repository import ListQuery
from kvferry.errors import (
    BlobNotFoundError,
    ConfigError,
    CorruptBlobError,
    InvalidKeyError,
)
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

SAMPLES = [
    *pages(3, size=3000),
    blob(digest("halves"), layers=(0, 2)),
    blob(digest("halves"), layers=(2, 4)),
    blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION, codec="ferry"),
]
TAIL = tail(ROOT, "t")


async def fill(root: Path, clock: Clock) -> None:
    async with local_store(FileBackend(root), clock=clock) as store:
        for key, data in SAMPLES:
            await put(store, key, data)
        await put(store, *TAIL, ttl_s=1000)


async def check(root: Path, clock: Clock, rebuilt: bool = True) -> None:
    async with local_store(FileBackend(root), clock=clock) as store:
        for key, data in (*SAMPLES, TAIL):
            assert await get(store, key) == data
        assert (await store.lookup(query(chain(3)))).complete_pages == 3
        assert len((await store.lookup(query([]))).tails) == 1
        stat = await store.stat()
        assert (stat.blobs, stat.pages_complete, stat.quarantined) == (7, 4, 0)
        assert stat.counters.get("index_rebuilt", 0) == (1 if rebuilt else 0)
        clock.now += 1001
        assert (await store.lookup(query([]))).tails == []


def _garbage(index: Path) -> None:
    index.write_bytes(os.urandom(20_000))


def _cut(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2)


def _zeros_within(index: Path) -> None:
    with index.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(8192))


def _empty(index: Path) -> None:
    index.write_bytes(b"")


def _other_version(index: Path) -> None:
    db = sqlite3.connect(index)
    db.execute("PRAGMA user_version = 99")
    db.close()


def _other_tables(index: Path) -> None:
    index.unlink()
    db = sqlite3.connect(index)
    db.execute("CREATE TABLE something (a)")
    db.close()


@pytest.mark.parametrize(
    "spoil", [_garbage, _cut, _zeros_within, _empty, _other_version, _other_tables]
)
async def test_a_damaged_index_is_made_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    clock = Clock()
    await fill(tmp_path, clock)
    spoil(tmp_path / "index.sqlite")
    await check(tmp_path, clock)


async def test_a_lost_index_is_made_anew(tmp_path: Path) -> None:
    clock = Clock()
    await fill(tmp_path, clock)
    (tmp_path / "index.sqlite").unlink()
    await check(tmp_path, clock, rebuilt=False)


async def test_a_stale_log_beside_a_lost_index_does_no_harm(tmp_path: Path) -> None:
    clock = Clock()
    await fill(tmp_path, clock)
    (tmp_path / "index.sqlite").unlink()
    (tmp_path / "index.sqlite-wal").write_bytes(os.urandom(50_000))
    (tmp_path / "index.sqlite-shm").write_bytes(os.urandom(32_768))
    await check(tmp_path, clock, rebuilt=False)


async def test_an_index_damaged_while_it_is_used(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path)) as store, served(store) as client:
        for key, data in SAMPLES:
            await put(store, key, data)
        index = store._core.index._index
        assert index is not None
        with index._lock:
            index._db.execute("DROP TABLE blobs")
        results = await asyncio.gather(
            *(client.has([key]) for key, _ in SAMPLES), client.put(*blob(digest("new")))
        )
        assert results == [*([True] for _ in SAMPLES), True]
        assert (await store.stat()).counters["index_rebuilt"] == 1
        for key, data in SAMPLES:
            assert bytes(await client.get(key)) == data
        assert (await client.stat()).blobs == len(SAMPLES) + 1


async def test_use_order_outlives_the_index(tmp_path: Path) -> None:
    made = pages(3, "old") + pages(3, "new")
    async with local_store(FileBackend(tmp_path)) as store:
        for key, data in made:
            await put(store, key, data)
    for file in _files(tmp_path, "blobs/*/*"):
        name = parse_blob_name(file.name)[0]
        if name in [key for key, _ in made[:3]]:
            os.utime(file, (1_000_000, 1_000_000))
    (tmp_path / "index.sqlite").unlink()
    async with local_store(FileBackend(tmp_path)) as store:
        listed = [i.key async for b in store.list(ListQuery()) for i in b]
        assert listed == [made[i][0] for i in (2, 1, 0, 5, 4, 3)]


def _files(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern))


def _file_of(root: Path, key: BlobKey) -> Path:
    return root / "blobs" / key.page_key.hex()[:2] / blob_name(key)


@pytest.mark.parametrize("size", [500, 3 * MIB, 9 * MIB])
@pytest.mark.parametrize("at", [40, 400, -100, -1])
async def test_damage_on_disk_is_found_set_aside_and_counted(
    tmp_path: Path, size: int, at: int
) -> None:
    key, data = blob(size=size)
    async with local_store(FileBackend(tmp_path)) as store, served(store) as client:
        await put(store, key, data)
        path = _file_of(tmp_path, key)
        bad = bytearray(path.read_bytes())
        bad[at] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CorruptBlobError):
            await client.get(key)
        assert await client.has([key]) == [False]
        with pytest.raises(BlobNotFoundError):
            await client.get(key)
        stat = await client.stat()
        assert (stat.quarantined, stat.counters["quarantined"], stat.blobs) == (1, 1, 0)
        (kept,) = (tmp_path / "quarantine").iterdir()
        assert kept.read_bytes() == bad
        assert await client.put(key, data)
        assert bytes(await client.get(key)) == data


@pytest.mark.parametrize("cut", [0, 1, 11, 300, -1])
async def test_a_cut_file_is_set_aside(tmp_path: Path, cut: int) -> None:
    key, data = blob()
    async with local_store(FileBackend(tmp_path)) as store:
        await put(store, key, data)
        os.truncate(_file_of(tmp_path, key), cut % len(data))
        with pytest.raises(CorruptBlobError):
            await get(store, key)
        assert (await store.stat()).quarantined == 1
    async with local_store(FileBackend(tmp_path)) as store:
        assert (await store.stat()).quarantined == 1
        await put(store, key, data)
    os.truncate(_file_of(tmp_path, key), cut % len(data))
    async with local_store(FileBackend(tmp_path)) as store:
        assert await store.has([key]) == [False]
        assert (await store.stat()).quarantined == 2


async def test_a_lost_file_is_a_miss(tmp_path: Path) -> None:
    key, data = blob()
    async with local_store(FileBackend(tmp_path)) as store:
        await put(store, key, data)
        _file_of(tmp_path, key).unlink()
        with pytest.raises(BlobNotFoundError):
            await get(store, key)
        assert await store.has([key]) == [False]
        assert (await store.stat()).counters["lost"] == 1
        await put(store, key, data)
    _file_of(tmp_path, key).unlink()
    async with local_store(FileBackend(tmp_path)) as store:
        assert await store.has([key]) == [False]


async def test_foreign_and_misnamed_files_are_set_aside_at_a_rebuild(tmp_path: Path) -> None:
    good, other = blob(), blob(digest("other"))
    disagreeing = blob(layers=(0, 2), model=digest("another"))
    async with local_store(FileBackend(tmp_path)) as store:
        await put(store, *good)
    folder = _file_of(tmp_path, good[0]).parent
    (folder / "README").write_text("hello")
    (folder / blob_name(blob(layers=(0, 1))[0])).write_bytes(other[1])
    (folder / blob_name(blob(layers=(1, 2))[0])).write_bytes(b"KVFERRY\x01" + os.urandom(100))
    _file_of(tmp_path, disagreeing[0]).write_bytes(disagreeing[1])
    (folder / "page-..-..").write_bytes(b"")
    (tmp_path / "blobs" / "zz").mkdir()
    (tmp_path / "blobs" / "00").mkdir(exist_ok=True)
    (tmp_path / "blobs" / "00" / blob_name(blob(digest("q"))[0])).write_bytes(other[1])
    (folder / "a folder").mkdir()
    (tmp_path / "index.sqlite").unlink()
    async with local_store(FileBackend(tmp_path)) as store:
        stat = await store.stat()
        kept = await store.has([good[0], disagreeing[0]])
        assert sum(kept) == 1
        assert (stat.blobs, stat.quarantined, stat.counters["quarantined"]) == (1, 6, 6)


async def test_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    await fill(tmp_path, Clock())
    (tmp_path / "tmp" / "123-abc").write_bytes(b"x" * 1000)
    async with local_store(FileBackend(tmp_path)):
        assert list((tmp_path / "tmp").iterdir()) == []


async def test_staged_blobs_outlive_a_restart_until_their_time(tmp_path: Path) -> None:
    one, two = blob(), blob(digest("two"))
    async with local_store(FileBackend(tmp_path)) as store:
        await put(store, *one, stage=True)
        await put(store, *two, stage=True)
    old = tmp_path / "staged" / blob_name(two[0])
    os.utime(old, (1_000_000, 1_000_000))
    (tmp_path / "staged" / "nonsense").write_bytes(b"x")
    async with local_store(FileBackend(tmp_path)) as store:
        assert await store.has([one[0]]) == [False]
        assert await store.commit([one[0]]) == 1
        assert await get(store, one[0]) == one[1]
        with pytest.raises(BlobNotFoundError):
            await store.commit([two[0]])
        assert list((tmp_path / "staged").iterdir()) == []


async def test_a_commit_cut_short_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is taken to die after the journal and before the renames."""
    made = [blob(layers=(0, 2)), blob(layers=(2, 4))]
    async with local_store(FileBackend(tmp_path)) as store:
        for each in made:
            await put(store, *each, stage=True)

        def dies(self: FileBackend, journal: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(FileBackend, "_replay", dies)
            with pytest.raises(KeyboardInterrupt):
                store._core.commit([key for key, _ in made])
    assert len(_files(tmp_path, "commit-*.json")) == 1
    async with local_store(FileBackend(tmp_path)) as store:
        assert await store.has([key for key, _ in made]) == [True, True]
    assert _files(tmp_path, "commit-*.json") == []


async def test_a_foreign_journal_is_ignored(tmp_path: Path) -> None:
    await fill(tmp_path, Clock())
    (tmp_path / "commit-x.json").write_text("{ nonsense")
    async with local_store(FileBackend(tmp_path)) as store:
        assert (await store.stat()).blobs >= 6


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    async with local_store(FileBackend(tmp_path)):
        with pytest.raises(ConfigError, match="no other running"):
            async with local_store(FileBackend(tmp_path)):
                pass
    async with local_store(FileBackend(tmp_path)):
        pass


async def test_scrub_finds_damage_and_sets_it_aside_when_told(tmp_path: Path) -> None:
    made = [blob(digest(i), size=5000) for i in range(40)]
    async with local_store(FileBackend(tmp_path)) as store, served(store) as client:
        for each in made:
            await put(store, *each)
        flipped, cut = made[7][0], made[20][0]
        path = _file_of(tmp_path, flipped)
        bad = bytearray(path.read_bytes())
        bad[2000] ^= 1
        path.write_bytes(bad)
        os.truncate(_file_of(tmp_path, cut), 100)

        async def scrub(repair: bool) -> set[Any]:
            reports = [r async for r in client.scrub(repair)]
            assert (reports[-1].checked, reports[-1].total) == (reports[0].total,) * 2
            return {finding for report in reports for finding in report.findings}

        # A wrong length is seen when the file is opened, and set aside at once.
        assert await scrub(False) == {(str(flipped), "corrupt"), (str(cut), "corrupt")}
        assert await client.has([flipped, cut]) == [True, False]
        assert await scrub(True) == {(str(flipped), "corrupt")}
        assert await client.has([flipped]) == [False]
        assert await scrub(True) == set()


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "redis://h", "file://relative", "file:///", "file://host/x", "x", "", "memory"],
)
def test_engines_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="file:///PATH"):
        open_backend(url)


def test_engines_by_url() -> None:
    assert open_backend("file:///a%20b/c").url == "file:///a b/c"
    assert open_backend("memory://").index_path == ":memory:"


async def test_a_root_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="write"):
        async with local_store(FileBackend(tmp_path / "file")):
            pass


@pytest.mark.parametrize("expires", [0, 1_800_000_000])
@pytest.mark.parametrize("key", [key for key, _ in (*SAMPLES, TAIL)], ids=lambda k: k.kind)
def test_names_lead_back_to_keys(key: BlobKey, expires: int) -> None:
    name = blob_name(key, expires)
    assert "/" not in name
    assert len(name) < 250
    assert parse_blob_name(name) == (key, expires)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "page",
        "page-..",
        "calibration-" + "g" * 64,
        "calibration-" + "a" * 64 + "@",
        "calibration-" + "a" * 64 + "@0",
        "calibration-" + "a" * 64 + "@-5",
        "calibration-" + "a" * 64 + "@²",
        "calibration-" + "a" * 64 + "@" + "9" * 40,
        "page-" + "a" * 64 + "-L00-15-H0-3-raw.1-" + "a" * 16,
        "page-" + "A" * 64 + "-L0-15-H0-3-raw.1-" + "a" * 16,
        "page-" + "a" * 64 + "-L0-15-H0-3-raw.1-" + "a" * 16 + "-more",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidKeyError):
        parse_blob_name(name)
