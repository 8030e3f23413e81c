"""A model goes on from a cache that lacks tokens as it should."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from tiny_llama import sharp_llama

from kvferry.codec.base import PageTensors, Stream
from kvferry.codec.kept import Kept
from kvferry.codec.lab.coding import Coder, GroupSource
from kvferry.codec.lab.forward import logits, prefill
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.gapped_cache import GappedKVCache
from kvferry.codec.mlx.parts import length
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.mlx.weighted_attention import weighted_attention
from kvferry.codec.registry import make_codec
from kvferry.errors import ModelError

VOCABULARY, LAYERS, CONTEXT, TAIL, MORE = 61, 3, 90, 12, 21


class HidingCache(KVCache):  # type: ignore[misc]
    """Every token held, those at ``hidden`` never attended to."""

    hidden: Any

    def make_mask(self, N: int, **_: Any) -> Any:  # noqa: N803
        seen = ~np.isin(np.arange(self.offset + N), self.hidden)
        return create_causal_mask(N, self.offset) & mx.array(seen)


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama(VOCABULARY)[0]


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    drawn = np.random.default_rng(5).integers(0, VOCABULARY, CONTEXT + TAIL + MORE)
    return [int(token) for token in drawn]


def taken(model: Any, tokens: list[int]) -> tuple[list[Any], CacheSnapshot]:
    cache = make_prompt_cache(model)
    prefill(model, tokens[: CONTEXT + TAIL], cache)
    for layer in cache:  # what float16 holds exactly, since kept tokens are stored so
        layer.keys, layer.values = (
            x.astype(mx.float16).astype(mx.float32) for x in (layer.keys, layer.values)
        )
    ropes = partial(page_ropes, model, range(LAYERS))
    return cache, adapters.snapshot(cache, CONTEXT + TAIL, ropes=ropes)


def dropped(model: Any, snapshot: CacheSnapshot, name: str, **options: object) -> list[Any]:
    coder = Coder(bytes(32), {(0, LAYERS): make_codec(name, options)}, GroupSource(), 2)
    pages = coder.run(snapshot, (0, CONTEXT), 16).pages
    assert len(pages) == 1
    cache = make_prompt_cache(model)
    snapshot.refill(cache, [*pages, snapshot.page((0, LAYERS), (CONTEXT, CONTEXT + TAIL))])
    return cache


def said(model: Any, cache: list[Any], tokens: list[int]) -> np.ndarray:
    """In one go, then one by one."""
    parts = [logits(model, tokens[:13], cache)]
    parts += [logits(model, [token], cache) for token in tokens[13:]]
    return np.concatenate([np.array(part) for part in parts])


@pytest.mark.parametrize(
    ("name", "options"),
    [("streaming", {"window": 20}), ("random", {"keep": 0.3, "seed": 4, "sinks": 2})],
)
def test_original_positions_equal_a_mask_over_what_was_dropped(
    model: Any, tokens: list[int], name: str, options: dict[str, object]
) -> None:
    full, snapshot = taken(model, tokens)
    cache = dropped(model, snapshot, name, positions="original", **options)
    assert all(isinstance(layer, GappedKVCache) for layer in cache)
    kept = cache[0].positions
    assert (cache[0].offset, len(kept)) == (CONTEXT + TAIL, cache[0].entries)
    assert TAIL < len(kept) < 45
    for layer in full:
        layer.__class__ = HidingCache
        layer.hidden = np.setdiff1d(np.arange(CONTEXT + TAIL), kept)
    follows = tokens[CONTEXT + TAIL :]
    np.testing.assert_allclose(
        said(model, cache, follows), said(model, full, follows), rtol=1e-3, atol=1e-3
    )
    assert cache[0].offset == CONTEXT + TAIL + MORE
    assert cache[0].positions[-1] == CONTEXT + TAIL + MORE - 1


def test_contiguous_positions_are_those_of_the_kept_tokens_alone(
    model: Any, tokens: list[int]
) -> None:
    _, snapshot = taken(model, tokens)
    cache = dropped(model, snapshot, "random", keep=0.4)
    assert [type(layer) for layer in cache] == [KVCache] * LAYERS
    original = dropped(model, snapshot, "random", keep=0.4, positions="original")
    kept = original[0].positions
    alone = make_prompt_cache(model)
    prefill(model, [tokens[at] for at in kept], alone)
    assert length(cache) == length(alone) == len(kept)
    # In the first layer keys depend on their own token and position alone.
    np.testing.assert_allclose(
        np.array(cache[0].keys)[:, :, : len(kept)],
        np.array(alone[0].keys)[:, :, : len(kept)],
        atol=4e-3,
    )


def test_a_window_alone_means_the_same_at_either_positions(model: Any, tokens: list[int]) -> None:
    _, snapshot = taken(model, tokens)
    follows = tokens[CONTEXT + TAIL :]
    both = [
        said(model, dropped(model, snapshot, "streaming", sinks=0, window=25, positions=p), follows)
        for p in ("original", "contiguous")
    ]
    np.testing.assert_allclose(*both, rtol=2e-3, atol=2e-3)


def test_keeping_all_is_the_cache_as_it_was(model: Any, tokens: list[int]) -> None:
    full, snapshot = taken(model, tokens)
    follows = tokens[CONTEXT + TAIL :]
    wanted = said(model, full, follows)
    for place in ("original", "contiguous"):
        cache = dropped(model, snapshot, "streaming", ratio=1, positions=place)
        assert [type(layer) for layer in cache] == [KVCache] * LAYERS
        np.testing.assert_array_equal(said(model, cache, follows), wanted)


def weighted_page(snapshot: CacheSnapshot, seed: int = 0) -> tuple[PageTensors, np.ndarray]:
    """Of each layer and head, other entries with other counts; and what they add up to."""
    rng = np.random.default_rng(seed)
    exact = snapshot.page((0, LAYERS), (0, CONTEXT))
    chosen = np.sort(rng.integers(0, CONTEXT, (LAYERS, 2, 8)), axis=-1)
    counts = rng.integers(1, 7, (LAYERS, 2, 8))
    counts[:, :, 7] = 0
    streams = {
        name: Stream(name, np.take_along_axis(s.data, chosen[..., None], axis=2), s.dtype)
        for name, s in exact.streams.items()
    }
    kept = Kept(chosen.astype(np.int64), counts.astype(np.float32))
    return PageTensors((0, LAYERS), (0, 2), (0, CONTEXT), streams, kept), counts


def test_an_entry_weighs_as_much_as_the_copies_it_stands_for(model: Any, tokens: list[int]) -> None:
    _, snapshot = taken(model, tokens)
    page, counts = weighted_page(snapshot)
    tail = snapshot.page((0, LAYERS), (CONTEXT, CONTEXT + TAIL))
    cache = make_prompt_cache(model)
    snapshot.refill(cache, [page, tail])
    layer = cache[1]
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((1, 4, 3, 16)).astype(np.float32)
    new = [mx.array(rng.standard_normal((1, 2, 3, 16)).astype(np.float32)) for _ in "kv"]
    with weighted_attention(model):
        keys, values = layer.update_and_fetch(*new)
        found = llama.scaled_dot_product_attention(
            mx.array(queries), keys, values, cache=layer, scale=0.25, mask="causal"
        )
    for head in range(4):
        copies = [*counts[1, head // 2], *[1] * (TAIL + 3)]
        k, v = (
            np.repeat(np.array(x, dtype=np.float64)[0, head // 2], copies, axis=0)
            for x in (keys, values)
        )
        for row in range(3):
            seen = len(k) - 2 + row
            scores = np.exp(0.25 * queries[0, head, row] @ k[:seen].T)
            np.testing.assert_allclose(
                np.array(found)[0, head, row],
                scores @ v[:seen] / scores.sum(),
                rtol=1e-4,
                atol=1e-5,
            )


def test_a_model_goes_on_from_weighted_entries_chunk_by_chunk_or_token_by_token(
    model: Any, tokens: list[int]
) -> None:
    _, snapshot = taken(model, tokens)
    page, _ = weighted_page(snapshot)
    tail = snapshot.page((0, LAYERS), (CONTEXT, CONTEXT + TAIL))
    follows = tokens[CONTEXT + TAIL :]
    found = []
    for sizes in ([len(follows)], [1] * len(follows)):
        cache = make_prompt_cache(model)
        assert snapshot.refill(cache, [page, tail]) == CONTEXT + TAIL
        at, parts = 0, []
        for size in sizes:
            parts.append(np.array(logits(model, follows[at : at + size], cache)))
            at += size
        found.append(np.concatenate(parts))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)
    assert llama.scaled_dot_product_attention is scaled_dot_product_attention


def test_weights_that_attention_would_leave_out_are_an_error(model: Any, tokens: list[int]) -> None:
    _, snapshot = taken(model, tokens)
    page, _ = weighted_page(snapshot)
    cache = make_prompt_cache(model)
    snapshot.refill(cache, [page, snapshot.page((0, LAYERS), (CONTEXT, CONTEXT + TAIL))])
    model(mx.array([[1]]), cache=cache)
    with pytest.raises(ModelError, match="weighted_attention"):
        model(mx.array([[1]]), cache=cache)
    with pytest.raises(ZeroDivisionError), weighted_attention(model):
        raise ZeroDivisionError
    assert llama.scaled_dot_product_attention is scaled_dot_product_attention


def test_what_came_later_can_be_taken_back(model: Any, tokens: list[int]) -> None:
    _, snapshot = taken(model, tokens)
    cache = dropped(model, snapshot, "streaming", window=9, positions="original")
    follows = tokens[CONTEXT + TAIL :]
    once = said(model, cache, follows)
    assert [layer.trim(MORE) for layer in cache] == [MORE] * LAYERS
    np.testing.assert_allclose(said(model, cache, follows), once, rtol=1e-4, atol=1e-4)
    assert cache[0].trim(1000) == MORE


def test_a_sliding_window_counts_tokens_and_not_entries() -> None:
    held = KVCache()
    held.update_and_fetch(*(mx.zeros((1, 1, 4, 2)) for _ in "kv"))
    cache = GappedKVCache.of(held, 10, np.array([0, 1, 7, 9]), None)
    mask = np.array(cache.make_mask(2, window_size=4))
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]])


def test_caches_that_cannot_hold_gaps_are_left_as_they_were(model: Any, tokens: list[int]) -> None:
    _, snapshot = taken(model, tokens)
    coder = Coder(
        bytes(32),
        {(0, LAYERS): make_codec("streaming", {"positions": "original"})},
        GroupSource(),
        2,
    )
    pages = [
        *coder.run(snapshot, (0, CONTEXT)).pages,
        snapshot.page((0, LAYERS), (CONTEXT, CONTEXT + TAIL)),
    ]
    packed = [QuantizedKVCache() for _ in range(LAYERS)]
    with pytest.raises(ModelError, match="only KVCache"):
        snapshot.refill(packed, pages)
    assert all(layer.offset == 0 for layer in packed)
    with pytest.raises(ModelError, match="give a list"):
        snapshot.refill(tuple(make_prompt_cache(model)), pages)
    with pytest.raises(ModelError, match="not supported"):
        adapters.snapshot(dropped(model, snapshot, "streaming", positions="original"), 20)
