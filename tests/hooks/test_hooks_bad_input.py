"""Bad and odd input over real processes: the right restore, or a miss with a reason.

Caches are filled with rows that say where they belong, so that whatever comes back is
checked against the very tokens that were asked for.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_llama
from mlx_lm.models.cache import BatchKVCache, KVCache, trim_prompt_cache
from model_zoo import save_model
from prefix_trees import assert_belongs, empty_cache, filled_cache

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel, load_model
from kvferry.node.hooks import HookOptions, PrefixCache

pytestmark = pytest.mark.processes
ROWS, RINGS = "kkk", "rkrk"  # the small llama's cache, and gpt-oss's
CONTENT = b"c" * 32
VOCABULARY = 64


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("exact"), nodes=1)
    cluster.set_policy("exact")
    text = cluster.policy_file.read_text()
    cluster.policy_file.write_text(text.replace("min_tokens = 256", "min_tokens = 0"))
    with cluster:
        yield cluster


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("gpt_oss")
    save_model("gpt_oss", folder)
    return load_model(str(folder))


class Hook:
    """A `PrefixCache` all of whose restores are checked."""

    def __init__(self, kinds: str, prefix: PrefixCache) -> None:
        self.kinds, self.prefix = kinds, prefix

    def offer(self, tokens: Any, cache: list[Any] | None = None) -> bool:
        taken = self.prefix.offer(tokens, cache if cache is not None else self.cache(tokens))
        assert self.prefix.flush()
        return taken

    def cache(self, tokens: Sequence[int]) -> list[Any]:
        return filled_cache(self.kinds, CONTENT, tokens)

    def restore(self, tokens: Any) -> int:
        """Tokens that were restored."""
        cache, rest = self.prefix.restore(tokens)
        found = len(tokens) - len(rest)
        assert len(cache) == len(self.kinds)
        assert all(a is b or a == b for a, b in zip(rest, list(tokens)[found:], strict=True))
        if found:
            assert_belongs(self.kinds, cache, CONTENT, [int(t) for t in tokens[:found]])
        else:
            assert all(layer.empty() for layer in cache)
        assert self.report.restored_tokens == found
        return found

    @property
    def report(self) -> Any:
        return self.prefix.last_restore

    @property
    def counters(self) -> dict[str, int]:
        return dict(self.prefix.counters)


@pytest.fixture
def hooks(exact: Cluster, tmp_path: Path) -> Iterator[Any]:
    held: list[PrefixCache] = []

    def make(kinds: str, loaded: LoadedModel, folder: Path = tmp_path, **options: Any) -> Hook:
        given = HookOptions(socket=exact.sockets[0], cache_dir=folder, **options)
        held.append(PrefixCache(loaded, given))
        assert held[-1].ready()
        return Hook(kinds, held[-1])

    yield make
    for prefix in held:
        prefix.close()
        wrong = [name for name in prefix.counters if "bug" in name]
        assert not wrong, prefix.counters


def words(count: int, first: int) -> list[int]:
    """Tokens of one conversation; ``first`` keeps tests apart."""
    rng = np.random.default_rng(first)
    return [first, *(int(t) for t in rng.integers(0, VOCABULARY, max(0, count - 1)))][:count]


EDGES = (1, 2, 3, 255, 256, 257, 258, 383, 384, 385, 512, 513, 640)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_prompts_at_the_edges_of_pages(hooks: Any, tiny: LoadedModel, keep_last: int) -> None:
    hook = hooks(ROWS, tiny, keep_last=keep_last)
    for count in EDGES:
        tokens = words(count, 1000 * keep_last + count)
        assert hook.offer(tokens)
        # The model must be given something, and a longer prompt may have all of it.
        assert hook.restore(tokens) == max(0, count - keep_last)
        assert hook.restore([*tokens, 5, 6, 7]) == count
        # As exo does: the cache holds two tokens less than the prompt.
        tokens = words(count, 5000 + 1000 * keep_last + count)
        assert hook.offer(tokens, hook.cache(tokens[:-2])) == (count > 2)
        assert hook.restore(tokens) == max(0, count - 2)
        if count <= 2:
            assert hook.report.reason == "not_stored"


@pytest.mark.parametrize("keep_last", [1, 2])
def test_states_at_the_edges_of_pages(hooks: Any, rings: LoadedModel, keep_last: int) -> None:
    hook = hooks(RINGS, rings, keep_last=keep_last)
    for count in EDGES:
        tokens = words(count, 10_000 * keep_last + count)
        assert hook.offer(tokens)
        assert hook.restore([*tokens, 5, 6, 7]) == count
        assert hook.restore(tokens) == 0  # it stands at the end, and the last token is wanted
        assert hook.report.reason in ("no_state", "not_stored")
        assert hook.restore([*tokens[:-1], 99, 98, 97]) == 0
        tokens = words(count, 10_000 * keep_last + 5000 + count)
        assert hook.offer(tokens, hook.cache(tokens[:-2])) == (count > 2)
        assert hook.restore(tokens) == max(0, count - 2)


def test_too_short_for_the_policy_is_dropped_and_counted(
    hooks: Any, tiny: LoadedModel, exact: Cluster
) -> None:
    hook = hooks(ROWS, tiny)
    assert not hook.prefix.offer([], [])
    assert hook.counters["drop_short"] == 1
    assert hook.restore([]) == 0
    assert hook.report.reason == "not_stored"
    assert hook.restore([3]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        [-1], [1 << 32], [1 << 64], [1.5], ["a"], [None], [[1, 2]], [1, "a"],
        np.array([1.0, 2.0]), np.array([-5]), np.array([[1, 2]]), mx.array([1.5]),
        mx.array([-1]), mx.array([[1, 2]]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_token_id_is_a_miss_and_not_stored(
    wrong: Any, hooks: Any, tiny: LoadedModel
) -> None:
    hook = hooks(ROWS, tiny)
    tokens = words(300, 77)
    given = [*tokens, *wrong] if isinstance(wrong, list) else wrong
    _, rest = hook.prefix.restore(given)
    assert len(rest) == len(given)
    assert hook.report.reason == "invalid_key"
    assert hook.counters["miss_invalid_key"] == 1
    hook.prefix.offer(given, hook.cache(tokens[:1] * len(given)))
    assert hook.prefix.flush()
    assert hook.counters.get("blobs_put", 0) == 0
    reasons = ("invalid_key", "drop_invalid_key")
    assert sum(hook.counters.get(name, 0) for name in reasons) == 1, hook.counters


@pytest.mark.parametrize(
    "kind", [tuple, np.array, mx.array, lambda t: np.array(t, dtype=np.uint8), list]
)
def test_token_ids_of_any_integer_kind_are_the_same(
    kind: Any, hooks: Any, tiny: LoadedModel
) -> None:
    hook = hooks(ROWS, tiny)
    tokens = words(300, 60)
    assert hook.offer(kind(tokens), hook.cache(tokens))
    assert hook.restore(kind([*tokens, 1])) == 300
    assert hook.restore([*tokens, 2]) == 300


def test_token_ids_beyond_the_vocabulary_are_only_numbers(hooks: Any, tiny: LoadedModel) -> None:
    hook = hooks(ROWS, tiny)
    tokens = [*words(300, 61), 0xFFFF_FFFF, 0, 70_000]
    assert hook.offer(tokens)
    assert hook.restore([*tokens, 1]) == len(tokens)
    assert hook.restore([*tokens[:-1], 70_000 & 0xFFFF, 1]) == 0


@pytest.mark.parametrize("at", [254, 255, 256, 257, 300, 511, 512, 699])
def test_conversations_that_part_within_a_page(
    at: int, hooks: Any, tiny: LoadedModel, rings: LoadedModel
) -> None:
    tokens = words(700, 200 + at)
    fork = [*tokens[:at], tokens[at] ^ 1, *words(400, 3)]
    rows, states = hooks(ROWS, tiny), hooks(RINGS, rings)
    for hook in (rows, states):
        assert hook.offer(tokens)
        first = hook.restore(fork)
        assert first == (at // 256 * 256 if hook is rows else 0)
        assert hook.offer(fork)
        assert hook.restore([*tokens, 1]) in ((700,) if hook is rows else (700, 0))
        assert hook.restore([*fork, 1]) == len(fork)
    assert states.restore([*tokens[:-1], 1]) == 0
    assert states.report.reason == "no_state"


def test_other_weights_under_the_same_name_find_nothing(hooks: Any, tmp_path: Path) -> None:
    model, config = tiny_llama.sharp_llama(VOCABULARY)
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_llama.save_model(model, config, folder)
    weights = folder / "model.safetensors"
    before = weights.stat()
    tokens = words(600, 90)
    first = hooks(ROWS, load_model(str(folder)))
    assert first.offer(tokens)

    model.layers[1].self_attn.k_proj.weight = model.layers[1].self_attn.k_proj.weight * 1.001
    tiny_llama.save_model(model, config, folder)
    # As an archive unpacked over it would: the very size and time of the file before.
    assert weights.stat().st_size == before.st_size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = hooks(ROWS, load_model(str(folder)))
    assert other.prefix.model_id != first.prefix.model_id
    assert other.restore(tokens) == 0
    assert other.report.reason == "not_stored"

    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"b"', '"B"'))
    third = hooks(ROWS, load_model(str(folder)))
    assert third.prefix.model_id not in (first.prefix.model_id, other.prefix.model_id)
    assert third.restore(tokens) == 0
    assert first.restore(tokens) == 599


def test_a_cache_of_several_sequences_is_refused(hooks: Any, tiny: LoadedModel) -> None:
    hook = hooks(ROWS, tiny)
    tokens = words(300, 91)
    both = hook.cache(tokens)
    for layer in both:
        layer.keys = mx.concatenate([layer.keys, layer.keys])
        layer.values = mx.concatenate([layer.values, layer.values])
    assert not hook.offer(tokens, both)
    single = [hook.cache(tokens), hook.cache(words(300, 92))]
    merged = [BatchKVCache.merge(list(pair)) for pair in zip(*single, strict=True)]
    assert not hook.offer(tokens, merged)
    assert hook.counters["drop_model"] == 2
    assert hook.restore(tokens) == 0


def test_an_interrupted_prefill_gives_what_there_is(
    hooks: Any, tiny: LoadedModel, rings: LoadedModel
) -> None:
    tokens = words(900, 93)
    for hook in (hooks(ROWS, tiny), hooks(RINGS, rings)):
        assert hook.offer(tokens, hook.cache(tokens[:520]))
        assert hook.restore(tokens) == 520

        # Stopped between two layers: nobody can say what such a cache holds.
        torn = hook.cache(tokens[:640])
        torn[-1] = hook.cache(tokens[:600])[-1]
        dropped = hook.counters.get("drop_model", 0)
        assert not hook.offer(tokens, torn)
        assert hook.counters["drop_model"] == dropped + 1
        assert hook.restore(tokens) == 520


def test_a_cache_that_went_on_beyond_the_tokens(
    hooks: Any, tiny: LoadedModel, rings: LoadedModel
) -> None:
    tokens = words(900, 94)
    rows, states = hooks(ROWS, tiny), hooks(RINGS, rings)
    assert rows.offer(tokens[:600], rows.cache(tokens))
    assert rows.restore(tokens) == 600
    # Rings of token 900 say nothing of token 600.
    states.offer(tokens[:600], states.cache(tokens))
    assert states.restore(tokens) == 0
    assert states.report.reason == "no_state"
    assert states.offer(tokens[:640])
    assert states.restore(tokens) == 640


def test_a_ring_of_another_position_is_refused(hooks: Any, rings: LoadedModel) -> None:
    hook = hooks(RINGS, rings)
    tokens = words(400, 95)
    cache = hook.cache(tokens)
    cache[0] = hook.cache(tokens[:399])[0]
    assert not hook.offer(tokens, cache)
    assert hook.counters["drop_model"] == 1
    assert hook.restore(tokens) == 0


def test_empty_caches_are_not_taken(hooks: Any, tiny: LoadedModel, rings: LoadedModel) -> None:
    for hook in (hooks(ROWS, tiny), hooks(RINGS, rings)):
        assert not hook.offer(words(300, 96), empty_cache(hook.kinds))
        assert not hook.offer([], hook.cache(words(300, 96)))
        assert not hook.offer(words(300, 96), [])
        assert not hook.offer(words(300, 96), [KVCache()])
        assert hook.restore(words(300, 96)) == 0


def test_the_same_offer_twice_writes_its_pages_once(
    hooks: Any, tiny: LoadedModel, rings: LoadedModel
) -> None:
    tokens = words(700, 97)
    for hook in (hooks(ROWS, tiny), hooks(RINGS, rings)):
        assert hook.offer(tokens)
        put = hook.counters["blobs_put"]
        assert hook.offer(tokens)
        # Of the tail and its states the store alone knows.
        assert hook.counters["blobs_put"] - put <= (1 if hook.kinds == ROWS else 2)
        assert hook.restore([*tokens, 1]) == 700


def test_a_cache_that_is_trimmed_and_written_over_after_the_offer(
    hooks: Any, tiny: LoadedModel
) -> None:
    hook = hooks(ROWS, tiny)
    tokens, others = words(700, 98), words(700, 99)
    cache = hook.cache(tokens)
    assert hook.prefix.offer(tokens, cache)
    trim_prompt_cache(cache, 500)
    for mine, other in zip(cache, hook.cache(others), strict=True):
        mine.update_and_fetch(other.keys[:, :, 200:700], other.values[:, :, 200:700])
    mx.eval([layer.keys for layer in cache])
    assert hook.prefix.flush()
    assert hook.restore([*tokens, 1]) == 700


def test_a_restored_cache_that_is_used_for_another_conversation(
    hooks: Any, tiny: LoadedModel
) -> None:
    hook = hooks(ROWS, tiny)
    tokens, others = words(700, 101), words(700, 102)
    assert hook.offer(tokens)
    cache, rest = hook.prefix.restore(tokens)
    assert len(rest) == 1
    trim_prompt_cache(cache, 699)
    for mine, other in zip(cache, hook.cache(others), strict=True):
        mine.update_and_fetch(other.keys[:, :, :700], other.values[:, :, :700])
    assert hook.offer(others, cache)
    assert hook.restore([*others, 1]) == 700
    assert hook.restore([*tokens, 1]) == 700
