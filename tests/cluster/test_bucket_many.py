"""Several stores over one bucket at once: whatever the order, they agree in the end."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_servers import bucket_store
from store_samples import Clock, blob, chain, digest, get, pages, put, query, state, tail

from kvferry.cluster.bucket.layout import page_marker
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.store import BucketStore
from kvferry.errors import BlobNotFoundError, FerryError, IdentityMismatchError

PARTS = [(0, 1), (1, 2), (2, 3), (3, 4)]


async def stores(stack: AsyncExitStack, count: int, clock: Clock) -> list[BucketStore]:
    """Servers that share a bucket and nothing else."""
    from obstore.store import MemoryStore

    shared = MemoryStore()
    return [
        await stack.enter_async_context(
            bucket_store(Bucket(shared, f"bucket of server {i}"), clock=clock)
        )
        for i in range(count)
    ]


@pytest.fixture
async def three() -> AsyncIterator[list[BucketStore]]:
    async with AsyncExitStack() as stack:
        yield await stores(stack, 3, Clock())


async def test_layer_groups_that_come_through_different_servers(three: list[BucketStore]) -> None:
    made = [blob(layers=part) for part in PARTS]
    for i, (key, data) in enumerate(made):
        found = [(await s.lookup(query([digest("page")]))).complete_pages for s in three]
        assert found == [0, 0, 0]
        assert await put(three[i % 3], key, data)
        assert not await put(three[(i + 1) % 3], key, data)
    for server in three:
        found = await server.lookup(query([digest("page")]))
        assert [b.key for b in found.pages[0]] == [key for key, _ in made]
        assert [await get(server, key) for key, _ in made] == [data for _, data in made]


async def test_all_at_once_through_all_of_them(three: list[BucketStore]) -> None:
    made = [each for part in PARTS for each in pages(5, layers=part)]
    random.Random(3).shuffle(made)
    await asyncio.gather(*(put(three[i % 3], *each) for i, each in enumerate(made)))
    for server in three:
        found = await server.lookup(query(chain(5)))
        assert [len(page) for page in found.pages] == [4] * 5


async def test_one_key_through_all_of_them(three: list[BucketStore]) -> None:
    """With conditional writes the first is kept, and only it counts as stored."""
    made = [blob(size=3000) for _ in three]
    stored = await asyncio.gather(*(put(s, *m) for s, m in zip(three, made, strict=True)))
    assert sum(stored) == 1
    kept = made[stored.index(True)][1]
    assert [await get(server, made[0][0]) for server in three] == [kept] * 3


async def test_what_one_deletes_the_others_lose(three: list[BucketStore]) -> None:
    made = pages(3)
    for each in made:
        await put(three[0], *each)
    for server in three:
        assert (await server.lookup(query(chain(3)))).complete_pages == 3
    await three[1].delete([made[1][0]])
    # Another server may still say that it is there, until it looks.
    with pytest.raises(BlobNotFoundError):
        await get(three[2], made[1][0])
    for server in three[1:]:
        assert (await server.lookup(query(chain(3)))).complete_pages == 1
    three[0].clock.now += 31  # type: ignore[attr-defined]
    assert (await three[0].lookup(query(chain(3)))).complete_pages == 1


async def test_staged_through_one_committed_through_another(three: list[BucketStore]) -> None:
    made = [blob(layers=(0, 2)), blob(layers=(2, 4))]
    for server, each in zip(three, made, strict=False):
        assert await put(server, *each, stage=True)
    assert await three[2].commit([key for key, _ in made]) == 2
    for server in three:
        assert (await server.lookup(query([digest("page")]))).complete_pages == 1


async def test_a_commit_that_died_half_way_is_finished_by_a_sweep(
    three: list[BucketStore],
) -> None:
    made = [blob(layers=(0, 2)), blob(layers=(2, 4))]
    for each in made:
        await put(three[0], *each, stage=True)

    async def dies(old: str, new: str) -> bool:
        raise asyncio.CancelledError

    real, three[0].bucket.copy = three[0].bucket.copy, dies  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await three[0].commit([key for key, _ in made])
    three[0].bucket.copy = real  # type: ignore[method-assign]
    assert await three[1].has([key for key, _ in made]) == [False, False]
    three[1].clock.now += 600  # type: ignore[attr-defined]
    assert await three[1].sweep()
    assert await three[2].has([key for key, _ in made]) == [True, True]
    assert (await three[2].lookup(query([digest("page")]))).complete_pages == 1


async def test_blobs_that_disagree_and_meet_are_never_listed_together() -> None:
    """Each server saw its own only, as when both put at the same moment."""
    async with AsyncExitStack() as stack:
        one, two = await stores(stack, 2, Clock())
        ours = [blob(layers=(0, 2)), blob(layers=(2, 4))]
        theirs = blob(layers=(2, 4), model=digest("other"), codec="zstd")

        async def agrees(info: object) -> None:
            return

        two.changes.check_agreement = agrees  # type: ignore[assignment,method-assign]
        await put(one, *ours[0])
        await put(two, *theirs)
        assert (await one.lookup(query([digest("page")]))).complete_pages == 0
        await put(two, *ours[1])
        for server in (one, two):
            (page,) = (await server.lookup(query([digest("page")]))).pages
            assert {b.key for b in page} == {key for key, _ in ours}
        with pytest.raises(IdentityMismatchError):
            await put(one, *blob(layers=(1, 3), model=digest("third")))


class Late:
    """A server whose marker stays on its way until it is let through."""

    def __init__(self, server: BucketStore) -> None:
        self.reached, self.gate = asyncio.Event(), asyncio.Event()
        self._real = server.bucket.put
        server.bucket.put = self._put  # type: ignore[method-assign]

    async def _put(self, path: str, *args: Any, **more: Any) -> bool:
        if path.startswith("pages/") and not self.reached.is_set():
            self.reached.set()
            await self.gate.wait()
        return await self._real(path, *args, **more)


async def test_a_marker_that_comes_late_does_not_hide_what_came_meanwhile(
    three: list[BucketStore],
) -> None:
    one, two, _ = three
    late = Late(one)
    exact, coarse = blob(codec="raw"), blob(codec="zstd")
    putting = asyncio.create_task(put(one, *exact))
    await late.reached.wait()
    assert await put(two, *coarse)
    late.gate.set()
    assert await putting
    fresh = three[2]
    (page,) = (await fresh.lookup(query([digest("page")]))).pages
    assert {b.key for b in page} == {exact[0], coarse[0]}


async def test_a_marker_that_comes_late_does_not_outlive_its_blobs(
    three: list[BucketStore],
) -> None:
    one, two, _ = three
    late = Late(one)
    key, data = blob()
    putting = asyncio.create_task(put(one, key, data))
    await late.reached.wait()
    assert await two.delete([key]) == 1
    late.gate.set()
    await putting
    assert await two.bucket.get(page_marker(digest("page"))) is None


@given(seed=st.integers(0, 10**9))
@settings(deadline=None, max_examples=40)
async def test_markers_say_in_the_end_what_blobs_say(seed: int) -> None:
    """Puts and deletes of one page through three servers, all at once, in any order."""
    chance = random.Random(seed)
    made = [blob(layers=part, size=50) for part in [*PARTS, (0, 4), (1, 3)]]
    async with AsyncExitStack() as stack:
        servers = await stores(stack, 3, Clock())

        async def work(server: BucketStore) -> None:
            for _ in range(5):
                key, data = chance.choice(made)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                try:
                    if chance.random() < 0.6:
                        await put(server, key, data)
                    else:
                        await server.delete([key])
                except FerryError:
                    continue

        await asyncio.gather(*(work(server) for server in servers))
        fresh = (await stores(stack, 1, Clock()))[0]
        fresh.bucket._store = servers[0].bucket._store
        there = await fresh.has([key for key, _ in made])
        covered = {
            layer
            for held, (key, _) in zip(there, made, strict=True)
            if held
            for layer in range(*key.layers)
        }
        marker = await fresh.bucket.get(page_marker(digest("page")))
        assert (marker is not None) == (covered == {0, 1, 2, 3})
        (listed,) = (await fresh.lookup(query([digest("page")]))).pages or [[]]
        if marker is not None:
            assert {b.key for b in listed} == {
                key for held, (key, _) in zip(there, made, strict=True) if held
            }


async def test_tails_and_states_through_another_server(three: list[BucketStore]) -> None:
    for each in [*pages(2), tail(chain(2)[1], "t", 512), state(chain(2)[0], "s", 300)]:
        await put(three[0], *each, ttl_s=100)
    found = await three[1].lookup(query(chain(2), states=(0, 3)))
    assert (found.complete_pages, len(found.tails), len(found.states)) == (2, 1, 1)
    key, data = tail(chain(2)[1], "t", 512)
    assert await three[2].has([key]) == [True]
    assert len(await get(three[2], key)) == len(data)


def test_a_bucket_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from kvferry.cluster.bucket.url import parse_bucket_url
    from kvferry.errors import ConfigError

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r"kvferry\[s3\]"):
        Bucket.open(parse_bucket_url("s3://b"))
