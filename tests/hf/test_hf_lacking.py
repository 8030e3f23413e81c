"""Caches of what a codec left of a prompt: what models say, and what is refused."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm.models.llama as llama
import numpy as np
import pytest
import torch
from hf_samples import SALT, greedy, prefilled, prompt, same_bits, tiny, tokenizer
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoModelForCausalLM, Cohere2Config, Exaone4Config, SmolLM3Config

from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.codec.base import Codec, NoCalibrations
from kvferry.codec.blob import BlobMeta, StoredBlob, decode_blob, encode_blob
from kvferry.codec.join import join_tokens
from kvferry.codec.mlx.refill import restore as mlx_restore
from kvferry.codec.raw import RawCodec
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError, ModelError
from kvferry.hf import (
    CompressedCache,
    PrefixCache,
    TorchModel,
    fill,
    identify,
    length,
    offload,
    read,
    restore,
)

pytestmark = pytest.mark.hf

STREAMING = make_codec("streaming", {"sinks": 4, "window": 40})
RANDOM = make_codec("random", {"ratio": 3, "sinks": 1})
# Of logits up to 14: what these codecs keep of float32 is kept in half precision.
NEAR = {"rtol": 0, "atol": 0.03}
ORIGINAL = make_codec("streaming", {"window": 40, "positions": "original"})


@pytest.fixture(scope="module")
def model() -> TorchModel:
    return identify(tiny(), tokenizer())


def blob(
    codec: Codec,
    cache: Any,
    tokens: tuple[int, int],
    model: TorchModel,
    layers: tuple[int, int] | None = None,
) -> StoredBlob:
    """A codec's blob of some tokens, whoever wrote it."""
    meta = BlobMeta(
        kind="tail",
        model_id=model.model_id,
        page_key=bytes([tokens[0] % 251]) * 32,
        previous_key=bytes(32),
        model_layers=model.layers,
        model_heads=model.heads,
    )
    key, data = encode_blob(codec, read(cache, layers or (0, model.layers), tokens), meta)
    return StoredBlob(data, key, tokens)


def held_in(found: StoredBlob, model: TorchModel) -> Any:
    return decode_blob(
        found.data,
        key=found.key,
        model_id=model.model_id,
        tokens=found.tokens,
        cut=None,
        calibrations=NoCalibrations(),
    )


def logits(live: Any, new: list[int], cache: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = live(torch.tensor([new]), past_key_values=cache).logits[0].numpy()
    return found


@pytest.mark.parametrize("codec", [STREAMING, RANDOM], ids=["streaming", "random"])
def test_a_layer_goes_on_as_if_it_had_only_seen_what_is_left(codec: Codec) -> None:
    """In one layer keys and values depend on their own token alone."""
    live = tiny(num_hidden_layers=1)
    known = identify(live, tokenizer())
    tokens, new = prompt(600), prompt(9, seed=6)
    blobs = offload(prefilled(live, tokens), tokens, codec, known, salt=SALT)
    assert [b.tokens for b in blobs] == [(0, 256), (256, 600)]
    kept = [*held_in(blobs[0], known).kept.positions.tolist(), *range(256, 600)]
    assert len(kept) == 344 + (44 if codec is STREAMING else 85)
    left = [tokens[at] for at in kept]
    cache = restore(blobs, known)
    assert length(cache) == len(left)
    wanted = logits(live, new, prefilled(live, left))
    np.testing.assert_allclose(logits(live, new, cache), wanted, **NEAR)
    # generate skips as many ids as there are rows, whichever they are
    again = restore(blobs, known)
    assert greedy(live, [0] * len(left) + new, again) == greedy(live, left + new)
    assert length(again) == len(left) + len(new) + 23


def test_blobs_one_behind_another_follow_one_another() -> None:
    live = tiny(num_hidden_layers=1)
    known = identify(live, tokenizer())
    tokens, new = prompt(300), prompt(5, seed=6)
    whole = prefilled(live, tokens)
    parts = [
        blob(STREAMING, whole, (0, 120), known),
        blob(RawCodec(), whole, (120, 150), known),
        blob(RANDOM, whole, (150, 300), known),
    ]
    kept = [
        *held_in(parts[0], known).kept.positions.tolist(),
        *range(120, 150),
        *held_in(parts[2], known).kept.positions.tolist(),
    ]
    left = [tokens[at] for at in kept]
    wanted = logits(live, new, prefilled(live, left))
    for order in (parts, parts[::-1]):
        cache = restore(order, known)
        np.testing.assert_allclose(logits(live, new, cache), wanted, **NEAR)
    with pytest.raises(ModelError, match="without gaps"):
        restore([parts[0], parts[2]], known)


def mlx_twin(live: Any) -> llama.Model:
    """The same weights in mlx-lm."""
    fields = live.config.to_dict() | {"rope_theta": 1000.0, "model_type": "llama"}
    fields.pop("rope_parameters")
    twin = llama.Model(llama.ModelArgs.from_dict(fields))
    twin.load_weights([(name, mx.array(w.numpy())) for name, w in live.state_dict().items()])
    return twin


@pytest.mark.parametrize("codec", [STREAMING, RANDOM], ids=["streaming", "random"])
def test_three_layers_say_what_mlx_says_of_the_same_blobs(codec: Codec, model: TorchModel) -> None:
    live, tokens, new = tiny(), prompt(400), prompt(7, seed=6)
    whole = prefilled(live, tokens)
    parts = [blob(codec, whole, at, model) for at in ((0, 250), (250, 400))]
    twin = mlx_twin(live)
    theirs = make_prompt_cache(twin)
    pages = [held_in(part, model) for part in parts]
    at = mlx_restore(theirs, pages, ropes=lambda: model.ropes)
    cache = restore(parts, model)
    assert length(cache) == at == join_tokens(pages).entries < 250
    wanted = np.asarray(twin(mx.array([new]), cache=theirs)[0])
    mine = logits(live, new, cache)
    np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-3)
    assert np.abs(mine - logits(live, new, whole)).max() > 0.1  # it does lack something


