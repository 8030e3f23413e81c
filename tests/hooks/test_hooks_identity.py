"""Ranks with different layers arrive at one model id, or all at the same refusal."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest

from kvferry.errors import ModelError
from kvferry.node.hooks.identity import agreed_model_id
from kvferry.proto.identity import ModelFingerprint, model_id

T = TypeVar("T")


def digest(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def part(layers: range) -> ModelFingerprint:
    return ModelFingerprint(
        config={"hidden_size": 576},
        layers={i: digest(f"layer{i}") for i in layers},
        layer_count=6,
        shared={"embedding": digest("embedding"), "norm": digest("norm")},
        tokenizer=digest("tokenizer"),
        rope={i: digest("rope") for i in layers},
    )


@dataclass
class ThreadRanks:
    """Collectives among threads: every rank must enter, as with the real ones."""

    size: int
    barrier: threading.Barrier = field(init=False)
    slots: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=10)
        self.slots = [b""] * self.size

    def run(self, work: Callable[["ThreadRank"], T]) -> list[T]:
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(work, ThreadRank(self, r)) for r in range(self.size)]
            return [f.result() for f in futures]


@dataclass
class ThreadRank:
    ranks: ThreadRanks
    rank: int

    @property
    def size(self) -> int:
        return self.ranks.size

    def all_gather(self, data: bytes) -> list[bytes]:
        self.ranks.slots[self.rank] = data
        self.ranks.barrier.wait()
        everyone = list(self.ranks.slots)
        self.ranks.barrier.wait()
        assert len({len(d) for d in everyone}) == 1
        return everyone

    def all_min(self, values: Sequence[int]) -> list[int]:
        raise NotImplementedError

    def all_values(self, values: Sequence[int]) -> list[list[int]]:
        raise NotImplementedError


WHOLE = model_id(part(range(6)))


@pytest.mark.parametrize(
    "split", [[range(6)], [range(4), range(4, 6)], [range(2), range(2, 3), range(3, 6)]]
)
def test_any_split_gives_the_same_model_id(split: list[range]) -> None:
    ids = ThreadRanks(len(split)).run(lambda r: agreed_model_id(r, part(split[r.rank]), 6))
    assert ids == [WHOLE] * len(split)


def test_until_every_rank_is_ready_nobody_has_an_id() -> None:
    ready = {0: part(range(3)), 1: None}
    assert ThreadRanks(2).run(lambda r: agreed_model_id(r, ready[r.rank], 6)) == [None, None]


def _refusals(parts: list[ModelFingerprint]) -> list[str]:
    def work(rank: ThreadRank) -> str:
        with pytest.raises(ModelError) as caught:
            agreed_model_id(rank, parts[rank.rank], 6)
        return str(caught.value)

    return ThreadRanks(2).run(work)


def test_another_tokenizer_on_one_rank_is_refused_on_all() -> None:
    other = replace(part(range(3, 6)), tokenizer=digest("another"))
    assert all("tokenizer" in text for text in _refusals([part(range(3)), other]))


def test_two_versions_of_one_layer_are_refused_on_all() -> None:
    other = part(range(2, 6))
    other = replace(other, layers={**other.layers, 2: digest("tampered")})
    assert all("different weights" in text for text in _refusals([part(range(3)), other]))


def test_a_layer_that_nobody_holds_is_refused_on_all() -> None:
    texts = _refusals([part(range(3)), part(range(4, 6))])
    assert all("3" in text for text in texts)
