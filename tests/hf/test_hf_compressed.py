"""`CompressedCache`: generation over an encoded history."""

import pytest
import torch
from hf_samples import greedy, prefilled, prompt, tiny
from transformers import DynamicCache

from kvferry.codec.affine import AffineCodec
from kvferry.codec.raw import RawCodec, ZstdCodec
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError, UnsupportedTensorError
from kvferry.hf import CompressedCache

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_codec_changes_no_token(dtype: torch.dtype) -> None:
    model, tokens = tiny().to(dtype), prompt(150)
    cache = CompressedCache(ZstdCodec(), chunk=16, window=8)
    assert greedy(model, tokens, cache) == greedy(model, tokens)
    assert cache.get_seq_length() == 150 + 23
    coded, exact = cache.layers[0].nbytes
    assert coded > 0
    # 173 tokens: ten chunks behind a window of 8, and what is not a chunk yet
    assert exact == 2 * 2 * 16 * (173 - 10 * 16) * dtype.itemsize


def test_chunks_are_the_same_however_tokens_come() -> None:
    model, tokens = tiny(), prompt(70)
    whole = CompressedCache(RawCodec(), chunk=16, window=8)
    single = CompressedCache(RawCodec(), chunk=16, window=8)
    plain = prefilled(model, tokens)
    for layer, held in enumerate(plain.layers):
        whole.update(held.keys, held.values, layer)
        for at in range(70):
            rows = (t[:, :, at : at + 1] for t in (held.keys, held.values))
            seen = single.update(*rows, layer)
        assert torch.equal(seen[0], held.keys)
        assert torch.equal(seen[1], held.values)
    assert whole.nbytes == single.nbytes
    for mine, theirs in zip(whole.to_dynamic().layers, plain.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def test_a_lossy_codec_holds_less_and_stays_near() -> None:
    model, tokens = tiny(), prompt(300)
    cache = CompressedCache(AffineCodec(8), identity=(1,), chunk=32, window=32)
    plain = prefilled(model, tokens)
    with torch.no_grad():
        first = model(torch.tensor([tokens]), past_key_values=cache)
        exact = model(torch.tensor([tokens]), past_key_values=DynamicCache())
        assert torch.equal(first.logits, exact.logits)  # prefill sees exact rows
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    one = size // 3
    assert cache.nbytes < one + 2 * one * 0.5
    seen = cache.to_dynamic()
    assert torch.equal(seen.layers[1].keys, plain.layers[1].keys)
    error = (seen.layers[0].keys - plain.layers[0].keys).abs().max()
    assert 0 < float(error) < 0.02 * float(plain.layers[0].keys.abs().max())
    with torch.no_grad():
        after = model(torch.tensor([[3]]), past_key_values=cache).logits[0, -1]
        wanted = model(torch.tensor([[3]]), past_key_values=plain).logits[0, -1]
    assert float(torch.nn.functional.cosine_similarity(after, wanted, dim=0)) > 0.999


def test_beams_and_batches_reorder_encoded_rows() -> None:
    model = tiny()
    asked = torch.tensor([prompt(60, 1), prompt(60, 2)])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    options["attention_mask"] = torch.ones_like(asked)
    with torch.no_grad():
        plain = model.generate(asked, past_key_values=DynamicCache(), **options)
        cache = CompressedCache(RawCodec(), chunk=8, window=4)
        found = model.generate(asked, past_key_values=cache, **options)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("removed", [0, 3, 20, 40, 69, 70])
def test_cropping_leaves_what_a_plain_cache_leaves(removed: int) -> None:
    model, tokens = tiny(), prompt(70)
    plain = prefilled(model, tokens)
    cache = CompressedCache(RawCodec(), chunk=16, window=8)
    for layer, held in enumerate(plain.layers):
        cache.update(held.keys, held.values, layer)
    cache.crop(-removed)
    plain.crop(-removed)
    assert cache.get_seq_length() == 70 - removed
    more = torch.ones(1, 2, 30, 16)
    for layer in range(3):
        mine, theirs = cache.update(more, more, layer), plain.update(more, more, layer)
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        mine = cache.update(more, more, layer)
        assert torch.equal(mine[1], plain.update(more, more, layer)[1])


def test_it_is_as_new_after_a_reset() -> None:
    model, tokens = tiny(), prompt(90)
    cache = CompressedCache(RawCodec(), chunk=16, window=8)
    first = greedy(model, tokens, cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert greedy(model, tokens, cache) == first


def test_settings_and_numbers_that_cannot_be_are_refused() -> None:
    rows = torch.zeros(1, 2, 4, 16)
    few = CompressedCache({0: RawCodec()})
    few.update(rows, rows, 0)
    with pytest.raises(ConfigError, match="layer 1"):
        few.update(rows, rows, 1)
    with pytest.raises(ConfigError, match="keeps every token"):
        CompressedCache(make_codec("streaming", {})).update(rows, rows, 0)
    with pytest.raises(ConfigError, match="chunk"):
        CompressedCache(RawCodec(), chunk=0)
    cache = CompressedCache(AffineCodec(8), chunk=4, window=0)
    rows = torch.full((1, 2, 4, 16), float("nan"))
    with pytest.raises(UnsupportedTensorError, match="NaN"):
        cache.update(rows, rows, 0)
