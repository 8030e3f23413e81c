"""Live caches to pages and back, bit for bit; nothing half done."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ConcatenateKVCache, KVCache

from kvferry.codec.base import DType, PageTensors
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.parts import length
from kvferry.codec.mlx.refill import restore
from kvferry.errors import ModelError

HEADS, DIM = 2, 8


def filled(
    tokens: int, layers: int = 3, dtype: mx.Dtype = mx.float32, cls: Any = KVCache, batch: int = 1
) -> list[Any]:
    rng = np.random.default_rng(tokens)
    cache = [cls() for _ in range(layers)]
    for layer in cache:
        k, v = rng.standard_normal((2, batch, HEADS, tokens, DIM)).astype(np.float32)
        layer.update_and_fetch(mx.array(k).astype(dtype), mx.array(v).astype(dtype))
    return cache


def paged(cache: list[Any], tokens: int, size: int, start: int = 0) -> list[PageTensors]:
    snapshot = adapters.snapshot(cache, tokens, start)
    edges = [*range(0, tokens, size), tokens]
    layers = (start, start + len(cache))
    return [snapshot.page(layers, span) for span in itertools.pairwise(edges)]


def held(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    k, v = (x[..., : layer.offset, :].astype(mx.float32) for x in (layer.keys, layer.values))
    return np.array(k), np.array(v)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 600),
    size=st.integers(1, 300),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    cls=st.sampled_from([KVCache, ConcatenateKVCache]),
)
def test_round_trip_is_exact(tokens: int, size: int, dtype: mx.Dtype, cls: Any) -> None:
    cache = filled(tokens, dtype=dtype, cls=cls)
    fresh = [cls() for _ in cache]
    assert restore(fresh, paged(cache, tokens, size, 7), 7) == tokens
    for old, new in zip(cache, fresh, strict=True):
        assert new.keys.dtype == dtype
        assert new.offset == tokens
        for a, b in zip(held(old), held(new), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pages_carry_the_cache_layout() -> None:
    cache = filled(20, layers=4, dtype=mx.bfloat16)
    page = adapters.snapshot(cache, 20, 10).page((11, 13), (4, 9))
    assert (page.layers, page.heads, page.tokens) == ((11, 13), (0, HEADS), (4, 9))
    keys = page.streams["k"]
    assert keys.data.shape == (2, HEADS, 5, DIM)
    assert keys.dtype is DType.BFLOAT16
    np.testing.assert_array_equal(keys.float32()[0], held(cache[1])[0][0, :, 4:9])


def test_a_snapshot_does_not_see_what_the_model_writes_later() -> None:
    cache = filled(10)
    before = [held(layer) for layer in cache]
    snapshot = adapters.snapshot(cache, 10)
    for layer in cache:
        layer.trim(4)
        layer.update_and_fetch(*(mx.full((1, HEADS, 9, DIM), 99.0) for _ in range(2)))
        mx.eval(layer.keys, layer.values)
    page = snapshot.page((0, 3), (0, 10))
    for index, (keys, values) in enumerate(before):
        np.testing.assert_array_equal(page.streams["k"].data[index], keys[0])
        np.testing.assert_array_equal(page.streams["v"].data[index], values[0])


def test_a_restored_cache_goes_on_growing() -> None:
    cache = filled(300)
    fresh = [KVCache() for _ in cache]
    restore(fresh, paged(cache, 300, 128))
    for layer in (*cache, *fresh):
        assert layer.keys.shape[2] == 512
        assert not np.array(layer.values[:, :, 300:]).any()
        layer.update_and_fetch(*(mx.ones((1, HEADS, 250, DIM)) for _ in range(2)))
    for old, new in zip(cache, fresh, strict=True):
        np.testing.assert_array_equal(held(old)[0], held(new)[0])


def broken(pages: list[PageTensors], how: str) -> list[PageTensors]:
    last = pages[-1]
    if how == "gap":
        return [pages[0], *pages[2:]]
    if how == "late start":
        return pages[1:]
    if how == "layers":
        return [*pages[:-1], last.cut_layers((0, 2))]
    if how == "stream":
        only = {"k": last.streams["k"]}
        return [*pages[:-1], PageTensors(last.layers, last.heads, last.tokens, only)]
    half = {n: type(s).from_float32(n, s.float32(), DType.FLOAT16) for n, s in last.streams.items()}
    return [*pages[:-1], PageTensors(last.layers, last.heads, last.tokens, half)]


@pytest.mark.parametrize("how", ["gap", "late start", "layers", "stream", "dtype"])
def test_pages_that_do_not_fit_leave_the_cache_empty(how: str) -> None:
    pages = paged(filled(48), 48, 12)
    fresh = [KVCache() for _ in range(3)]
    with pytest.raises(ModelError):
        restore(fresh, broken(pages, how))
    assert all(layer.keys is None and layer.offset == 0 for layer in fresh)


def test_a_cache_in_use_is_not_overwritten() -> None:
    pages = paged(filled(8), 8, 8)
    busy = filled(5)
    with pytest.raises(ModelError, match="holds 5 tokens already"):
        restore(busy, pages)
    assert [layer.offset for layer in busy] == [5, 5, 5]


def test_what_cannot_be_stored_says_why() -> None:
    with pytest.raises(ModelError, match="2 sequences at once"):
        adapters.snapshot(filled(4, batch=2), 4)
    for name in ("SlidingKVCache", "BatchKVCache"):  # a subclass may keep another order
        layer = type(name, (KVCache,), {})()
        with pytest.raises(ModelError, match=f"cache class {name} is not supported"):
            adapters.snapshot([layer], 1)
    with pytest.raises(ModelError, match="holds 4"):
        adapters.snapshot(filled(4), 5)
    uneven = [*filled(4, 1), *filled(6, 1)]
    with pytest.raises(ModelError, match="different numbers"):
        adapters.snapshot(uneven, 4)


@pytest.mark.model
def test_the_real_model_goes_on_from_a_restored_cache_alike(smollm2: LoadedModel) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([smollm2.tokenizer.encode("The ferry carries the cache across the water.")])
    cache, fresh = make_prompt_cache(smollm2.model), make_prompt_cache(smollm2.model)
    smollm2.model(tokens[:, :-1], cache=cache)
    count = length(cache)
    assert restore(fresh, paged(cache, count, 4)) == count
    expected = smollm2.model(tokens[:, -1:], cache=cache)
    np.testing.assert_array_equal(
        np.array(smollm2.model(tokens[:, -1:], cache=fresh)), np.array(expected)
    )
