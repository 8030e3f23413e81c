"""A dump holds the live cache, bit for bit where the format can, and what filled it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import config_of, model_of, tokens_of
from safetensors import safe_open

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.lab.dump import Dump, dump, save
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.rope import apply, positions_of
from kvferry.errors import ConfigError

MODEL_ID = bytes(range(32))
Fill = Callable[[list[int]], list[Any]]


def run(tiny: LoadedModel, prompt: list[int], generate: int = 0, undo_rope: bool = False) -> Dump:
    return dump(
        tiny, MODEL_ID, prompt, generate, undo_rope=undo_rope, report=lambda done, note: None
    )


def test_npz_is_what_the_seed_reads(
    tiny: LoadedModel, tokens: list[int], filled: Fill, tmp_path: Path
) -> None:
    prompt = tokens[:300]
    path = tmp_path / "cache.npz"
    size = save(run(tiny, prompt), path)
    assert size == path.stat().st_size
    with np.load(path, allow_pickle=False) as found:
        assert set(found) == {"k", "v", "tokens", "metadata"}
        assert found["k"].shape == found["v"].shape == (3, 1, 2, 300, 16)
        assert found["tokens"].tolist() == prompt
        described = json.loads(str(found["metadata"]))
        live = filled(prompt)
        for layer, cache in enumerate(live):  # one token at the end is run apart
            np.testing.assert_allclose(
                found["k"][layer], np.array(cache.keys[:, :, :300]), atol=2e-5
            )
            np.testing.assert_allclose(
                found["v"][layer], np.array(cache.values[:, :, :300]), atol=2e-5
            )
    assert described["model_id"] == MODEL_ID.hex()
    assert (described["layers"], described["heads"], described["tokens"]) == ("3", "2", "300")
    assert (described["rope_applied"], described["dtype"]) == ("yes", "float32")


def test_safetensors_holds_the_same(tiny: LoadedModel, tokens: list[int], tmp_path: Path) -> None:
    found = run(tiny, tokens[:40])
    save(found, tmp_path / "c.safetensors")
    save(found, tmp_path / "c.npz")
    with safe_open(tmp_path / "c.safetensors", "np") as one, np.load(tmp_path / "c.npz") as other:
        assert set(one.keys()) == {"k", "v", "tokens"}
        for name in ("k", "v", "tokens"):
            np.testing.assert_array_equal(one.get_tensor(name), other[name])
        assert one.metadata()["model"] == "tiny"
        assert one.metadata()["rope_applied"] == "yes"


def test_generated_tokens_are_in_the_cache(
    tiny: LoadedModel, tokens: list[int], filled: Fill
) -> None:
    prompt = tokens[:20]
    found = run(tiny, prompt, generate=9)
    assert list(found.tokens[:20]) == prompt
    assert found.prompt_tokens == 20
    wanted = list(prompt)
    for _ in range(9):
        cache = make_prompt_cache(tiny.model)
        following = int(mx.argmax(tiny.model(mx.array([wanted]), cache=cache)[0, -1]).item())
        if following in tiny.tokenizer.eos_token_ids:
            break
        wanted.append(following)
    assert list(found.tokens) == wanted
    assert found.page.tokens == (0, len(wanted))
    live = np.array(filled(wanted)[2].values[0, :, : len(wanted)])
    np.testing.assert_allclose(found.page.streams["v"].data[2], live, atol=1e-4)


def test_rope_undone_is_redone_by_applying_it(tiny: LoadedModel, tokens: list[int]) -> None:
    with_rope = run(tiny, tokens[:50])
    without = run(tiny, tokens[:50], undo_rope=True)
    assert with_rope.rope_applied
    assert not without.rope_applied
    keys = without.page.streams["k"].float32()
    for layer, spec in enumerate(rope_specs(tiny.model)):
        again = apply(keys[layer], spec, positions_of((0, 50)))
        np.testing.assert_allclose(again, with_rope.page.streams["k"].data[layer], atol=1e-5)
    assert np.abs(keys - with_rope.page.streams["k"].data).max() > 0.1
    np.testing.assert_array_equal(without.page.streams["v"].data, with_rope.page.streams["v"].data)


def test_bfloat16_is_widened_for_numpy_and_kept_in_safetensors(
    tiny: LoadedModel, tokens: list[int], tmp_path: Path
) -> None:
    found = run(tiny, tokens[:8])
    page = found.page
    streams = {
        name: Stream.from_float32(name, s.float32(), DType.BFLOAT16)
        for name, s in page.streams.items()
    }
    found = replace(
        found,
        page=PageTensors(page.layers, page.heads, page.tokens, streams),
        cache_dtype=DType.BFLOAT16,
    )
    save(found, tmp_path / "c.npz")
    save(found, tmp_path / "c.safetensors")
    wanted = streams["k"].float32()[:, None]
    with np.load(tmp_path / "c.npz") as npz:
        assert npz["k"].dtype == np.float32
        np.testing.assert_array_equal(npz["k"], wanted)
        described = json.loads(str(npz["metadata"]))
    assert described["dtype"] == "bfloat16"
    assert described["stored_dtypes"]["k"] == "float32"
    loaded = mx.load(str(tmp_path / "c.safetensors"))
    assert loaded["k"].dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(loaded["k"].astype(mx.float32)), wanted)


def test_only_layers_that_hold_a_row_for_every_token_are_dumped(tiny: LoadedModel) -> None:
    arguments = llama.ModelArgs(
        **tiny.config, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model = llama.Model(replace(arguments, num_hidden_layers=4))
    found = run(replace(tiny, model=model, layers=(0, 4)), [1, 2, 3])
    assert found.page.streams["k"].data.shape[0] == 2
    assert found.metadata()["model_layers"] == "1,3"


@pytest.mark.parametrize("undo_rope", [False, True])
def test_latents_and_rotated_keys_are_dumped_apart(
    tmp_path: Path, tiny: LoadedModel, undo_rope: bool
) -> None:
    loaded = replace(tiny, model=model_of("glm4_moe_lite"), config=config_of("glm4_moe_lite"))
    found = dump(loaded, b"m" * 32, tokens_of(40), 2, undo_rope=undo_rope, report=lambda *_: None)
    save(found, tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as npz:
        assert npz["latent"].shape == (4, 1, 1, len(found.tokens), 32)
        assert npz["rope_key"].shape == (4, 1, 1, len(found.tokens), 16)
        # One key per token, whatever its position, where the rotation is undone.
        first = np.array([t == found.tokens[0] for t in found.tokens])
        keys = npz["rope_key"][0, 0, 0, first]
        assert (np.abs(keys - keys[0]).max() < 1e-4) == undo_rope


def test_mistakes(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        run(tiny, [])
    found = run(tiny, [1, 2, 3])
    for path in (tmp_path / "c.txt", tmp_path / "missing" / "c.npz"):
        with pytest.raises(ConfigError, match="--out"):
            save(found, path)
    assert list(tmp_path.iterdir()) == []
