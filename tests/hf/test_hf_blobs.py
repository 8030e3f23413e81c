"""Caches as blobs and back, through a real store too, from process to process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_samples import SALT, greedy, prefilled, prompt, same_bits, tiny, tokenizer
from transformers import DynamicCache

from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.codec.affine import AffineCodec
from kvferry.codec.raw import RawCodec, ZstdCodec
from kvferry.errors import ConfigError, CorruptBlobError, IdentityMismatchError, ModelError
from kvferry.hf import PrefixCache, TorchModel, identify, length, offload, restore

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model() -> TorchModel:
    return identify(tiny(), tokenizer())


def test_exact_codecs_give_the_cache_back(model: TorchModel) -> None:
    tokens = prompt(600)
    cache = prefilled(tiny(), tokens)
    blobs = offload(cache, tokens, ZstdCodec(), model, salt=SALT, tail=RawCodec())
    kinds = [(blob.key.kind, blob.tokens) for blob in blobs]
    assert kinds == [("page", (0, 256)), ("tail", (256, 600))]
    back = restore(blobs, model)
    for mine, theirs in zip(back.layers, cache.layers, strict=True):
        assert same_bits(mine.keys, theirs.keys)
        assert same_bits(mine.values, theirs.values)


def test_layers_may_have_codecs_of_their_own(model: TorchModel) -> None:
    tokens = prompt(400)
    cache = prefilled(tiny(), tokens)
    codecs = {(1, 3): AffineCodec(8), (0, 1): RawCodec()}
    blobs = offload(cache, tokens, codecs, model, salt=SALT)
    assert [b.key.layers for b in blobs if b.key.kind == "page"] == [(0, 1), (1, 3)]
    back = restore(blobs, model)
    assert same_bits(back.layers[0].keys[:, :, :256], cache.layers[0].keys[:, :, :256])
    assert not torch.equal(back.layers[2].keys, cache.layers[2].keys)
    torch.testing.assert_close(back.layers[2].keys, cache.layers[2].keys, rtol=0, atol=0.05)
    with pytest.raises(ModelError, match="cover"):
        offload(cache, tokens, {(0, 1): RawCodec()}, model, salt=SALT)
    with pytest.raises(ModelError, match="missing"):
        restore([b for b in blobs if b.key.layers != (0, 1) and b.key.kind == "page"], model)


def test_a_layer_without_a_device_is_named(store: SyncBlobStoreClient, model: TorchModel) -> None:
    tokens = prompt(20)
    blobs = offload(prefilled(tiny(), tokens), tokens, RawCodec(), model, salt=SALT)
    with pytest.raises(ConfigError, match="device = 'none for layer 1'"):
        restore(blobs, model, device={0: "cpu", 2: "cpu"})
    with pytest.raises(ConfigError, match="device = 'none for layer 1'"):
        PrefixCache(model, store, salt=SALT, device={0: "cpu"})
    every = dict.fromkeys(range(3), "cpu")
    assert length(restore(blobs, model, device=every)) == 20


def test_another_model_another_namespace_or_damage_is_never_taken(model: TorchModel) -> None:
    tokens = prompt(400)
    cache = prefilled(tiny(), tokens)
    blobs = offload(cache, tokens, RawCodec(), model, salt=SALT)
    other = identify(tiny(seed=4), tokenizer())
    with pytest.raises(IdentityMismatchError, match="model"):
        restore(blobs, other)
    salted = offload(cache, tokens, RawCodec(), model, salt=bytes(16))
    elsewhere = offload(cache, [*tokens[:-1], 1], RawCodec(), model, salt=SALT)
    assert not {b.key for b in blobs} & {b.key for b in salted}
    assert blobs[0].key == elsewhere[0].key
    assert blobs[-1].key != elsewhere[-1].key
    with pytest.raises(IdentityMismatchError, match="key"):
        restore([replace(blobs[0], key=salted[0].key)], model)
    data = bytearray(blobs[0].data)
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptBlobError):
        restore([replace(blobs[0], data=bytes(data)), *blobs[1:]], model)


def test_what_was_computed_in_another_precision_is_not_stored(model: TorchModel) -> None:
    tokens = prompt(20)
    half = DynamicCache()
    for layer, held in enumerate(prefilled(tiny(), tokens).layers):
        half.update(held.keys.half(), held.values.half(), layer)
    with pytest.raises(ModelError, match="autocast"):
        offload(half, tokens, RawCodec(), model, salt=SALT)
    few = DynamicCache()
    few.update(torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 20, 16), 0)
    with pytest.raises(ModelError, match="3 layers"):
        offload(few, tokens, RawCodec(), model, salt=SALT)


def test_a_prompt_comes_back_in_another_process(
    store: SyncBlobStoreClient, model: TorchModel
) -> None:
    live, tokens = tiny(), prompt(700)
    prefix = PrefixCache(model, store, salt=SALT, tail=RawCodec())
    assert prefix.restore(tokens)[1] == 0
    cache = DynamicCache()
    answer = greedy(live, tokens, cache)
    put = prefix.offer([*tokens, *answer], cache)
    assert put > 700 * 3 * 2 * 2 * 16 * 4 // 2
    assert prefix.offer([*tokens, *answer], cache) == 0  # all of it is there
    prefix.offer(tokens, prefilled(live, tokens))
    other = Path(__file__).parent / "hf_other_process.py"
    done = subprocess.run(
        [sys.executable, str(other), store.address],
        input=json.dumps(tokens),
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["held"] == 699  # all but the token that has to be run
    assert told["answer"] == answer
    assert told["counters"] == {"restores": 1, "restored_tokens": 699}


def test_another_end_shares_the_pages_and_the_rest_is_prefilled(
    store: SyncBlobStoreClient, model: TorchModel
) -> None:
    live, tokens = tiny(), prompt(600, seed=9)
    prefix = PrefixCache(model, store, salt=SALT)
    prefix.offer(tokens, prefilled(live, tokens))
    longer = tokens[:560] + prompt(100, seed=10)
    cache, held = prefix.restore(longer)
    assert held == 256
    assert greedy(live, longer, cache) == greedy(live, longer)
    assert prefix.restore(prompt(600, seed=11))[1] == 0
    assert prefix.counters["miss_absent"] == 1
    stranger = PrefixCache(model, store, salt=bytes(16))
    assert stranger.restore(tokens)[1] == 0


def test_a_store_that_is_gone_is_a_miss(model: TorchModel) -> None:
    with SyncBlobStoreClient("127.0.0.1:1", timeout_s=2.0) as client:
        prefix = PrefixCache(model, client, salt=SALT)
        cache, held = prefix.restore(prompt(300))
        assert (len(cache.layers), held) == (0, 0)
        tokens = prompt(30)
        assert prefix.offer(tokens, prefilled(tiny(), tokens)) == 0
    assert prefix.counters["miss_unavailable"] == prefix.counters["drop_unavailable"] == 1


def test_offers_that_cannot_be_are_dropped(store: SyncBlobStoreClient, model: TorchModel) -> None:
    prefix = PrefixCache(model, store, salt=SALT)
    assert prefix.offer([1, 2], DynamicCache()) == 0
    assert prefix.counters["drop_model"] == 1
