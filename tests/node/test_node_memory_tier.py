"""The memory tier stays within its budget at every moment."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from node_samples import MODEL, ROOT, digest

from kvferry.cluster.repository import BlobInfo, CodecInfo
from kvferry.node.memory_tier import MemoryBlob, MemoryTier, Reservation
from kvferry.proto.keys import BlobKey

BUDGET = 1000


def held(number: int, size: int, expires: float = 0.0) -> MemoryBlob:
    """A blob that is none, of the right size."""
    key = BlobKey("page", digest(number % 5), (number, number + 1), (0, 1), f"raw.1-{'0' * 16}")
    info = BlobInfo(
        key=key,
        size=size,
        codec=CodecInfo(name="raw", version=1),
        model_id=MODEL,
        previous_key=ROOT,
        tokens=(0, 256),
        layers=key.layers,
        heads=key.heads,
        model_layers=64,
        model_heads=1,
    )
    return MemoryBlob(info, bytes(size), expires)


class Budget(RuleBasedStateMachine):
    """Puts, reads, pins and deletes in any order, beside a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.tier = MemoryTier(BUDGET, clock=lambda: self.now)
        self.writing: list[tuple[Reservation, MemoryBlob]] = []
        self.pinned: dict[BlobKey, int] = {}

    @rule(number=st.integers(0, 12), size=st.integers(0, 600))
    def begin(self, number: int, size: int) -> None:
        room = self.tier.reserve(size)
        flying = sum(r.size for r, _ in self.writing)
        if flying + sum(self.pinned.values()) + size <= BUDGET:
            assert room is not None
        if room is not None:
            self.writing.append((room, held(number, size)))

    @precondition(lambda self: bool(self.writing))
    @rule(data=st.data(), pin=st.booleans())
    def end(self, data: st.DataObject, pin: bool) -> None:
        at = data.draw(st.integers(0, len(self.writing) - 1))
        room, blob = self.writing.pop(at)
        key = blob.info.key
        if room.commit(blob, pin):
            assert self.tier.get(key) is blob
        kept = self.tier.get(key)
        assert kept is not None
        if pin:
            self.pinned[key] = len(kept.data)

    @precondition(lambda self: bool(self.writing))
    @rule(twice=st.booleans())
    def give_up(self, twice: bool) -> None:
        room, _ = self.writing.pop()
        room.release()
        if twice:
            room.release()

    @precondition(lambda self: bool(self.pinned))
    @rule()
    def uploaded(self) -> None:
        key, _ = self.pinned.popitem()
        self.tier.unpin(key)

    @rule(number=st.integers(0, 12))
    def remove(self, number: int) -> None:
        key = held(number, 1).info.key
        self.tier.remove(key)
        self.pinned.pop(key, None)
        assert key not in self.tier

    @invariant()
    def within_budget(self) -> None:
        infos = list(self.tier.infos())
        assert self.tier.held_bytes == sum(i.size for i in infos)
        assert self.tier.in_flight_bytes == sum(r.size for r, _ in self.writing)
        assert self.tier.held_bytes + self.tier.in_flight_bytes <= BUDGET

    @invariant()
    def pinned_stay(self) -> None:
        assert all(key in self.tier for key in self.pinned)

    @invariant()
    def pages_are_known(self) -> None:
        by_page = [i.key for n in range(5) for i in self.tier.of_page(digest(n))]
        assert sorted(by_page) == sorted(i.key for i in self.tier.infos())


TestBudget: Any = Budget.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def put(tier: MemoryTier, blob: MemoryBlob) -> bool:
    room = tier.reserve(len(blob.data))
    return room is not None and room.commit(blob)


def test_least_recently_used_goes_first() -> None:
    tier = MemoryTier(BUDGET)
    first, second, third = (held(n, 400) for n in range(3))
    put(tier, first)
    put(tier, second)
    tier.get(first.info.key)
    put(tier, third)
    assert [b.info.key in tier for b in (first, second, third)] == [True, False, True]


def test_what_has_expired_is_not_there() -> None:
    now = [100.0]
    tier = MemoryTier(BUDGET, clock=lambda: now[0])
    blob = held(1, 10, expires=200.0)
    put(tier, blob)
    assert tier.get(blob.info.key) is blob
    now[0] = 200.0
    assert tier.get(blob.info.key) is None
    assert tier.held_bytes == 0


def test_a_reservation_is_for_exactly_its_size() -> None:
    room = MemoryTier(BUDGET).reserve(10)
    assert room is not None
    with pytest.raises(ValueError, match="reserved"):
        room.commit(held(1, 11))
