"""Thousands of random prefix trees: whatever comes back belongs to the tokens asked for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from prefix_trees import StoreAtHand, Tree, assert_belongs, empty_cache, filled_cache

from kvferry.codec.base import NoCalibrations
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.refill import restore
from kvferry.codec.raw import ZstdCodec
from kvferry.node.coding import CodedRange, Shard
from kvferry.node.hooks.loader import Loader
from kvferry.node.offer import Coding, Offer
from kvferry.node.offers import Offers
from kvferry.node.tails import REMEMBERED_TAILS

PAGE, LONGEST = 16, 220
TREES = {"kk": 300, "kkk": 100, "kra": 300, "ra": 320}
NEWEST = 48
SALT = b"s" * 32
MODELS = (b"a" * 32, b"b" * 32)
# Letters as in `empty_cache`; layers of each rank that writes.
LAYOUTS = {"kk": ((0, 2),), "kkk": ((0, 1), (1, 3)), "kra": ((0, 3),), "ra": ((0, 2),)}


def shard_of(kinds: str, model_id: bytes, span: tuple[int, int]) -> Shard:
    def counted(kinds_: str, wanted: str) -> int:
        return sum(kind in wanted for kind in kinds_)

    def part(wanted: str) -> tuple[int, int]:
        start = counted(kinds[: span[0]], wanted)
        return start, start + counted(kinds[slice(*span)], wanted)

    return Shard(
        model_id=model_id, model_layers=counted(kinds, "k"), model_heads=2, head_dim=16,
        layers=part("k"), heads=(0, 2), page_tokens=PAGE,
        model_states=counted(kinds, "ra"), states=part("ra"),
    )  # fmt: skip


class Rank:
    """What offers the caches of some layers of a model."""

    def __init__(self, client: StoreAtHand, kinds: str, model: bytes, span: tuple[int, int]):
        self._kinds, self._model, self._span = kinds, model, span
        self.shard = shard_of(kinds, model, span)
        rows = [CodedRange(self.shard.layers, ZstdCodec())] if self.shard.model_layers else []
        coding = Coding(
            shard=self.shard, root=self.shard.root(SALT), pages=rows, tail=ZstdCodec(),
            tail_ttl_s=1000,
        )  # fmt: skip
        self.counters: Counter[str] = Counter()
        self._offers = Offers(client, lambda: coding, self.counters)

    def offer(self, tokens: list[int], single: int, restored_pages: int) -> None:
        cache = filled_cache(self._kinds, self._model, tokens, single)
        snapshot = adapters.snapshot(
            cache[slice(*self._span)], len(tokens), self.shard.layers[0],
            state_start=self.shard.states[0],
        )  # fmt: skip
        assert self._offers.submit(Offer(tuple(tokens), snapshot, restored_pages))
        self._offers.wait()

    def close(self) -> None:
        assert self._offers.close(10.0)


@dataclass
class Model:
    """A model's ranks, what they offered, and a reader of all its layers."""

    client: StoreAtHand
    kinds: str
    model_id: bytes
    ranks: list[Rank] = field(default_factory=list)
    offered: list[list[int]] = field(default_factory=list)
    alive: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        spans = LAYOUTS[self.kinds]
        self.ranks = [Rank(self.client, self.kinds, self.model_id, span) for span in spans]

    def offer(self, tokens: list[int], single: int) -> None:
        for rank in self.ranks:
            rank.offer(tokens, single, 0)
        known = tokens in self.offered
        self.offered.append(tokens)
        # The newest tail that these tokens go on from gives way to theirs.
        ends = [o for o in self.alive if len(o) < len(tokens) and o == tokens[: len(o)]]
        if ends:
            self.alive.remove(ends[-1])
        if not known:  # what comes again keeps its old place among the newest
            self.alive.append(tokens)
            del self.alive[:-REMEMBERED_TAILS]

    def restore(self, tokens: list[int], keep_last: int) -> tuple[int, str]:
        """As `PrefixCache.restore` does it; checks all that comes back."""
        shard = shard_of(self.kinds, self.model_id, (0, len(self.kinds)))
        loader = Loader(
            client=self.client, calibrations=NoCalibrations(), shard=shard,
            root=shard.root(SALT), accept=frozenset(), rope={},
        )  # fmt: skip
        limit = max(0, len(tokens) - keep_last)
        loaded = loader.load(tokens, 60.0, limit)
        count = loaded.tokens if shard.model_states else min(loaded.tokens, limit)
        assert count <= limit
        if count:
            cache = empty_cache(self.kinds)
            rows = [] if loaded.tensors is None else [loaded.tensors.cut_tokens((0, count))]
            states = loaded.states.get(count, ())
            assert restore(cache, rows, states=states, tokens=count) == count
            assert_belongs(self.kinds, cache, self.model_id, tokens[:count])
        return count, loaded.reason

    def least(self, tokens: list[int], keep_last: int) -> int:
        """What must be found where nothing was evicted: whole pages, or a live state."""
        limit = max(0, len(tokens) - keep_last)
        run = max((min(common(o, tokens) // PAGE, self.pages(o)) for o in self.offered), default=0)
        if not set(self.kinds) & set("ra"):
            return min(PAGE * run, limit)
        # A tail is found up to a page before the run of whole pages ends, and rows must
        # reach the state; lookups list the newest states only.
        newest = self.alive[-NEWEST:]
        usable = (o for o in newest if o == tokens[: len(o)] and self.pages(o) >= run - 1)
        return max((len(o) for o in usable if len(o) <= limit), default=0)

    def pages(self, offered: list[int]) -> int:
        """So many of an offer's pages are stored as pages, not in its tail."""
        return self.ranks[0].shard.pages_before_tail(len(offered))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.fixture(
    params=[
        pytest.param(1 << 30, id="plenty", marks=pytest.mark.long),
        pytest.param(200_000, id="scarce"),
    ]
)
def at_hand(request: pytest.FixtureRequest) -> Iterator[StoreAtHand]:
    client = StoreAtHand(request.param)
    yield client
    client.close()


@pytest.mark.parametrize("kinds", LAYOUTS)
def test_every_restored_row_belongs_to_its_own_tokens(
    kinds: str, at_hand: StoreAtHand, request: pytest.FixtureRequest
) -> None:
    """Where room is plenty, what was offered is found too."""
    plenty = at_hand.budget_bytes > 1 << 20
    rng = np.random.default_rng([*kinds.encode(), plenty])
    seen: Counter[str] = Counter()
    models = [Model(at_hand, kinds, model_id) for model_id in MODELS]
    for _ in range(TREES[kinds]):
        tree = Tree(rng, PAGE, LONGEST)
        # The other model sees the same conversations, and must not be told of them.
        model = models[int(rng.integers(2))]
        model.offer(tree.paths[0], int(rng.integers(0, 4)))
        for act in rng.choice(("offer", "restore", "branch", "evict"), 5, p=(0.3, 0.5, 0.1, 0.1)):
            path = tree.paths[int(rng.integers(len(tree.paths)))]
            if rng.random() < 0.1:
                model = models[int(rng.integers(2))]
            if act == "offer":
                whole = rng.random() < 0.5
                model.offer(path if whole else tree.cut(path) or path[:1], int(rng.integers(0, 4)))
            elif act == "branch":
                tree.branch()
            elif act == "evict" and not plenty:
                at_hand.evict_some(rng)
            elif act == "restore":
                tokens = path if rng.random() < 0.5 else tree.cut(path)
                keep_last = int(rng.integers(1, 3))
                found, reason = model.restore(tokens, keep_last)
                seen["found" if found else reason] += 1
                if plenty:
                    assert found >= model.least(tokens, keep_last)
    for model in models:
        model.close()
    counters = sum((rank.counters for model in models for rank in model.ranks), Counter())
    expected = {"blobs_put", "blobs_known", "bytes_put", "bytes_raw_fp16"}
    assert set(counters) <= (expected if plenty else expected | {"full"})
    # A test in which nothing was found, or nothing missed, shows little.
    assert min(seen["found"], seen["not_stored"]) > TREES[kinds] // 10, seen
