"""A cache carried from turn to turn, with tokens dropped after each."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from tiny_llama import sharp_llama

from kvferry.codec.base import PageTensors
from kvferry.codec.kept import Kept
from kvferry.codec.lab.forward import logits, prefill
from kvferry.codec.lab.live import compress_live, live_page
from kvferry.codec.mlx.adapters import snapshot
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.registry import make_codec
from kvferry.errors import ModelError

VOCABULARY, LAYERS = 61, 3
DRAWN = np.random.default_rng(8).integers(0, VOCABULARY, 150).tolist()
TURNS = (DRAWN[:70], DRAWN[70:110], DRAWN[110:])


class HidingCache(KVCache):  # type: ignore[misc]
    """Every token held, those at ``hidden`` never attended to."""

    hidden: Any = ()

    def make_mask(self, N: int, **_: Any) -> Any:  # noqa: N803
        seen = ~np.isin(np.arange(self.offset + N), self.hidden)
        return create_causal_mask(N, self.offset) & mx.array(seen)


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama(VOCABULARY)[0]


def rounded(cache: list[Any]) -> None:
    """What a codec of kept tokens does to float32."""
    for layer in cache:
        layer.keys, layer.values = (
            x.astype(mx.float16).astype(mx.float32) for x in (layer.keys, layer.values)
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [("streaming", {"window": 15}), ("random", {"keep": 0.4, "sinks": 4})],
)
def test_turn_by_turn_as_if_what_was_dropped_were_masked(
    model: Any, name: str, options: dict[str, object]
) -> None:
    codec = make_codec(name, {"positions": "original", **options})
    cache, full = make_prompt_cache(model), [HidingCache() for _ in range(LAYERS)]
    sizes, seen = [], 0
    for turn in TURNS:
        for part in (turn[:17], turn[17:18], turn[18:]):
            found, wanted = (np.array(logits(model, part, c)) for c in (cache, full))
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
        before = cache
        cache = compress_live(cache, codec)
        assert [layer.offset for layer in before] == [layer.offset for layer in cache]
        rounded(full)
        seen += len(turn)
        for layer in full:
            layer.hidden = np.setdiff1d(np.arange(seen), cache[0].positions)
        sizes.append(cache[0].entries)
    assert sizes == ([19, 19, 19] if name == "streaming" else [28, 27, 27])


def test_turn_by_turn_as_if_only_the_kept_tokens_had_been_said(model: Any) -> None:
    codec = make_codec("streaming", {"window": 20, "sinks": 3})
    ropes = partial(page_ropes, model, range(LAYERS))
    cache, kept = make_prompt_cache(model), []
    for turn in TURNS:
        prefill(model, turn, cache)
        cache = compress_live(cache, codec, ropes)
        kept += turn
        kept = [*kept[:3], *kept[-20:]]
        assert [(type(layer), layer.offset) for layer in cache] == [(KVCache, 23)] * LAYERS
    alone = make_prompt_cache(model)
    prefill(model, kept, alone)
    # In the first layer keys depend on their own token and position alone.
    first, wanted = (np.array(c[0].keys)[:, :, :23] for c in (cache, alone))
    np.testing.assert_allclose(first, wanted, atol=1e-2)
    assert not np.allclose(*(np.array(c[2].keys)[:, :, :23] for c in (cache, alone)), atol=0.1)


def test_a_cache_is_left_as_it_was_and_an_empty_one_stays_empty(model: Any) -> None:
    codec = make_codec("streaming", {"window": 2, "positions": "original"})
    cache = make_prompt_cache(model)
    assert [layer.offset for layer in compress_live(cache, codec)] == [0] * LAYERS
    prefill(model, DRAWN[:20], cache)
    before = np.array(cache[1].keys)
    made = compress_live(cache, codec)
    logits(model, DRAWN[20:30], made)
    np.testing.assert_array_equal(np.array(cache[1].keys), before)
    assert [type(layer) for layer in cache] == [KVCache] * LAYERS
    assert made[0].entries == 16
    assert made[0].offset == 30


def test_rings_and_packed_layers_are_told_apart(model: Any) -> None:
    ring, plain = RotatingKVCache(max_size=8), KVCache()
    for layer in (ring, plain):
        layer.update_and_fetch(*(mx.ones((1, 2, 12, 16)) for _ in "kv"))
    codec = make_codec("streaming", {"window": 2, "positions": "original"})
    made = compress_live([ring, plain], codec)
    assert (type(made[0]), made[0].offset) == (RotatingKVCache, 12)
    assert (made[1].entries, made[1].offset) == (6, 12)
    again = compress_live(made, codec)
    assert (again[1].entries, again[1].offset) == (6, 12)
    ropes = partial(page_ropes, model, range(1))
    with pytest.raises(ModelError, match="rings"):
        compress_live([ring, plain], make_codec("streaming", {"window": 2}), ropes)
    with pytest.raises(ModelError, match="only KVCache"):
        compress_live([QuantizedKVCache()], codec)


@pytest.mark.parametrize("contiguous", [False, True])
def test_what_entries_stand_for_is_read_back_from_a_live_cache(
    model: Any, contiguous: bool
) -> None:
    cache = make_prompt_cache(model)
    prefill(model, DRAWN[:30], cache)
    taken = snapshot(cache, 30, ropes=partial(page_ropes, model, range(LAYERS)))
    page = taken.page((0, LAYERS), (0, 20)).take(np.array([0, 5, 19]))
    positions = np.broadcast_to(np.array([0, 5, 19]), (LAYERS, 2, 3)).astype(np.int64)
    weights = np.broadcast_to(np.array([1, 9.5, 7], np.float32), (LAYERS, 2, 3))
    kept = Kept(positions, weights, contiguous)
    merged = PageTensors(page.layers, page.heads, page.tokens, page.streams, kept)
    made = make_prompt_cache(model)
    taken.refill(made, [merged, taken.page((0, LAYERS), (20, 30))])
    logits(model, DRAWN[30:34], made)
    found = live_page(made)
    assert found.kept is not None
    assert found.kept.weights is not None
    np.testing.assert_array_equal(found.kept.weights[1, 1], [1, 9.5, 7, *[1] * 14])
    where = [*range(17)] if contiguous else [0, 5, 19, *range(20, 34)]
    np.testing.assert_array_equal(found.kept.positions[2, 0], where)
    assert found.tokens == (0, 32 if contiguous else 34)
