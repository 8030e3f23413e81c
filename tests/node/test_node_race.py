"""One blob from several places that are slow, silent, wrong or empty: over real connections."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest
from node_samples import ANY, blob

from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.repository import GetSession
from kvferry.cluster.server import start_server
from kvferry.errors import (
    BlobNotFoundError,
    CorruptBlobError,
    FerryError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.node.byte_gate import ByteGate
from kvferry.node.directory import Directory
from kvferry.node.fetching import Fetching
from kvferry.node.lanes import SLOTS_A_SOURCE, Lanes
from kvferry.node.memory_tier import MemoryTier
from kvferry.node.race import Race
from kvferry.node.remotes import Peers, Remote
from kvferry.node.tiers import Tiers
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2 as pb

MIB = 1 << 20


class Shelf:
    """What one place serves, and how badly.

    Attributes:
        stall_at: bytes after which nothing more comes.
        most: gets under way at a time, so far.
        over: a get has ended, or was called off.
    """

    def __init__(self, blobs: dict[BlobKey, bytes], pause_s: float = 0.0) -> None:
        self.blobs, self.pause_s = blobs, pause_s
        self.stall_at: int | None = None
        self.now = self.most = self.asked = 0
        self.over = asyncio.Event()

    async def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        return [key in self.blobs for key in keys]

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        self.asked += 1
        if key not in self.blobs:
            raise BlobNotFoundError(str(key))
        return GetSession(len(self.blobs[key]), "memory", self._chunks(self.blobs[key]))

    async def _chunks(self, data: bytes) -> AsyncIterator[bytes]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            step = max(1, len(data) // 8)
            for at in range(0, len(data), step):
                if self.stall_at is not None and at >= self.stall_at:
                    await asyncio.sleep(60)
                await asyncio.sleep(self.pause_s)
                yield data[at : at + step]
        finally:
            self.now -= 1
            self.over.set()


class Place:
    """A few shelves behind real servers, and lanes to them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.counters: Counter[str] = Counter()

    async def serve(self, shelf: Shelf) -> str:
        servicer = BlobStoreServicer(shelf)  # type: ignore[arg-type]
        server = await start_server([blob_store_service(servicer)], [ANY])
        self._stack.push_async_callback(server.stop, 0.0)
        return server.addresses[0]

    async def lanes(self, peers: Sequence[Shelf], store: Shelf | str | None = None) -> Lanes:
        named = Peers("me", 20.0, 64 * MIB)
        self._stack.push_async_callback(named.aclose)
        addresses = [await self.serve(shelf) for shelf in peers]
        await named.update(
            [pb.NodeAddress(node_id=f"p{n}", address=a) for n, a in enumerate(addresses)]
        )
        remote = None
        if store is not None:
            where = store if isinstance(store, str) else await self.serve(store)
            remote = Remote("the store", where, 20.0, 64 * MIB)
            self._stack.push_async_callback(remote.aclose)
        directory = Directory(named, 5.0, 10.0, self.counters)
        for n, shelf in enumerate(peers):
            for key in shelf.blobs:
                directory.has(f"p{n}", key)
        return Lanes(named, directory, remote, self.counters, 30.0, 10.0)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(stack)


def missing(key: BlobKey) -> FerryError:
    return BlobNotFoundError(str(key))


def unhedged(lanes: Lanes) -> Lanes:
    """Without second requests, which a machine that is busy elsewhere makes at any time."""
    assert lanes.extra.take(lanes.extra.left)
    return lanes


async def test_damage_is_never_the_answer_and_is_not_asked_for_again(place: Place) -> None:
    key, data = blob("x", size=50_000)
    broken = bytearray(data)
    broken[30_000] ^= 1
    first, second = Shelf({key: bytes(broken)}), Shelf({key: data})
    lanes = unhedged(await place.lanes([first, second]))
    for _ in range(3):
        found, remote = await Race(lanes, key).run(missing(key))
        assert bytes(found) == data
        assert remote.name == "p1"
    assert first.asked == 1
    assert place.counters["peer_corrupt"] == 1
    # Nobody else: the damage is what went wrong.
    with pytest.raises(CorruptBlobError):
        await Race(await place.lanes([Shelf({key: bytes(broken)})]), key).run(missing(key))


async def test_one_that_stalls_is_overtaken_and_called_off(place: Place) -> None:
    key, data = blob("x", size=400_000)
    first, second = Shelf({key: data}), Shelf({key: data})
    first.stall_at = 200_000
    lanes = await place.lanes([first, second])
    found, remote = await Race(lanes, key).run(missing(key))
    assert (bytes(found), remote.name) == (data, "p1")
    assert (place.counters["hedges"], place.counters["hedge_wins"]) == (1, 1)
    assert 0 < place.counters["hedge_extra_bytes"] <= 250_000
    async with asyncio.timeout(10):
        await first.over.wait()
    assert all(peer.meter.under_way == 0 for peer in lanes.peers.all)


async def test_the_store_overtakes_too_and_without_a_budget_there_is_no_second_request(
    place: Place,
) -> None:
    key, data = blob("x", size=400_000)
    first, store = Shelf({key: data}), Shelf({key: data})
    first.stall_at = 100_000
    lanes = await place.lanes([first], store)
    assert lanes.extra.take(lanes.extra.left)
    found, remote = await Race(lanes, key).run(missing(key))
    # It was given up, and only then the store was asked.
    assert (bytes(found), remote) == (data, lanes.store)
    assert place.counters["hedges"] == 0
    assert place.counters["stalls"] == 1
    assert place.counters["hedges_over_budget"] == 1
    lanes.extra.earn(MIB)
    again = blob("y", size=400_000)
    for shelf in (first, store):
        shelf.blobs = dict([again])
    lanes.directory.has("p0", again[0])
    found, remote = await Race(lanes, again[0]).run(missing(again[0]))
    assert (bytes(found), remote) == (again[1], lanes.store)
    assert place.counters["hedge_wins"] == place.counters["hedges"]


