"""Ranks that fail in different ways act alike, and never on less than all of them have."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import go_on, prefilled, save_model, tokens_of

from kvferry.cli.demo.cluster import Cluster
from kvferry.cluster.repository import ListQuery
from kvferry.codec.mlx import refill
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.errors import BlobNotFoundError, FerryError
from kvferry.node.client import NodeClient
from kvferry.node.hooks import HookOptions, PrefixCache
from kvferry.node.tails import Tails
from kvferry.proto.keys import BlobKey

pytestmark = pytest.mark.processes
NODES = 3
FIRST, SECOND = 300, 700
SPLITS = {2: [(0, 1), (1, 4)], 3: [(0, 1), (1, 3), (3, 4)]}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def cluster(exact_cluster: Cluster) -> Cluster:
    return exact_cluster


class Together:
    """Collectives among threads of one process: nobody goes on before all have come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._given: list[Any] = [None] * size

    def exchange(self, rank: int, given: Any) -> list[Any]:
        self._given[rank] = given
        self._barrier.wait(WAIT_S)
        everyone = list(self._given)
        self._barrier.wait(WAIT_S)
        return everyone


class Rank:
    """One member's view; counts its collectives."""

    def __init__(self, together: Together, rank: int) -> None:
        self._together, self.rank, self.size = together, rank, together.size
        self.entered = 0

    def all_min(self, values: Sequence[int]) -> list[int]:
        return [min(column) for column in zip(*self.all_values(values), strict=True)]

    def all_values(self, values: Sequence[int]) -> list[list[int]]:
        self.entered += 1
        return self._together.exchange(self.rank, list(values))

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._together.exchange(self.rank, data)


