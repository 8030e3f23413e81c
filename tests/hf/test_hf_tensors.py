"""`kvferry.hf.tensors`: a transformers cache as pages and back, and what is refused."""

import numpy as np
import pytest
import torch
from hf_samples import prefilled, prompt, same_bits, tiny
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvferry.codec.base import DType
from kvferry.codec.raw import RawCodec
from kvferry.errors import ModelError
from kvferry.hf import CompressedCache, fill, length, read

pytestmark = pytest.mark.hf


def random_cache(dtype: torch.dtype, layers: int = 4, tokens: int = 37) -> DynamicCache:
    """Random bits: NaN, infinities and subnormals among them."""
    made = torch.Generator().manual_seed(1)
    kind = torch.int32 if dtype is torch.float32 else torch.int16
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    cache = DynamicCache()
    for layer in range(layers):
        keys, values = (
            torch.randint(low, high, (1, 3, tokens, dim), generator=made, dtype=kind).view(dtype)
            for dim in (16, 8)
        )
        cache.update(keys, values, layer)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_comes_back_bit_by_bit(dtype: torch.dtype) -> None:
    cache = random_cache(dtype)
    whole = read(cache)
    assert (whole.layers, whole.heads, whole.tokens) == ((0, 4), (0, 3), (0, 37))
    assert whole.streams["k"].data.shape == (4, 3, 37, 16)
    assert whole.streams["v"].dtype == DType(str(dtype).removeprefix("torch."))
    parts = [
        read(cache, layers, tokens)
        for layers in ((0, 1), (1, 4))
        for tokens in ((0, 5), (5, 36), (36, 37))
    ]
    for pages in ([whole], parts, parts[::-1]):
        back = fill(pages)
        assert type(back) is DynamicCache
        assert length(back) == 37
        for mine, theirs in zip(back.layers, cache.layers, strict=True):
            assert same_bits(mine.keys, theirs.keys)
            assert same_bits(mine.values, theirs.values)


def test_values_are_read_as_numbers_of_the_right_place() -> None:
    cache = random_cache(torch.float32)
    page = read(cache, (1, 3), (4, 9), head_start=6)
    assert (page.layers, page.heads, page.tokens) == ((1, 3), (6, 9), (4, 9))
    wanted = cache.layers[2].keys[0, :, 4:9].numpy()
    np.testing.assert_array_equal(page.streams["k"].data[1], wanted)


def test_a_part_of_the_layers_lies_where_it_belongs() -> None:
    cache = random_cache(torch.float16)
    back = fill([read(cache, (2, 4))])
    assert len(back.layers) == 4
    assert back.layers[0].get_seq_length() == 0
    assert torch.equal(
        back.layers[3].values.view(torch.int16), cache.layers[3].values.view(torch.int16)
    )
    assert read(back).layers == (2, 4)


def test_pairs_without_a_cache_class_are_read_too() -> None:
    cache = random_cache(torch.float32)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    for legacy in (pairs, tuple(pairs), list(cache)):
        assert same_bits(fill([read(legacy)]).layers[1].keys, cache.layers[1].keys)


def test_a_restored_cache_goes_on_as_the_original() -> None:
    model, tokens = tiny(), prompt(50)
    cache = prefilled(model, tokens)
    back = fill([read(cache)])
    with torch.no_grad():
        last = torch.tensor([[7]])
        assert torch.equal(
            model(last, past_key_values=back).logits, model(last, past_key_values=cache).logits
        )


def test_caches_that_cannot_be_stored_are_named() -> None:
    model = tiny(num_hidden_layers=1)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8)]
    static = StaticCache(config=model.config, max_cache_len=8)
    compressed = CompressedCache(RawCodec())
    compressed.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    batch = DynamicCache()
    batch.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    double = DynamicCache()
    double.update(*(torch.zeros(1, 1, 3, 4, dtype=torch.float64),) * 2, 0)
    uneven = DynamicCache()
    uneven.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    uneven.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 1)
    for cache, said in (
        (sliding, "DynamicSlidingWindowLayer"),
        (static, "StaticLayer"),
        (compressed, "CompressedLayer"),
        (both, "EncoderDecoderCache"),
        (batch, "2 sequences"),
        (double, "float64"),
        (uneven, r"\[2, 3\] tokens"),
        (DynamicCache(), "empty"),
        ([(torch.zeros(1, 1, 3, 4),)], "no pair"),
        ([(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), torch.tensor(8))], "window"),
    ):
        with pytest.raises(ModelError, match=said):
            read(cache)


def test_ranges_and_pages_that_do_not_fit_are_refused() -> None:
    cache = random_cache(torch.float32)
    for layers, tokens in (((0, 5), None), ((2, 2), None), (None, (0, 38)), (None, (-1, 3))):
        with pytest.raises(ModelError, match="not"):
            read(cache, layers, tokens)
    gap = [read(cache, tokens=(0, 5)), read(cache, tokens=(6, 37))]
    with pytest.raises(ModelError, match="without gaps"):
        fill(gap)
    with pytest.raises(ModelError, match="without gaps"):
        fill([read(cache, (0, 2)), read(cache, (2, 4), (0, 5))])
