"""What the one server that sweeps does: expiry, age, budget, leases, mending."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from s3_servers import bucket_store, memory_bucket
from store_samples import ROOT, Clock, blob, chain, digest, get, pages, put, query, tail

from kvferry.cluster.bucket.claim import BucketClaim
from kvferry.cluster.bucket.layout import page_marker
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.store import BucketStore
from kvferry.errors import StoreFullError
from kvferry.proto.v1 import blob_pb2

BLOB = 100_000
ROOM_FOR_TEN = 10 * (BLOB + 400)


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def bucket() -> Bucket:
    return memory_bucket()


@pytest.fixture
async def store(bucket: Bucket, clock: Clock) -> AsyncIterator[BucketStore]:
    async with bucket_store(bucket, clock=clock, budget_bytes=ROOM_FOR_TEN) as opened:
        opened._turn = BucketClaim(bucket, clock, settle_s=0.0)
        yield opened


async def test_the_least_recently_used_go_first_and_a_chain_from_its_end(
    store: BucketStore, clock: Clock
) -> None:
    old, new = pages(5, "old", size=BLOB), pages(5, "new", size=BLOB)
    for each in old + new:
        await put(store, *each)
        clock.now += 60
    clock.now += 600
    assert (await store.lookup(query(chain(5, "old")))).complete_pages == 5
    clock.now += 60
    store.changes.room._totals.bytes = 0  # as a server that knows nothing of the others' puts
    await put(store, *blob(digest("x"), size=BLOB))
    assert await store.sweep()
    assert (await store.lookup(query(chain(5, "old")))).complete_pages == 5
    assert (await store.lookup(query(chain(5, "new")))).complete_pages < 5
    stat = await store.stat()
    assert stat.bytes <= stat.budget_bytes
    assert stat.counters["evicted"] >= 1


async def test_a_bucket_that_is_full_says_so_and_recovers(store: BucketStore, clock: Clock) -> None:
    for i in range(11):
        await put(store, *blob(digest(i), size=BLOB))
    with pytest.raises(StoreFullError):
        await put(store, *blob(digest("refused"), size=BLOB))
    clock.now += 61
    assert await store.sweep()
    assert await put(store, *blob(digest("later"), size=BLOB))


async def test_what_nobody_used_for_long_goes_and_calibrations_stay(
    bucket: Bucket, clock: Clock
) -> None:
    calibration = blob(digest("c"), kind=blob_pb2.BLOB_KIND_CALIBRATION)
    async with bucket_store(bucket, clock=clock, max_age_s=3600) as store:
        store._turn = BucketClaim(bucket, clock, settle_s=0.0)
        for each in [calibration, *pages(2, "used"), *pages(2, "idle")]:
            await put(store, *each)
        await store.sweep()
        clock.now += 3000
        await store.lookup(query(chain(2, "used")))
        await store.sweep()
        clock.now += 1000
        await store.sweep()
        assert (await store.lookup(query(chain(2, "used")))).complete_pages == 2
        assert (await store.lookup(query(chain(2, "idle")))).complete_pages == 0
        assert await store.has([calibration[0]]) == [True]


async def test_leased_blobs_stay_whoever_leased_them(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    made = [blob(digest(i), size=BLOB) for i in range(10)]
    for each in made:
        await put(store, *each)
        clock.now += 60
    async with bucket_store(Bucket(bucket._store, "other", prefix="some/where")) as other:
        other.clock = clock
        lease, held = await other.pin([key for key, _ in made[:3]], 1000)
        assert held == 3
        store.changes.room._totals.bytes = 0
        for i in range(3):
            await put(store, *blob(digest("new", i), size=BLOB))
        clock.now += 60
        assert await store.sweep()
        assert await store.has([key for key, _ in made[:4]]) == [True, True, True, False]
        assert await store.unpin(lease)
        assert not await other.unpin(lease)


async def test_what_has_ended_is_deleted_and_so_is_its_marker(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    await put(store, *blob(size=500), ttl_s=10)
    await put(store, *tail(ROOT, "t"), ttl_s=10)
    await put(store, *blob(digest("waits"), size=500), stage=True)
    clock.now += 700
    assert await store.sweep()
    for folder in ("blobs", "pages", "tails", "staged"):
        assert await bucket.names(folder) == []


async def test_a_page_whose_writer_died_before_its_marker_is_mended(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    for each in pages(2):
        await put(store, *each)
    await bucket.delete([page_marker(chain(2)[0])])
    store.units.forget(next(iter(store.units._known._held)))
    await bucket.delete([e.path for e in await bucket.names(f"blobs/page/{chain(2)[1].hex()}")])
    clock.now += 120
    assert await store.sweep()
    found = [entry.path for entry in await bucket.names("pages")]
    assert found == [page_marker(chain(2)[0])]
    assert store.counters["markers_mended"] == 1
    assert store.counters["markers_removed"] == 1
    assert (await store.lookup(query(chain(2)))).complete_pages == 1


async def test_a_reader_never_sees_a_complete_page_without_its_blobs(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    """While pages are evicted, a lookup that asks the bucket and finds one finds its blobs,
    or a blob that is gone between the two is a miss."""
    for i in range(9):
        await put(store, *blob(digest(i), layers=(0, 2), size=BLOB // 2))
        await put(store, *blob(digest(i), layers=(2, 4), size=BLOB // 2))
    order: list[str] = []
    real = bucket.delete

    async def delete(paths: list[str]) -> None:
        order.extend(paths)
        await real(paths)

    bucket.delete = delete  # type: ignore[assignment,method-assign]
    gone = await store.units.load(next(iter(await _units(store))))
    await store.changes.remove(next(iter(await _units(store))), gone)
    blobs = [i for i, path in enumerate(order) if path.startswith("blobs/")]
    markers = [i for i, path in enumerate(order) if path.startswith("pages/")]
    assert len(blobs) == 2
    assert min(markers) < min(blobs)


async def _units(store: BucketStore) -> list:  # type: ignore[type-arg]
    from kvferry.cluster.bucket.layout import UnitKey

    return [UnitKey("page", digest(0))]


async def test_one_of_two_sweeps_and_the_other_takes_over(bucket: Bucket, clock: Clock) -> None:
    one, two = (BucketClaim(bucket, clock, ttl_s=60, settle_s=0.05) for _ in range(2))
    assert sorted(await asyncio.gather(one.mine(), two.mine())) == [False, True]
    first, other = (one, two) if await one.mine() else (two, one)
    assert await first.mine()
    assert not await other.mine()
    clock.now += 61
    assert await other.mine()
    assert not await first.mine()
    await first.give_up()
    assert await other.mine()
    await other.give_up()
    assert await first.mine()


async def test_a_claim_from_a_clock_far_ahead_keeps_nobody_from_it(
    bucket: Bucket, clock: Clock
) -> None:
    ahead = BucketClaim(bucket, lambda: clock.now + 10**9, settle_s=0.0)
    assert await ahead.mine()
    assert await BucketClaim(bucket, clock, settle_s=0.0).mine()


async def test_uses_survive_their_server_and_reach_the_one_that_sweeps(
    bucket: Bucket, clock: Clock
) -> None:
    async with bucket_store(bucket, clock=clock) as store:
        for each in pages(3):
            await put(store, *each)
    assert len(await bucket.names("uses")) == 1
    async with bucket_store(bucket, clock=clock) as other:
        other._turn = BucketClaim(bucket, clock, settle_s=0.0)
        clock.now += 7200
        await other.lookup(query(chain(3)[:1]))
        assert await other.sweep()
        known, logs = await other.changes.uses.merged()
        assert logs == []
        at = {unit.page_key: used for unit, used in known.items()}
        first, second, third = (at[key] for key in chain(3))
        assert first - second > 7000 * 10**9
        assert second > third
        assert await get(other, pages(3)[0][0])


async def test_a_scrub_reads_everything_and_sets_aside_what_is_damaged(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    made = [*pages(3), tail(ROOT, "t")]
    for key, data in made:
        await put(store, key, data, ttl_s=1000 if key.kind == "tail" else 0)
    (entry,) = await bucket.names("blobs/tail")
    damaged = bytearray(made[3][1])
    damaged[-40] ^= 1
    await bucket.put(entry.path, bytes(damaged))
    reports = [r async for r in store.scrub(repair=True)]
    assert reports[-1].checked == reports[-1].total == 4
    assert sum(r.bytes for r in reports) == sum(len(data) for _, data in made)
    found = {key: r.expires[key] for r in reports for key, _ in r.findings}
    assert list(found) == [str(made[3][0])]
    assert abs(found[str(made[3][0])] - clock.now - 1000) < 2
    assert await store.has([key for key, _ in made]) == [True, True, True, False]
    assert (await store.lookup(query(chain(3)))).tails == []


async def test_a_namespace_beyond_its_quota_loses_its_own_oldest(
    store: BucketStore, bucket: Bucket, clock: Clock
) -> None:
    ours = [blob(digest("ours", i), size=BLOB, namespace=9) for i in range(5)]
    theirs = [blob(digest("theirs", i), size=BLOB, namespace=7) for i in range(4)]
    for each in theirs + ours:
        await put(store, *each)
        clock.now += 60
    assert await store.sweep()
    assert (await store.stat()).namespaces == ()
    assert await store.set_quota(9, "ours", 3 * (BLOB + 400)) == 0
    clock.now += 60
    # The quota is in the bucket: another server that sweeps sees to it.
    async with bucket_store(bucket, clock=clock, budget_bytes=ROOM_FOR_TEN) as other:
        other._turn = store._turn
        assert await other.sweep()
        assert await other.has([key for key, _ in ours]) == [False] * 2 + [True] * 3
        assert await other.has([key for key, _ in theirs]) == [True] * 4
        uses = {use.tag: use for use in (await other.stat()).namespaces}
        assert (uses[9].name, uses[9].quota_bytes) == ("ours", 3 * (BLOB + 400))
        assert 2 * BLOB < uses[9].bytes <= uses[9].quota_bytes
        assert (uses[7].blobs, uses[7].quota_bytes) == (4, 0)
        await other.pin([ours[2][0], ours[3][0], ours[4][0]], 1000)
        await other.set_quota(9, "ours", 1)
        assert await other.sweep()
        assert await other.has([key for key, _ in ours[2:]]) == [True] * 3
        await other.set_quota(9, "ours", 0)
        assert await other.sweep()
        assert (await other.stat()).namespaces == ()
