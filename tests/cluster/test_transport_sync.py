"""The client for synchronous callers, and the loop in its thread."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from store_samples import blob, chain, digest, local_store, pages, query, served

from kvferry.cluster.backends import MemoryBackend
from kvferry.cluster.loop_thread import LoopThread
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import BlobNotFoundError, StoreTimeoutError, StoreUnavailableError


@asynccontextmanager
async def sync_client() -> AsyncIterator[SyncBlobStoreClient]:
    async with local_store(MemoryBackend()) as store, served(store) as client:
        made = await asyncio.to_thread(SyncBlobStoreClient, client.address, timeout_s=20)
        yield made
        await asyncio.to_thread(made.close)


async def test_every_verb_from_many_threads() -> None:
    made = pages(8)
    keys = [key for key, _ in made]

    def use(client: SyncBlobStoreClient) -> int:
        stored = sum(client.put(key, data) for key, data in made)
        assert client.has(keys) == [True] * 8
        for blob_, (_, data) in zip(client.get_many(keys, parallel=3), made, strict=True):
            assert not isinstance(blob_, Exception)
            assert bytes(blob_) == data
        assert client.lookup(query(chain(8))).complete_pages == 8
        lease, held = client.pin(keys, 10)
        assert (held, client.unpin(lease)) == (8, True)
        assert sum(len(batch) for batch in client.list()) == 8
        assert client.stat().blobs == 8
        return stored

    async with sync_client() as client:
        stored = await asyncio.gather(*(asyncio.to_thread(use, client) for _ in range(4)))
        assert sum(stored) == 8

        def finish() -> None:
            key, data = blob(digest("staged"))
            assert client.put(key, data, stage=True)
            assert client.commit([key]) == 1
            assert bytes(client.get(key, 4, 5)) == data[4:9]
            assert client.delete([*keys, key]) == 9

        await asyncio.to_thread(finish)


async def test_many_gets_keep_their_order_and_their_errors() -> None:
    key, data = blob()
    missing = blob(digest("missing"))[0]
    async with sync_client() as client:

        def use() -> None:
            client.put(key, data)
            found = client.get_many([missing, key, missing, key])
            assert [type(f) for f in found] == [BlobNotFoundError, memoryview] * 2
            late = client.get_many([key] * 3, timeout_s=0.0)
            assert all(isinstance(f, StoreTimeoutError) for f in late)

        await asyncio.to_thread(use)


async def test_blobs_are_handed_out_as_they_come_until_nobody_wants_more() -> None:
    made = dict(pages(6))
    missing = blob(digest("missing"))[0]
    async with sync_client() as client:

        def use() -> None:
            puts = [client.put_later(key, data) for key, data in made.items()]
            assert [put.result(20) for put in puts] == [True] * 6
            keys = [*made, missing]
            seen = dict(client.get_each(keys, parallel=2))
            assert sorted(seen) == list(range(7))
            assert isinstance(seen.pop(6), BlobNotFoundError)
            assert all(bytes(seen[i]) == made[keys[i]] for i in seen)  # type: ignore[arg-type]
            some = client.get_each(keys, parallel=1)
            assert next(some)[0] == 0
            some.close()
            assert client.has(keys) == [True] * 6 + [False]

        await asyncio.to_thread(use)


def test_nobody_there() -> None:
    with SyncBlobStoreClient("127.0.0.1:1", timeout_s=5) as client:
        with pytest.raises(StoreUnavailableError):
            client.has([blob()[0]])
        found = client.get_many([blob()[0]])
        assert isinstance(found[0], StoreUnavailableError)


def test_loop_thread_gives_results_errors_and_ends() -> None:
    async def double(value: int) -> int:
        return value * 2

    async def fail() -> None:
        raise KeyError("x")

    thread = LoopThread("test-loop")
    assert thread.run(double(21)) == 42
    with pytest.raises(KeyError):
        thread.run(fail())
    with pytest.raises(TimeoutError):
        thread.run(asyncio.sleep(60), timeout_s=0.05)
    thread.close()
    thread.close()
    assert "test-loop" not in {t.name for t in threading.enumerate()}


async def test_clients_can_share_a_loop() -> None:
    async with local_store(MemoryBackend()) as store, served(store) as client:

        def use() -> None:
            shared = LoopThread()
            with (
                SyncBlobStoreClient(client.address, loop_thread=shared) as one,
                SyncBlobStoreClient(client.address, loop_thread=shared) as two,
            ):
                key, data = blob()
                assert one.put(key, data)
                assert bytes(two.get(key)) == data
            assert shared.run(asyncio.sleep(0, "alive")) == "alive"
            shared.close()

        await asyncio.to_thread(use)