def test_rows_that_do_not_move_keep_every_bit(model: TorchModel) -> None:
    live, tokens = tiny(), prompt(400)
    whole = prefilled(live, tokens)
    blobs = offload(whole, tokens, STREAMING, model, salt=SALT, tail=None)
    cache = restore(blobs, model)
    assert length(cache) == 44
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        keys, values = (rows.half().float() for rows in (theirs.keys, theirs.values))
        assert same_bits(mine.keys[:, :, :4], keys[:, :, :4])
        assert not torch.equal(mine.keys[:, :, 4:], keys[:, :, 216:256])
        assert same_bits(mine.values[:, :, 4:], values[:, :, 216:256])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
        (Cohere2Config, {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        (Exaone4Config, {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
def test_keys_of_layers_that_do_not_rotate_stay_as_they_are(
    kind: type[Any], settings: dict[str, Any]
) -> None:
    """With a prompt of one token over and over, whose keys only their places tell apart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": len(next(iter(settings.values()))), "num_key_value_heads": 2}
    config = kind(
        **sizes,
        vocab_size=30,
        pad_token_id=0,
        initializer_range=0.3,
        sliding_window=512,
        **settings,
    )
    live = AutoModelForCausalLM.from_config(config).eval()
    known = identify(live, None)
    assert [spec.dims for spec in known.ropes][:3] == [16, 0, 16]
    tokens = [7] * 400
    whole = prefilled(live, tokens)
    short = restore(offload(whole, tokens, STREAMING, known, salt=SALT), known)
    for mine, theirs in zip(short.layers, whole.layers, strict=True):
        wanted = theirs.keys[:, :, : length(short)]
        torch.testing.assert_close(mine.keys, wanted, rtol=0, atol=5e-3)


def test_positions_and_counts_that_have_no_place_are_refused(model: TorchModel) -> None:
    live, tokens = tiny(), prompt(400)
    whole = prefilled(live, tokens)
    centroid = make_codec("centroid", {"ratio": 3}).with_ropes(model.ropes)
    for codec, said in ((ORIGINAL, "original positions"), (centroid, "centroid")):
        with pytest.raises(ModelError, match=f"{said}.*store the cache with streaming"):
            restore([blob(codec, whole, (0, 400), model)], model)
        with pytest.raises(ConfigError, match="positions = contiguous"):
            offload(whole, tokens, codec, model, salt=SALT)
    two = {(0, 1): STREAMING, (1, 3): RawCodec()}
    with pytest.raises(ConfigError, match="same for all layers"):
        offload(whole, tokens, two, model, salt=SALT)
    with pytest.raises(ModelError, match=r"\[44, 133\] entries"):
        restore(
            [
                blob(STREAMING, whole, (0, 400), model, (0, 1)),
                blob(RANDOM, whole, (0, 400), model, (1, 3)),
            ],
            model,
        )
    with pytest.raises(ModelError, match="how keys rotate"):
        fill([held_in(blob(RANDOM, whole, (0, 400), model), model)])
    with pytest.raises(ConfigError, match=r"a tail must have them all"):
        offload(whole, tokens, RawCodec(), model, salt=SALT, tail=RANDOM)
    with pytest.raises(ConfigError, match=r"keeps every token.*restore\(offload"):
        CompressedCache(STREAMING).update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)


def test_no_prompt_is_restored_from_less_than_all_of_it(
    store: SyncBlobStoreClient, model: TorchModel
) -> None:
    live, tokens = tiny(), prompt(600, seed=8)
    blobs = offload(prefilled(live, tokens), tokens, STREAMING, model, salt=SALT)
    assert len(blobs) == 2
    for found in blobs:
        store.put(found.key, found.data)
    prefix = PrefixCache(model, store, salt=SALT)
    for asked in (tokens, tokens[:300], tokens[:257]):
        assert prefix.restore(asked)[1] == 0
    short = restore([StoredBlob(b, f.key, f.tokens) for f, b in fetched(store, blobs)], model)
    assert length(short) == 44 + 344
    # its rows are not those of the prompt's first 388 tokens
    with pytest.raises(ModelError, match="lacks tokens"):
        offload(short, tokens, RawCodec(), model, salt=SALT)
    assert prefix.offer(tokens, short) == 0
    assert prefix.counters["drop_model"] == 1
    assert prefix.restore(tokens)[1] == 0
    for wrong in ({"codec": STREAMING}, {"tail": RANDOM}):
        with pytest.raises(ConfigError, match="a prompt in a store must have them all"):
            PrefixCache(model, store, salt=SALT, **wrong)


def fetched(
    store: SyncBlobStoreClient, blobs: list[StoredBlob]
) -> Iterator[tuple[StoredBlob, bytes]]:
    return zip(blobs, store.get_many([b.key for b in blobs]), strict=True)
