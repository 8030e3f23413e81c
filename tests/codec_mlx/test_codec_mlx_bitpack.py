"""The live packed cache beside mlx-lm's own, and packed arrays."""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from model_zoo import VOCABULARY, model_of

from kvferry.codec.bitpack_direct import BitPackedKVCache as HostCache
from kvferry.codec.mlx.bitpack_arrays import BitPackedKVCache
from kvferry.codec.mlx.bitpack_cache import BitPackedCache, make_bitpack_cache
from kvferry.errors import ConfigError, ModelError, UnsupportedTensorError

DTYPES = [mx.float16, mx.bfloat16, mx.float32]


def fed(cache: BitPackedCache, pieces: list[int], seed: int = 0, dtype: Any = mx.float32) -> Any:
    """Random keys and values in pieces; what the last update returned, and all that went in."""
    rng = np.random.default_rng(seed)
    came: list[list[mx.array]] = [[], []]
    found = None
    for tokens in pieces:
        new = [
            mx.array(rng.standard_normal((1, 2, tokens, d)).astype(np.float32)).astype(dtype)
            for d in (16, 24)
        ]
        for list_, array in zip(came, new, strict=True):
            list_.append(array)
        found = cache.update_and_fetch(*new)
    return found, [mx.concatenate(list_, axis=2) for list_ in came]


def worst(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max()) if a.size else 0.0


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [[1] * 40, [100, 1, 1, 60, 1], [2, 1, 3, 17, 5], [16], [4, 16]])
def test_history_is_within_half_a_step_and_the_newest_as_it_came(
    bits: int, dtype: Any, pieces: list[int]
) -> None:
    cache = BitPackedCache(bits, block_tokens=16)
    found, came = fed(cache, pieces, dtype=dtype)
    total = sum(pieces)
    assert cache.offset == cache.size() == total
    step = 8 / (2**bits - 1)
    rounding = 0.03 if dtype is mx.bfloat16 else 0.004
    for got, again, exact in zip(found, cache.keys_and_values(), came, strict=True):
        assert got.shape == exact.shape
        assert got.dtype == dtype
        assert worst(got, exact) <= step / 2 + rounding
        assert worst(again, exact) <= step / 2 + rounding
        assert worst(got[:, :, :4], exact[:, :, :4]) == 0
        new = pieces[-1]
        assert worst(got[:, :, -new:], exact[:, :, -new:]) == 0
        packed = (total - 4) // 16 * 16 if total > 4 else 0
        assert worst(again[:, :, 4 + packed :], exact[:, :, 4 + packed :]) == 0
        if packed:
            assert worst(again[:, :, 4 : 4 + packed], exact[:, :, 4 : 4 + packed]) > 0


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 6, 12])
def test_a_head_of_any_size_comes_back_as_its_channels_of_a_larger_one_do(
    bits: int, dtype: Any, dim: int
) -> None:
    rng = np.random.default_rng(3)
    wide = mx.array(rng.standard_normal((1, 2, 45, 16)).astype(np.float32)).astype(dtype)
    found = []
    for part in (wide, wide[..., :dim]):
        cache = BitPackedCache(bits, block_tokens=8, sinks=3)
        for start in range(0, 45, 15):
            new = part[:, :, start : start + 15]
            cache.update_and_fetch(new, new)
        found.append(cache.keys_and_values()[0])
    assert worst(found[0][..., :dim], found[1]) == 0


def test_it_costs_the_bits_that_it_keeps() -> None:
    packed, plain = BitPackedCache(6, 128, sinks=0), KVCache()
    _, came = fed(packed, [1024], dtype=mx.float16)
    plain.update_and_fetch(*came)
    mx.eval(packed.state)
    assert packed.nbytes == pytest.approx(plain.nbytes * (6 + 2 * 16 / 128) / 16)


