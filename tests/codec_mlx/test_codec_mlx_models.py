"""Every kind of cache that mlx-lm's models make: stored, restored, and the model goes on."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from model_zoo import CONFIGS, config_of, go_on, model_of, prefilled, tokens_of

from kvferry.codec.affine import AffineCodec
from kvferry.codec.base import NoCalibrations, PageTensors
from kvferry.codec.blob import BlobMeta, decode_blob, encode_blob
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.leaves import cache_form
from kvferry.codec.mlx.parts import length
from kvferry.codec.mlx.probe import describe, describe_config
from kvferry.codec.mlx.refill import restore
from kvferry.codec.mlx.rope import page_ropes
from kvferry.codec.raw import ZstdCodec
from kvferry.errors import ModelError

MODEL_ID, ROOT = b"m" * 32, b"r" * 32
STEPS = [3, 1, 1, 15]
HYBRID = ("lfm2", "gpt_oss", "gemma3_text", "qwen3_next", "qwen3_5", "nemotron_h")


def through_blobs(pages: list[PageTensors], kind: str, codec: Any) -> list[PageTensors]:
    meta = BlobMeta(
        kind=kind,
        model_id=MODEL_ID,
        page_key=b"p" * 32,
        previous_key=ROOT,
        model_layers=64,
        model_heads=8,
    )
    found = []
    for page in pages:
        key, data = encode_blob(codec, page, meta)
        back = decode_blob(
            data,
            key=key,
            model_id=MODEL_ID,
            tokens=page.tokens,
            cut=None,
            calibrations=NoCalibrations(),
        )
        found.append(back)
    return found


def stored(model: Any, name: str, cache: list[Any], held: int, codec: Any) -> dict[str, Any]:
    shape = describe(model, config_of(name))
    snapshot = adapters.snapshot(cache, held, latent=shape.latent)
    spans = [(at, min(held, at + 256)) for at in range(0, held, 256)]
    pages = [snapshot.page(snapshot.layers, span) for span in spans]
    states = list(snapshot.state_pages((0, held)))
    return {
        "pages": through_blobs(pages, "page", codec),
        "states": through_blobs(states, "state", ZstdCodec()),
        "tokens": held,
    }


@pytest.mark.parametrize("held", [17, 300])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_goes_on_from_a_restored_cache_as_if_nothing_had_happened(
    name: str, held: int
) -> None:
    model, tokens = model_of(name), tokens_of(held + 20)
    cache = prefilled(model, tokens[:held])
    kept = stored(model, name, cache, held, ZstdCodec())
    fresh = make_prompt_cache(model)
    assert restore(fresh, **kept) == held
    assert length(fresh) in (held, None)
    unbroken = go_on(model, cache, tokens[held:], STEPS)
    np.testing.assert_array_equal(go_on(model, fresh, tokens[held:], STEPS), unbroken)
    # And the cache does matter to this model, or the test shows nothing.
    other = prefilled(model, tokens_of(held, seed=1))
    assert np.abs(go_on(model, other, tokens[held:], STEPS) - unbroken).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_bits_change_the_next_logits_by_little(name: str) -> None:
    model, tokens = model_of(name), tokens_of(320)
    cache = prefilled(model, tokens[:300])
    fresh = make_prompt_cache(model)
    restore(fresh, **stored(model, name, cache, 300, AffineCodec(8)))
    exact = go_on(model, cache, tokens[300:], STEPS)
    found = go_on(model, fresh, tokens[300:], STEPS)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_model_holds_is_told_without_its_weights(name: str) -> None:
    model = model_of(name)
    live, told = describe(model, config_of(name)), describe_config(config_of(name))
    assert live == told
    cache = prefilled(model, tokens_of(40))
    snapshot = adapters.snapshot(cache, 40, latent=live.latent)
    page = snapshot.page(snapshot.layers, (0, 40))
    assert snapshot.layers == (0, live.layers)
    assert snapshot.heads == (0, live.kv_heads)
    found = {name: (s.data.shape[1], s.data.shape[3]) for name, s in page.streams.items()}
    assert found == {name: (s.heads, s.dim) for name, s in live.streams.items()}
    states = list(snapshot.state_pages((0, 40)))
    assert sum(p.layers[1] - p.layers[0] for p in states) == len(live.states)
    assert bool(live.states) == (name in HYBRID)
    assert len(page_ropes(model, live.page_layers)) == live.layers


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_hold_together_what_one_holds(name: str, cut: int) -> None:
    model = model_of(name)
    shape = describe(model, config_of(name))
    cache = prefilled(model, tokens_of(50))
    whole = adapters.snapshot(cache, 50, latent=shape.latent)
    pages, states = [], []
    for layers in ((0, cut), (cut, 4)):
        span = shape.span(layers)
        part = adapters.snapshot(
            cache[slice(*span.entries)],
            50,
            span.pages[0],
            latent=shape.latent,
            state_start=span.states[0],
        )
        assert (part.layers, part.states) == (span.pages, span.states)
        if part.layers[0] < part.layers[1]:
            pages.append(part.page(part.layers, (0, 50)))
        states += list(part.state_pages((0, 50)))
    for name_, stream in whole.page(whole.layers, (0, 50)).streams.items():
        joined = np.concatenate([page.streams[name_].data for page in pages])
        np.testing.assert_array_equal(joined, stream.data)
    # States stored by two ranks restore on one.
    fresh = make_prompt_cache(model)
    restore(fresh, [whole.page(whole.layers, (0, 50))], states=states, tokens=50)
    more = tokens_of(5, seed=9)
    np.testing.assert_array_equal(
        go_on(model, fresh, more, [1] * 5), go_on(model, cache, more, [1] * 5)
    )


def filled(cache: Any, tokens: int, chunk: int = 50) -> Any:
    rng = np.random.default_rng(4)
    for start in range(0, tokens, chunk):
        shape = (1, 2, min(chunk, tokens - start), 32)
        keys, values = (mx.array(rng.standard_normal(shape).astype(np.float32)) for _ in "kv")
        cache.update_and_fetch(keys, values)
    return cache


def rows(cache: Any) -> np.ndarray:
    keys, values = cache.update_and_fetch(mx.zeros((1, 2, 1, 32)), mx.zeros((1, 2, 1, 32)))
    if isinstance(keys, (tuple, list)):
        keys, values = (
            mx.dequantize(*part, group_size=cache.group_size, bits=cache.bits)
            for part in (keys, values)
        )
    return np.concatenate([np.array(keys), np.array(values)])


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("tokens", [5, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_a_ring_goes_on_where_it_was(keep: int, tokens: int, chunk: int) -> None:
    cache = [filled(RotatingKVCache(max_size=64, keep=keep), tokens, chunk)]
    snapshot = adapters.snapshot(cache, tokens)
    fresh = [RotatingKVCache(max_size=64, keep=keep)]
    restore(fresh, [], states=list(snapshot.state_pages((0, tokens))), tokens=tokens)
    assert fresh[0].offset == cache[0].offset == tokens
    for _ in range(3):  # by age; a query sees them alike in any order
        old, new = rows(cache[0]), rows(fresh[0])
        order = [np.lexsort(x[0, 0].T) for x in (old, new)]
        np.testing.assert_array_equal(new[:, :, order[1]], old[:, :, order[0]])


def test_a_quantized_cache_is_stored_as_numbers_and_quantized_again() -> None:
    cache = [filled(QuantizedKVCache(group_size=32, bits=8), 70)]
    page = adapters.snapshot(cache, 70).page((0, 1), (0, 70))
    fresh = [QuantizedKVCache(group_size=32, bits=8)]
    assert restore(fresh, [page]) == 70
    numbers = rows(cache[0])
    np.testing.assert_allclose(rows(fresh[0]), numbers, atol=0.02)
    plain = [KVCache()]  # and anybody else may have the numbers
    restore(plain, [page])
    np.testing.assert_allclose(rows(plain[0]), numbers, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_cache_comes_back_bit_for_bit_through_an_exact_codec(bits: int) -> None:
    cache = [filled(QuantizedKVCache(group_size=32, bits=bits), 300)]
    snapshot = adapters.snapshot(cache, 300, packed=True)
    pages = [snapshot.page((0, 1), span) for span in ((0, 256), (256, 300))]
    back = through_blobs(pages, "page", ZstdCodec())
    fresh = [QuantizedKVCache(group_size=32, bits=bits)]
    assert restore(fresh, back) == 300
    np.testing.assert_array_equal(rows(fresh[0]), rows(cache[0]))
    assert length(fresh) == 301
    for other in (KVCache(), QuantizedKVCache(group_size=32, bits=6), QuantizedKVCache(64, bits)):
        with pytest.raises(ModelError, match=r"do not fit|were not quantized"):
            restore([other], back)
        assert other.empty()
    assert cache_form(cache) == f"{bits} bits, groups of 32"
    assert cache_form([KVCache(), CacheList(ArraysCache(1))]) == ""


def test_a_chunked_cache_is_stored_until_it_forgets() -> None:
    cache = [filled(ChunkedKVCache(64), 60)]
    page = adapters.snapshot(cache, 60).page((0, 1), (0, 60))
    fresh = [ChunkedKVCache(64)]
    restore(fresh, [page])
    np.testing.assert_array_equal(rows(fresh[0]), rows(cache[0]))
    filled(cache[0], 50)
    cache[0].maybe_trim_front()
    with pytest.raises(ModelError, match="at most 64 tokens"):
        adapters.snapshot(cache, 100)


def test_lists_of_caches_may_hold_both_kinds() -> None:
    def make() -> list[Any]:
        return [CacheList(ArraysCache(2), CacheList(KVCache()))]

    cache = make()
    filled(cache[0][1][0], 30)
    cache[0][0][1] = mx.arange(6, dtype=mx.float32).reshape(1, 2, 3)
    snapshot = adapters.snapshot(cache, 30)
    fresh = make()
    states = list(snapshot.state_pages((0, 30)))
    restore(fresh, [snapshot.page((0, 1), (0, 30))], states=states, tokens=30)
    np.testing.assert_array_equal(np.array(fresh[0][0][1]), np.array(cache[0][0][1]))
    assert fresh[0][0][0] is None
    np.testing.assert_array_equal(rows(fresh[0][1][0]), rows(cache[0][1][0]))


def test_one_sequence_of_a_batch_is_taken_only_where_it_is_named() -> None:
    single = [filled(KVCache(), 20), filled(KVCache(), 33)]
    batch = [BatchKVCache.merge(single)]
    with pytest.raises(ModelError, match="BatchKVCache"):
        adapters.snapshot(batch, 20)
    page = adapters.snapshot(batch, 33, row=1).page((0, 1), (0, 33))
    np.testing.assert_array_equal(page.streams["k"].data[0], np.array(single[1].keys)[0, :, :33])
    states = ArraysCache(1)
    states[0] = mx.zeros((2, 3))
    with pytest.raises(ModelError, match="2 sequences"):
        adapters.snapshot([states], 5)


def test_states_are_of_one_position_only() -> None:
    model = model_of("gpt_oss")
    cache = prefilled(model, tokens_of(50))
    assert list(adapters.snapshot(cache, 50).state_pages((0, 50)))
    assert not list(adapters.snapshot(cache, 49).state_pages((0, 49)))


@pytest.mark.parametrize("broken", ["missing", "other", "half"])
def test_nothing_is_filled_where_a_state_does_not_fit(broken: str) -> None:
    model = model_of("qwen3_next")
    cache = prefilled(model, tokens_of(30))
    snapshot = adapters.snapshot(cache, 30)
    pages, states = [snapshot.page((0, 2), (0, 30))], list(snapshot.state_pages((0, 30)))
    if broken == "missing":
        states = []
    elif broken == "half":
        states = [states[0].cut_layers((0, 1))]
    else:
        ring = adapters.snapshot([filled(RotatingKVCache(8), 30)], 30)
        states = list(ring.state_pages((0, 30)))
    fresh = make_prompt_cache(model)
    with pytest.raises(ModelError, match="no state that fits"):
        restore(fresh, pages, states=states, tokens=30)
    assert all(layer.empty() for layer in fresh)