async def test_a_silent_store_is_given_up_and_not_asked_for_a_while(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.node.race.STORE_SILENCE_S", 0.3)
    key, data = blob("x")
    store = Shelf({key: data})
    store.stall_at = 0
    lanes = await place.lanes([], store)
    for _ in range(2):
        with pytest.raises(StoreTimeoutError):
            await Race(lanes, key).run(missing(key))
    assert place.counters["stalls"] == 2
    with pytest.raises(StoreUnavailableError, match="lately"):
        await Race(lanes, key).run(missing(key))
    assert store.asked == 2


async def test_stale_hints_cost_one_question_each(place: Place) -> None:
    key, data = blob("x")
    shelves = [Shelf({key: data}) for _ in range(3)]
    lanes = unhedged(await place.lanes(shelves))
    for shelf in shelves[:2]:
        shelf.blobs = {}
    for _ in range(4):
        found, remote = await Race(lanes, key).run(missing(key))
        assert (bytes(found), remote.name) == (data, "p2")
    assert [shelf.asked for shelf in shelves] == [1, 1, 4]
    assert place.counters["stale_hints"] == 2


async def test_without_a_hint_it_is_found_and_what_nobody_has_is_said_so(place: Place) -> None:
    key, data = blob("x")
    shelves = [Shelf({}), Shelf({})]
    lanes = await place.lanes(shelves)
    shelves[1].blobs = {key: data}
    assert bytes((await Race(lanes, key).run(missing(key)))[0]) == data
    other = blob("nowhere")[0]
    with pytest.raises(BlobNotFoundError):
        await Race(lanes, other).run(missing(other))
    assert shelves[0].asked == 0  # a question, and no get
    gone = await place.lanes([], "127.0.0.1:1")
    for _ in range(4):
        with pytest.raises(StoreUnavailableError):
            await Race(gone, other).run(missing(other))


async def test_blobs_are_spread_and_no_source_has_more_than_its_lanes(place: Place) -> None:
    made = dict(blob(str(n), size=40_000) for n in range(24))
    shelves = [Shelf(made, pause_s=0.004) for _ in range(3)]
    lanes = await place.lanes(shelves)
    tiers = Tiers(MemoryTier(64 * MIB), None, place.counters)
    fetching = Fetching(tiers, lanes, place.counters, 16 * MIB)
    answers = await asyncio.gather(*(fetching.fetch(key, missing(key)) for key in made))
    assert [bytes(data) for data, _ in answers] == list(made.values())
    most = SLOTS_A_SOURCE + place.counters["hedges"]
    assert all(shelf.most <= most for shelf in shelves)
    assert min(shelf.asked for shelf in shelves) >= 3
    # Once more: all of it is here, nobody is asked.
    asked = sum(shelf.asked for shelf in shelves)
    assert await tiers.has(list(made)) == [True] * len(made)
    # Callers for one key share one transfer.
    key, data = blob("shared", size=40_000)
    shelves[0].blobs = {**made, key: data}
    lanes.directory.has("p0", key)
    await asyncio.gather(*(fetching.fetch(key, missing(key)) for _ in range(5)))
    assert sum(shelf.asked for shelf in shelves) == asked + 1
    await fetching.settle()


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))]
)
async def test_whatever_the_places_do_the_answer_is_right_or_an_error(
    place: Place, seed: int
) -> None:
    rng = random.Random(seed)
    made = dict(blob(f"{seed}/{n}", size=rng.choice((500, 60_000))) for n in range(10))
    shelves = []
    for _ in range(3):
        held = {}
        for key, data in made.items():
            kind = rng.random()
            if kind < 0.5:
                held[key] = data
            elif kind < 0.7:
                wrong = bytearray(data)
                wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
                held[key] = bytes(wrong)
            elif kind < 0.8:
                held[key] = rng.choice(list(made.values()))
        shelves.append(Shelf(held, rng.choice((0.0, 0.01))))
    stalled = rng.choice(shelves)
    stalled.stall_at = 0
    lanes = await place.lanes(shelves)
    tiers = Tiers(MemoryTier(64 * MIB), None, place.counters)
    fetching = Fetching(tiers, lanes, place.counters, 200_000)

    async def one(key: BlobKey) -> None:
        sound = any(s.blobs.get(key) == made[key] and s is not stalled for s in shelves)
        try:
            data, _ = await fetching.fetch(key, missing(key))
        except FerryError:
            assert not sound
        else:
            assert bytes(data) == made[key]

    await asyncio.gather(*(one(key) for key in made))
    assert all(peer.meter.under_way == 0 for peer in lanes.peers.all)
    await fetching.settle()


async def test_bytes_under_way_are_bounded_and_turns_are_fair() -> None:
    gate = ByteGate(100)
    most, order = 0, []

    async def one(n: int, size: int) -> None:
        nonlocal most
        async with gate.hold(size):
            order.append(n)
            most = max(most, gate.held_bytes)
            await asyncio.sleep(0.001)

    sizes = [60, 60, 30, 500, 10, 10, 80, 20]
    tasks = [asyncio.create_task(one(n, size)) for n, size in enumerate(sizes)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 100
    assert order == sorted(order)
    assert 2 not in order
    assert gate.held_bytes == 0
