"""Every rope of mlx-lm: what the live module did, our numpy undoes, at any position."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, rope_utils
from mlx_lm.models.smollm3 import NoPE

from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.rope import NO_ROPE, rope_specs, spec_of
from kvferry.codec.rope import positions_of, undo
from kvferry.errors import ModelError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 24,
    "long_factor": [1.0 + 0.5 * i for i in range(24)],
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0}


def made(scaling: dict[str, Any] | None, *, dims: int = 64, traditional: bool = False) -> Any:
    return rope_utils.initialize_rope(dims, 10_000.0, traditional, scaling, 131_072)


MODULES = {
    "plain": made(None),
    "traditional": made(None, traditional=True),
    "partial": made(None, dims=32),
    "base": nn.RoPE(64, base=1_000_000.0),
    "linear": made({"type": "linear", "factor": 3.0}),
    "llama3": made(LLAMA3),
    "yarn": made(YARN),
    "yarn traditional": made(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, traditional=True),
    "longrope": made(LONG, dims=48),
    "proportional": made(PROPORTIONAL),
    "mrope": made({"type": "mrope", "mrope_section": [8, 12, 12]}),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("offset", [0, 1000, 32_768, 131_072, 1_000_000])
def test_live_rotation_is_undone(name: str, offset: int) -> None:
    module = MODULES[name]
    keys = np.random.default_rng(1).standard_normal((1, 3, 40, 64)).astype(np.float32)
    rotated = np.array(module(mx.array(keys), offset=offset))
    spec = spec_of(module)
    plain = undo(rotated, spec, positions_of((offset, offset + 40)))
    # A GPU's sines and frequencies are not the CPU's to the last bit.
    tolerance = 1e-5 if mx.default_device() == mx.Device(mx.cpu) else 1e-5 + 1e-6 * offset
    assert np.abs(plain - keys).max() <= tolerance


def test_what_changes_a_rotation_changes_its_fingerprint() -> None:
    prints = {name: spec_of(module).fingerprint() for name, module in MODULES.items()}
    assert prints["mrope"] == prints["plain"]  # the same rotation, whatever it is called
    del prints["mrope"]
    assert len(set(prints.values())) == len(prints)


def test_yarn_scales_keys_and_the_spec_knows() -> None:
    assert spec_of(MODULES["yarn"]).key_scale == pytest.approx(1.3466, abs=1e-4)


def test_a_layer_without_rotation_has_the_empty_spec() -> None:
    assert spec_of(NoPE()) == NO_ROPE


def test_unknown_modules_are_refused_by_name() -> None:
    class Sideways(nn.Module):
        pass

    with pytest.raises(ModelError, match="Sideways"):
        spec_of(Sideways())
    dynamic = made({"type": "dynamic", "factor": 2.0})
    with pytest.raises(ModelError, match=r"DynamicNTKScalingRoPE.*length of the sequence"):
        spec_of(dynamic)


def tiny_model() -> Any:
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=32,
    )
    return llama.Model(args)


def test_a_module_that_lies_about_itself_is_refused() -> None:
    model = tiny_model()

    class RoPE(nn.RoPE):
        def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
            return super().__call__(x, offset=2 * offset)

    model.layers[1].self_attn.rope = RoPE(32)
    with pytest.raises(ModelError, match="does not do what its name says"):
        rope_specs(model)


def test_layers_may_differ_and_attention_may_have_none() -> None:
    model = tiny_model()
    model.layers[0].self_attn.rope = nn.RoPE(32, base=500.0)
    first, second = rope_specs(model)
    assert first.fingerprint() != second.fingerprint()
    model.layers[0].self_attn.use_rope = False
    assert rope_specs(model)[0] == NO_ROPE
    del model.layers[1].self_attn.rope
    with pytest.raises(ModelError, match="layer 1: no rope module"):
        rope_specs(model)


@pytest.mark.model
def test_real_keys_do_not_depend_on_position_once_undone(smollm2: LoadedModel) -> None:
    """The first layer's keys are functions of the token alone, but for the rotation."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(smollm2.model)
    token = smollm2.tokenizer.encode("kettle")[0]
    smollm2.model(mx.array([[token] * 24]), cache=cache)
    keys = np.array(cache[0].keys[0, :, :24])
    plain = undo(keys, rope_specs(smollm2.model)[0], positions_of((0, 24)))
    assert np.abs(plain - plain[:, :1]).max() < 1e-4 * np.abs(plain).max()
    assert np.abs(keys - keys[:, :1]).max() > 0.5