@pytest.mark.parametrize("left", [0, 2, 4, 5, 20, 30, 36, 40, 41, 50, 51])
def test_trimmed_to_any_length_it_goes_on(left: int) -> None:
    cache = BitPackedCache(8, block_tokens=16)
    _, came = fed(cache, [30, 21])
    assert cache.is_trimmable()
    assert cache.trim(51 - left) == 51 - left
    assert cache.offset == left
    found, more = fed(cache, [1, 40], seed=5)
    for got, old, new in zip(found, came, more, strict=True):
        assert worst(got, mx.concatenate([old[:, :, :left], new], axis=2)) < 0.05
    assert cache.trim(1000) == left + 41
    assert cache.empty()


def test_it_can_be_copied_and_its_state_set() -> None:
    cache = BitPackedCache(6, block_tokens=16)
    assert cache.empty()
    assert not cache.state
    _, _ = fed(cache, [50])
    other = BitPackedCache(6, block_tokens=16)
    other.state = cache.state
    twin = copy.deepcopy(cache)
    assert other.offset == twin.offset == 50
    for made in (other, twin):
        for a, b in zip(made.keys_and_values(), cache.keys_and_values(), strict=True):
            assert worst(a, b) == 0
    fed(twin, [3])
    assert (twin.offset, cache.offset) == (53, 50)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("bits", [6, 8])
def test_models_of_mlx_lm_generate_with_it(kind: str, bits: int) -> None:
    model = model_of(kind)
    prompt = mx.array(np.random.default_rng(1).integers(0, VOCABULARY, 90))
    plain, packed = make_prompt_cache(model), make_bitpack_cache(model, bits, 16)
    assert all(isinstance(layer, BitPackedCache) for layer in packed)
    scores = []
    for cache in (plain, packed):
        found = [
            p for _, p in generate_step(prompt, model, max_tokens=40, prompt_cache=cache,
                                        prefill_step_size=32)
        ]  # fmt: skip
        scores.append(mx.stack(found))
    assert packed[0].offset == plain[0].offset
    kl = (mx.exp(scores[0][:5]) * (scores[0][:5] - scores[1][:5])).sum(axis=-1)
    assert 0 < float(mx.abs(kl).max()) < {6: 0.05, 8: 0.003}[bits]
    assert sum(c.nbytes for c in packed) < 0.5 * sum(c.nbytes for c in plain)
    assert can_trim_prompt_cache(packed)
    assert trim_prompt_cache(packed, 20) == 20
    assert packed[0].offset == plain[0].offset - 20


def test_what_does_not_hold_rows_stays_the_models_own() -> None:
    model = model_of("gpt_oss")
    kinds = [type(layer).__name__ for layer in make_bitpack_cache(model)]
    own = [type(layer).__name__ for layer in make_prompt_cache(model)]
    assert "RotatingKVCache" in own
    assert kinds == [{"KVCache": "BitPackedCache"}.get(name, name) for name in own]


def test_a_model_of_several_pipeline_stages_is_refused() -> None:
    model = model_of("deepseek_v3")
    model.model.pipeline_size = 2
    with pytest.raises(ModelError, match="pipeline"):
        make_bitpack_cache(model)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"num_bits": 4}, {"block_tokens": 6}, {"sinks": -1}):
        with pytest.raises(ConfigError):
            BitPackedCache(**wrong)
    for made in (BitPackedKVCache, HostCache):
        for wrong in ({"num_bits": 7}, {"page_size_kb": 8}):
            with pytest.raises(ConfigError):
                made(**wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_packed_and_come_back(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    k, v = (
        mx.array(rng.standard_normal((2, 3, 70, d)).astype(np.float32)).astype(dtype)
        for d in (32, 16)
    )
    direct = BitPackedKVCache(num_bits=8)
    packed = direct.compress_kv(k, v)
    for exact, got in zip((k, v), direct.decompress_kv(*packed), strict=True):
        assert (got.shape, got.dtype) == (exact.shape, dtype)
        assert 0 < worst(got, exact) < 0.04
    with pytest.raises(UnsupportedTensorError):
        direct.compress_kv(k.astype(mx.int32), v)
    with pytest.raises(UnsupportedTensorError):
        direct.compress_kv(k[0], v)
