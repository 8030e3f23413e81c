"""Complete pages only, the same for every caller: against a model by brute force."""

import itertools
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_servers import bucket_store, memory_bucket
from store_samples import (
    ROOT,
    Clock,
    blob,
    chain,
    digest,
    local_store,
    pages,
    put,
    query,
    served,
    state,
    tail,
)

from kvferry.cluster import index
from kvferry.cluster.backends import MemoryBackend
from kvferry.cluster.coverage import covers
from kvferry.cluster.index_memo import PageMemo
from kvferry.cluster.repository import BlobRepository
from kvferry.proto.keys import BlobKey

LAYERS, HEADS, PAGES = 5, 3, 4
CODECS = ("raw", "zstd", "ferry")


@pytest.fixture(params=["memory", "bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def empty_store(
    kind: str, clock: Clock | None = None
) -> AbstractAsyncContextManager[BlobRepository]:
    if kind == "memory":
        return local_store(MemoryBackend(), clock=clock)
    return bucket_store(memory_bucket(), clock=clock)


def ranges(end: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.sampled_from([(a, b) for a in range(end) for b in range(a + 1, end + 1)])


@given(st.lists(st.tuples(ranges(LAYERS), ranges(HEADS)), max_size=8))
def test_coverage_is_that_of_every_cell(
    parts: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    cells = {
        cell for (a, b), (c, d) in parts for cell in itertools.product(range(a, b), range(c, d))
    }
    assert covers(parts, LAYERS, HEADS) == (len(cells) == LAYERS * HEADS)


def test_coverage_of_a_huge_model_is_quick() -> None:
    parts = [((i, i + 1), (0, 65_536)) for i in range(2000)]
    assert covers(parts, 2000, 65_536)
    assert not covers(parts[:-1], 2000, 65_536)
    assert not covers([], 1, 1)


@dataclass(frozen=True)
class Part:
    page: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    codec: str


PARTS = st.builds(
    Part,
    page=st.integers(0, PAGES - 1),
    layers=st.sampled_from([(0, 5), (0, 2), (2, 5), (1, 4), (4, 5), (0, 3)]),
    heads=st.sampled_from([(0, 3), (0, 3), (0, 1), (1, 3)]),
    codec=st.sampled_from(CODECS),
)


def expected(parts: Sequence[Part], asked: dict[str, Any]) -> list[set[Part]]:
    """By brute force: page after page, cell after cell."""
    codecs = asked.get("codecs") or frozenset(CODECS)
    layers, heads = asked.get("layers", (0, 99)), asked.get("heads", (0, 99))
    run: list[set[Part]] = []
    for page in range(PAGES):
        here = {p for p in parts if p.page == page and p.codec in codecs}
        missing = set(itertools.product(range(LAYERS), range(HEADS)))
        for p in here:
            missing -= set(itertools.product(range(*p.layers), range(*p.heads)))
        if missing:
            break
        run.append(
            {
                p
                for p in here
                if set(range(*p.layers)) & set(range(*layers))
                and set(range(*p.heads)) & set(range(*heads))
            }
        )
    return run


def make(part: Part) -> tuple[BlobKey, bytes]:
    keys = [ROOT, *chain(PAGES)]
    return blob(
        keys[part.page + 1],
        previous=keys[part.page],
        tokens=(part.page * 256, part.page * 256 + 256),
        layers=part.layers,
        heads=part.heads,
        codec=part.codec,
        model_layers=LAYERS,
        model_heads=HEADS,
        size=1,
    )


@given(
    parts=st.lists(PARTS, unique=True, min_size=1, max_size=40),
    gone=st.sets(st.integers(0, 39), max_size=3),
    codecs=st.sets(st.sampled_from(CODECS), max_size=2),
    layers=st.one_of(st.none(), ranges(LAYERS)),
    heads=st.one_of(st.none(), ranges(HEADS)),
)
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_lookup_equals_brute_force(
    kind: str,
    parts: list[Part],
    gone: set[int],
    codecs: set[str],
    layers: tuple[int, int] | None,
    heads: tuple[int, int] | None,
) -> None:
    # Whole pages often, or long runs would be rare.
    parts = list(dict.fromkeys([*parts, *(Part(i, (0, 5), (0, 3), "raw") for i in (0, 1))]))
    asked: dict[str, Any] = {"codecs": frozenset(codecs)}
    if layers:
        asked["layers"] = layers
    if heads:
        asked["heads"] = heads
    async with empty_store(kind) as store:
        made = {part: make(part) for part in parts}
        for key, data in made.values():
            assert await put(store, key, data)
        left = [p for i, p in enumerate(parts) if i not in gone]
        await store.delete([made[p][0] for i, p in enumerate(parts) if i in gone])
        found = await store.lookup(query(chain(PAGES), **asked))
        by_key = {made[p][0]: p for p in parts}
        assert [{by_key[i.key] for i in page} for page in found.pages] == expected(left, asked)


async def test_a_page_elsewhere_in_another_chain_is_no_hit(kind: str) -> None:
    async with empty_store(kind) as store:
        for key, data in pages(3):
            await put(store, key, data)
        keys = chain(3)
        assert (await store.lookup(query(keys))).complete_pages == 3
        assert (await store.lookup(query([keys[1], keys[2]]))).complete_pages == 0
        assert (await store.lookup(query([keys[0], keys[2]]))).complete_pages == 1
        assert (await store.lookup(query([keys[0], keys[0]]))).complete_pages == 1
        assert (await store.lookup(query([]))).complete_pages == 0


async def test_a_long_chain_is_found_to_its_first_gap(kind: str) -> None:
    async with empty_store(kind) as store:
        made = pages(300, size=1)
        for key, data in made:
            await put(store, key, data)
        assert (await store.lookup(query(chain(310)))).complete_pages == 300
        await store.delete([made[257][0]])
        assert (await store.lookup(query(chain(310)))).complete_pages == 257


async def test_tails_hang_at_the_end_of_the_run_or_a_page_before(kind: str) -> None:
    async with empty_store(kind) as store:
        for key, data in pages(2):
            await put(store, key, data)
        keys = chain(2)
        at_root, at_first = tail(ROOT, "root"), tail(keys[0], "first", 256)
        at_end = tail(keys[1], "end", 512)
        half = tail(keys[1], "half", 512, layers=(0, 2))
        for key, data in (at_root, at_first, at_end, half):
            assert await put(store, key, data, ttl_s=100)

        async def tails(page_keys: list[bytes], **asked: Any) -> list[tuple[bytes, int]]:
            found = await store.lookup(query(page_keys, **asked))
            return [(t.tail_key, t.tokens) for t in found.tails]

        root, first, end = ((t[0].page_key, 10) for t in (at_root, at_first, at_end))
        assert await tails(keys) == [end, first]
        assert await tails([*keys, digest("beyond")]) == [end, first]
        assert await tails(keys[:1]) == [first, root]
        assert await tails([]) == [root]
        assert await tails(keys, codecs=frozenset({"affine"})) == []
        await put(store, *tail(keys[1], "half", 512, layers=(2, 4)))
        assert set(await tails(keys)) == {(half[0].page_key, 10), end, first}


async def test_a_tail_ends_with_its_time(kind: str) -> None:
    clock = Clock()
    async with empty_store(kind, clock=clock) as store:
        await put(store, *tail(ROOT, "t"), ttl_s=10)
        assert len((await store.lookup(query([]))).tails) == 1
        clock.now += 11
        assert (await store.lookup(query([]))).tails == []


async def test_states_are_found_along_the_whole_chain(kind: str) -> None:
    """Wherever they are anchored, and although pages before them are gone."""
    async with empty_store(kind) as store:
        keys = chain(3)
        first, later = state(ROOT, "a", 10), state(keys[2], "b", 778)
        half = [state(keys[0], "c", 300, (0, 1)), state(keys[0], "c", 300, (1, 3))]
        parted = [state(keys[0], "d", 310, part=part, parts=2) for part in range(2)]
        for key, data in (first, later, half[0], parted[0]):
            assert await put(store, key, data, ttl_s=100)

        async def states(page_keys: list[bytes], **asked: Any) -> list[tuple[bytes, int, int]]:
            found = await store.lookup(query(page_keys, **{"states": (0, 3), **asked}))
            return [(s.key, s.pages, s.tokens) for s in found.states]

        whole = [(later[0].page_key, 3, 10), (first[0].page_key, 0, 10)]
        assert await states(keys) == whole
        assert await states(keys[:2]) == whole[1:]
        assert await states(keys, states=(0, 0)) == []
        assert await states([]) == whole[1:]
        # Exact states suit whoever accepts lossy pages only.
        assert await states(keys, codecs=frozenset({"ferry"})) == whole
        # What lacks a layer or a part does not count; then it does, and only what is asked
        # for is listed.
        await put(store, *half[1])
        await put(store, *parted[1])
        assert {key for key, _, _ in await states(keys)} == {
            blob[0].page_key for blob in (first, later, half[0], parted[0])
        }
        found = await store.lookup(query(keys, states=(1, 2)))
        listed = {s.key: [b.layers for b in s.blobs] for s in found.states}
        assert listed[half[0][0].page_key] == [(1, 3)]


@pytest.mark.parametrize("order", ["as told", "shuffled"])
@pytest.mark.parametrize("turn_tokens", [3, 100])
async def test_the_last_of_a_hundred_turns_are_those_listed(
    kind: str, turn_tokens: int, order: str
) -> None:
    """Some behind one page or each behind its own; stored in the order of turns or in another."""
    turns = [turn_tokens * (1 + n) + 10 for n in range(100)]
    async with empty_store(kind) as store:
        keys = chain(turns[-1] // 256)
        stored = turns if order == "as told" else random.Random(7).sample(turns, 100)
        for end in stored:
            await put(store, *state([ROOT, *keys][end // 256], f"turn {end}", end))
        for end in turns:  # others' conversations that begin alike, and go on longer
            await put(store, *state(ROOT, f"other {end}", end + turns[-1]))

        async def ends(last: int) -> list[int]:
            asked = query(keys[: last // 256], states=(0, 3), tokens=last)
            return [s.blobs[0].tokens[1] for s in (await store.lookup(asked)).states]

        for last in (turns[-1], turns[70] + 1, turns[69] + 2, turns[3]):
            listed = await ends(last)
            assert listed[:4] == [end for end in turns if end <= last][:-5:-1]
            assert len(listed) <= 128
            assert max(listed) <= last


async def test_a_state_takes_the_place_of_a_state_and_of_no_tail(kind: str) -> None:
    async with empty_store(kind) as store:
        old, new = state(ROOT, "old", 10), state(ROOT, "new", 20)
        beside = tail(ROOT, "old")
        for key, data in (old, beside):
            await put(store, key, data)
        await put(store, *new, replaces=old[0])
        found = await store.lookup(query([], states=(0, 3)))
        assert [s.key for s in found.states] == [new[0].page_key]
        assert [t.tail_key for t in found.tails] == [beside[0].page_key]


@pytest.mark.parametrize("stage", [False, True])
async def test_a_tail_takes_the_place_of_the_last_once_it_is_whole(kind: str, stage: bool) -> None:
    async with empty_store(kind) as store:
        old = [tail(ROOT, "old", layers=(0, 4))]
        new = [tail(ROOT, "new", layers=(0, 2)), tail(ROOT, "new", layers=(2, 4))]
        for key, data in old:
            await put(store, key, data)
        replaces = old[0][0]
        await put(store, *new[0], replaces=replaces, stage=stage)
        if stage:
            await store.commit([new[0][0]])
        assert [t.tail_key for t in (await store.lookup(query([]))).tails] == [replaces.page_key]
        await put(store, *new[1], replaces=replaces, stage=stage)
        if stage:
            await store.commit([new[1][0]])
        found = (await store.lookup(query([]))).tails
        assert [t.tail_key for t in found] == [new[0][0].page_key]
        assert await store.has([replaces]) == [False]
        assert (await store.stat()).blobs == 2


async def test_replacing_needs_the_same_model_and_a_tail(kind: str) -> None:
    async with empty_store(kind) as store:
        page, other = blob(), tail(ROOT, "other", model=digest("other model"))
        for key, data in (page, other):
            await put(store, key, data)
        await put(store, *tail(ROOT, "a"), replaces=page[0])
        await put(store, *tail(ROOT, "b"), replaces=other[0])
        await put(store, *tail(ROOT, "c"), replaces=tail(ROOT, "none")[0])
        assert await store.has([page[0], other[0]]) == [True, True]


@given(seed=st.integers(0, 10**9))
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_every_answer_follows_every_change(seed: int) -> None:
    """Pages that were answered before are remembered; never beyond what changes them."""
    chance = random.Random(seed)
    clock = Clock()
    parts = [Part(i, r, (0, 3), c) for i in range(3) for r in ((0, 2), (2, 5)) for c in CODECS[:2]]
    made = {part: make(part) for part in parts}
    by_key = {made[p][0]: p for p in parts}
    asks: list[dict[str, Any]] = [{}, {"codecs": frozenset({"raw"})}, {"layers": (2, 5)}]
    async with empty_store("memory", clock=clock) as store, served(store) as client:
        left: dict[Part, float] = {}
        for _ in range(25):
            part = chance.choice(parts)
            if chance.random() < 0.6:
                ttl = chance.choice([0, 0, 0, 30])
                key, data = made[part]
                if await put(store, key, data, ttl_s=ttl) or not ttl:
                    left[part] = clock.now + ttl if ttl else float("inf")
                elif left[part] < clock.now + ttl:
                    left[part] = clock.now + ttl
            elif chance.random() < 0.5:
                await store.delete([made[part][0]])
                left.pop(part, None)
            else:
                clock.now += 20
            left = {p: end for p, end in left.items() if end > clock.now}
            for asked in asks:
                wanted = expected(list(left), asked)
                for whom in (store, client):
                    found = await whom.lookup(query(chain(PAGES), **asked))
                    assert [{by_key[i.key] for i in page} for page in found.pages] == wanted


async def test_what_lookups_remember_is_bounded_by_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was forgotten is found all the same."""
    monkeypatch.setattr(index, "PageMemo", lambda: PageMemo(60))
    parts = [(a, a + 1) for a in range(4)]
    async with local_store(MemoryBackend()) as store:
        memo = store._core.index.ask(lambda opened: opened._memo)
        for name, spans in (("whole", [(0, 4)]), ("parts", parts)):
            for span in spans:
                for each in pages(30, name, layers=span):
                    await put(store, *each)
        for name, blobs, most in (("whole", 1, 20), ("parts", 4, 10), ("whole", 1, 20)):
            for length in range(1, 31):
                found = await store.lookup(query(chain(length, name)))
                assert [len(page) for page in found.pages] == [blobs] * length
                assert len(memo) <= 20
            assert len(memo) == most
        await store.delete([key for key, _ in pages(30, "whole")])
        assert len(memo) == 0
        assert (await store.lookup(query(chain(30, "whole")))).complete_pages == 0
