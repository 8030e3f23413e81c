"""An S3 that fails: errors by reason, retries within a deadline, recovery, no wrong bytes."""

import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import pytest
from s3_proxy import Proxy, proxy_before
from s3_servers import S3Server, bucket_store
from store_samples import MIB, ROOT, blob, chain, digest, get, pages, put, query, state, tail

from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.store import BucketStore
from kvferry.cluster.bucket.url import parse_bucket_url
from kvferry.cluster.repository import ListQuery
from kvferry.errors import (
    CorruptBlobError,
    FerryError,
    StoreTimeoutError,
    StoreUnavailableError,
)

pytestmark = pytest.mark.processes
HASTY_S, PATIENT_S = 1.5, 30.0
Fault: TypeAlias = Callable[[str, str], int | str | None]


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[Proxy]:
    with proxy_before(moto.port) as running:
        yield running


@pytest.fixture
async def store(moto: S3Server, proxy: Proxy) -> AsyncIterator[BucketStore]:
    url = parse_bucket_url(moto.url(port=proxy.port))
    async with bucket_store(Bucket.open(url, deadline_s=PATIENT_S), fresh_s=0.0) as opened:
        yield opened


@contextmanager
def failing(store: BucketStore, proxy: Proxy, fault: Fault) -> Iterator[None]:
    """Meanwhile requests fail so, and the store gives up soon; else it has time enough."""
    proxy.fault, store.bucket._deadline_s = fault, HASTY_S
    try:
        yield
    finally:
        proxy.fault, store.bucket._deadline_s = (lambda method, path: None), PATIENT_S


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_errors_now_and_then_are_retried_and_counted(
    store: BucketStore, proxy: Proxy, status: int
) -> None:
    chance = random.Random(status)
    proxy.fault = lambda method, path: status if chance.random() < 0.3 else None
    made = pages(6)
    for key, data in made:
        assert await put(store, key, data)
    assert (await store.lookup(query(chain(6)))).complete_pages == 6
    for key, data in made:
        assert await get(store, key) == data
    assert store.counters[f"bucket_{status}"] > 3
    assert store.counters["bucket_retries"] > 3


@pytest.mark.parametrize("fault", [500, 503, "drop"])
async def test_an_outage_is_an_error_in_time_and_ends_by_itself(
    store: BucketStore, proxy: Proxy, fault: int | str
) -> None:
    made = pages(3)
    for key, data in made:
        await put(store, key, data)
    with failing(store, proxy, lambda method, path: fault):
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await get(store, made[0][0])
        with pytest.raises(StoreUnavailableError):
            await put(store, *blob(digest("new")))
        with pytest.raises(StoreUnavailableError):
            await store.lookup(query(chain(3)))
        assert time.monotonic() - began < 30
    reason = f"bucket_{fault}" if isinstance(fault, int) else "bucket_connection"
    assert store.counters[reason] > 3
    assert (await _in_flight(store)) == 0
    assert (await store.lookup(query(chain(3)))).complete_pages == 3
    assert await put(store, *blob(digest("new")))
    assert await get(store, made[0][0]) == made[0][1]


async def _in_flight(store: BucketStore) -> int:
    return store.stat_now().in_flight_bytes


async def test_a_server_that_hangs_is_a_timeout(store: BucketStore, proxy: Proxy) -> None:
    key, data = blob()
    await put(store, key, data)

    def hang(method: str, path: str) -> None:
        time.sleep(3)

    with failing(store, proxy, hang), pytest.raises(StoreTimeoutError):
        await get(store, key)
    assert await get(store, key) == data


@pytest.mark.parametrize("size", [2000, 3 * MIB])
async def test_an_answer_cut_short_or_changed_is_no_blob(
    store: BucketStore, proxy: Proxy, size: int
) -> None:
    key, data = blob(size=size)
    await put(store, key, data)
    for fault in ("cut", "flip"):

        def damage(method: str, path: str, fault: str = fault) -> str | None:
            return fault if "/blobs/" in path else None

        with failing(store, proxy, damage), pytest.raises(FerryError) as found:
            await get(store, key)
        assert found.value.reason in ("unavailable", "timeout", "corrupt")
        # Damaged on its way only, if the next read finds it whole; else it was set aside.
        if fault == "cut":
            assert await get(store, key) == data


async def test_one_damaged_answer_sets_no_whole_blob_aside(
    store: BucketStore, proxy: Proxy
) -> None:
    key, data = blob(size=50_000)
    await put(store, key, data)
    left = ["flip"]
    proxy.fault = lambda method, path: left.pop() if left and method == "GET" else None
    with pytest.raises(CorruptBlobError):
        await get(store, key)
    assert await get(store, key) == data
    assert store.counters["quarantined"] == 0