class Faulty:
    """A node client whose answers for some kinds of blobs go wrong."""

    def __init__(self, client: NodeClient, fault: str, wrong: Callable[[BlobKey], bool]) -> None:
        self._client, self._fault, self._wrong = client, fault, wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, Any], None, None]:
        for key, answer in self._client.get_each(keys, deadline_s):
            if not self._wrong(key) or isinstance(answer, FerryError):
                yield key, answer
            elif self._fault == "missing":
                yield key, BlobNotFoundError(str(key))
            elif self._fault == "corrupt":
                data = bytearray(answer)
                data[len(data) // 2] ^= 1
                yield key, bytes(data)
            else:  # slow: the deadline passes, and there is no answer
                time.sleep(min(deadline_s, 1.0))

    def lookup(self, query: Any) -> Any:
        if self._fault == "raises":
            raise RuntimeError("a bug of ours")
        return self._client.lookup(query)


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "lfm2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_model(request.param, folder)
    return load_model(str(folder))


class Ranks:
    """The ranks of one model, each with a daemon of its own."""

    def __init__(self, cluster: Cluster, loaded: LoadedModel, size: int, folder: Path) -> None:
        self.model = loaded.model
        together = Together(size)
        self.groups = [Rank(together, rank) for rank in range(size)]
        self._pool = ThreadPoolExecutor(size)

        def open_rank(rank: int) -> PrefixCache:
            layers = SPLITS[size][rank]
            options = HookOptions(
                socket=cluster.sockets[rank],
                cache_dir=folder / f"rank{rank}",
                gather_tokens=0,
                max_restore_s=5.0,
            )
            return PrefixCache(
                loaded,
                options,
                group=self.groups[rank],
                layers=layers,
                make_cache=lambda: make_prompt_cache(self.model)[slice(*layers)],
            )

        self.layers = SPLITS[size]
        self.prefixes = [open_rank(rank) for rank in range(size)]
        assert all(self.each(lambda rank: self.prefixes[rank].ready()))

    def each(self, run: Callable[[int], Any]) -> list[Any]:
        """On all ranks at once."""
        return [
            future.result(WAIT_S)
            for future in [self._pool.submit(run, rank) for rank in range(len(self.groups))]
        ]

    def offer(self, tokens: list[int]) -> None:
        cache = prefilled(self.model, tokens)
        for prefix, layers in zip(self.prefixes, self.layers, strict=True):
            assert prefix.offer(tokens, cache[slice(*layers)])
            assert prefix.flush()

    def restore(self, tokens: list[int]) -> tuple[list[Any], int]:
        """(whole cache, tokens in it); all ranks must have gone the same way."""
        before = [group.entered for group in self.groups]
        answers = self.each(lambda rank: self.prefixes[rank].restore(tokens))
        entered = {g.entered - b for g, b in zip(self.groups, before, strict=True)}
        assert len(entered) == 1
        self.collectives = entered.pop()
        rests = [rest for _, rest in answers]
        assert all(rest == rests[0] for rest in rests)
        return [layer for cache, _ in answers for layer in cache], len(tokens) - len(rests[0])

    def close(self) -> None:
        for prefix in self.prefixes:
            prefix.close()
        self._pool.shutdown()


@pytest.fixture
def ranks(
    request: pytest.FixtureRequest, cluster: Cluster, loaded: LoadedModel, tmp_path: Path
) -> Iterator[Ranks]:
    made = Ranks(cluster, loaded, request.param, tmp_path)
    yield made
    made.close()


def continues(ranks: Ranks, tokens: list[int], cache: list[Any], held: int) -> None:
    """With the exact codec the answer is that of a run without us."""
    whole = prefilled(ranks.model, tokens[:held]) if held else make_prompt_cache(ranks.model)
    rest = tokens[held:]
    np.testing.assert_array_equal(
        go_on(ranks.model, cache, rest, [len(rest)]), go_on(ranks.model, whole, rest, [len(rest)])
    )


@pytest.mark.parametrize("ranks", [2, 3], indirect=True)
@pytest.mark.parametrize("fault", ["missing", "corrupt", "slow", "raises"])
def test_one_rank_that_fails_takes_all_to_the_same_place(ranks: Ranks, fault: str) -> None:
    hybrid = bool(ranks.prefixes[0]._part.shape.states)
    seed = {"missing": 1, "corrupt": 2, "slow": 3, "raises": 4}[fault] + 10 * len(ranks.groups)
    tokens = tokens_of(SECOND + 20, seed=seed)
    ranks.offer(tokens[:FIRST])
    for prefix in ranks.prefixes:  # or the next turn would take the place of the first
        prefix._offers._tails = Tails()
    ranks.offer(tokens[:SECOND])
    cache, held = ranks.restore(tokens)
    assert (held, ranks.collectives) == (SECOND, 2)
    continues(ranks, tokens, cache, held)

    # From now on the last rank cannot have what lies behind the second page.
    late = {key for key in _keys(ranks, tokens) if key.kind != "page"}
    prefix = ranks.prefixes[-1]
    prefix._client = Faulty(prefix._client, fault, lambda key: key in late)  # type: ignore[assignment]
    cache, held = ranks.restore(tokens)
    if fault == "raises":
        assert held == 0
    elif hybrid:
        assert held in (0, FIRST)
        assert fault == "slow" or held == FIRST
    else:
        assert held == 512
    continues(ranks, tokens, cache, held)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_rank_that_cannot_fill_its_cache_takes_all_to_prefill(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(FIRST, seed=99)
    assert ranks.restore(tokens)[1] == 0
    assert ranks.collectives == 1  # nobody had anything
    ranks.offer(tokens)
    fill = refill.restore

    def broken(cache: Any, *args: Any, **given: Any) -> int:
        if len(cache) == 3:  # the last rank's layers
            raise RuntimeError("a bug of ours")
        return fill(cache, *args, **given)

    monkeypatch.setattr(refill, "restore", broken)
    cache, held = ranks.restore(tokens)
    assert held == 0
    continues(ranks, tokens, cache, held)


def _keys(ranks: Ranks, tokens: list[int]) -> list[BlobKey]:
    """Blobs that stand at ``SECOND``."""
    found: list[BlobKey] = []
    with NodeClient(ranks.prefixes[-1].options.socket) as client:
        model_id = ranks.prefixes[0].model_id
        assert model_id is not None
        for kind in ("tail", "state"):
            listed = client.list(ListQuery(model_id=model_id, kind=kind))
            found += [info.key for info in listed if info.tokens[1] == SECOND]
    return found