async def test_a_damaged_object_is_set_aside_and_its_page_not_complete(
    store: BucketStore, proxy: Proxy
) -> None:
    key, data = blob(digest("page"), size=50_000)
    await put(store, key, data)
    (entry,) = await store.bucket.names("blobs")
    await store.bucket.put(entry.path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptBlobError):
        await get(store, key)
    assert (await store.lookup(query([digest("page")]))).complete_pages == 0
    assert await store.has([key]) == [False]
    assert (await store.stat()).quarantined == 1
    assert await put(store, key, data)
    assert await get(store, key) == data


async def test_damaged_markers_are_written_again(store: BucketStore, proxy: Proxy) -> None:
    for each in [*pages(2), tail(chain(2)[1], "t", 512)]:
        await put(store, *each)
    for folder in ("pages", "tails"):
        for entry in await store.bucket.names(folder):
            await store.bucket.put(entry.path, b"KVFMARK\x01" + b"nonsense" * 20)
    found = await store.lookup(query(chain(2)))
    assert found.complete_pages == 2
    assert len(found.tails) == 1
    assert store.counters["marker_damaged"] == 3


async def test_a_large_put_that_fails_leaves_nothing(store: BucketStore, proxy: Proxy) -> None:
    key, data = blob(size=20 * MIB)
    parts: list[str] = []

    def third_part_fails(method: str, path: str) -> int | None:
        if method == "PUT" and "partNumber" in path:
            parts.append(path)
            return 503 if len(parts) > 2 else None
        return None

    with failing(store, proxy, third_part_fails), pytest.raises(StoreUnavailableError):
        await put(store, key, data)
    assert await store.has([key]) == [False]
    assert await store.bucket.names("blobs") == []
    assert any(method == "DELETE" and "uploadId" in path for method, path in proxy.requests)
    assert await put(store, key, data)
    assert await get(store, key) == data


async def test_a_large_put_with_a_wrong_digest_is_aborted(store: BucketStore, proxy: Proxy) -> None:
    key, data = blob(size=20 * MIB)
    bad = data[: 15 * MIB] + bytes([data[15 * MIB] ^ 1]) + data[15 * MIB + 1 :]
    with pytest.raises(CorruptBlobError):
        await put(store, key, bad)
    assert await store.bucket.names("blobs") == []
    assert any(method == "POST" and "uploads" in path for method, path in proxy.requests)
    assert any(method == "DELETE" and "uploadId" in path for method, path in proxy.requests)
    assert not any(method == "POST" and "uploadId" in path for method, path in proxy.requests)


async def test_where_conditional_puts_are_unknown_all_works(
    store: BucketStore, proxy: Proxy
) -> None:
    """A server that says 501 to the header, as some do."""
    seen: list[str] = []

    def unknown(method: str, path: str) -> int | None:
        if method == "PUT" and "/blobs/" in path and not seen:
            seen.append(path)
            return 501
        return None

    proxy.fault = unknown
    key, data = blob()
    assert await put(store, key, data)
    assert await get(store, key) == data
    assert seen


async def test_a_part_is_read_by_its_range(store: BucketStore, proxy: Proxy) -> None:
    key, data = blob(size=4 * MIB)
    await put(store, key, data)
    assert await get(store, key, 3 * MIB, 1000) == data[3 * MIB : 3 * MIB + 1000]
    assert await get(store, key, 4 * MIB) == data[4 * MIB :]


async def test_what_hangs_on_a_page_is_found_by_its_name(store: BucketStore, proxy: Proxy) -> None:
    """And nothing else of the bucket is looked at."""
    one, other = chain(2)
    hanging = [tail(one, "t", 256), tail(one, "longer", 256), state(one, "s", 266)]
    elsewhere = [*pages(2), tail(other, "t2", 512), tail(ROOT, "t3")]
    for each in (*hanging, *elsewhere):
        await put(store, *each)
    proxy.requests.clear()
    found = []
    for kind in ("tail", "state"):
        asked = ListQuery(previous_key=one, kind=kind)
        found += [info.key async for batch in store.list(asked) for info in batch]
    assert sorted(found) == sorted(key for key, _ in hanging)
    keys = {key.page_key.hex() for key, _ in elsewhere}
    assert not [
        path for _, path in proxy.requests if any(key in path for key in keys - {one.hex()})
    ]
    assert len(proxy.requests) <= 2 + 2 * len(hanging)
    # Without a kind, pages that hang there are found as well.
    everything = ListQuery(previous_key=one)
    listed = {
        info.key
        async for batch in store.list(everything)
        for info in batch
        if info.previous_key == one
    }
    assert listed == {key for key, _ in hanging} | {pages(2)[1][0]}
