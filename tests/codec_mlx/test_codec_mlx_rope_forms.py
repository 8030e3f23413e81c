"""Every rotation of mlx-lm, with drawn parameters and inside live models."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import (
    cohere2,
    deepseek_v2,
    exaone4,
    gemma3_text,
    hunyuan_v1_dense,
    llama,
    llama4_text,
    nanochat,
    rope_utils,
    smollm3,
    talkie,
)
from mlx_lm.models.cache import KVCache

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.mlx.rope import NO_ROPE, rope_specs, spec_of
from kvferry.codec.rope import apply, positions_of, undo
from kvferry.codec.rows import page_rows, store_rows

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
POSITIONS = [0, 1, 255, 4_096, 32_700, 131_072, 262_143]


def tolerance(offset: int) -> float:
    """A GPU's sines and frequencies are not the CPU's to the last bit."""
    return 1e-5 if ON_CPU else 1e-5 + 1e-6 * offset


FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    "deepseek_yarn": {
        "type": "deepseek_yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
    "yarn with key scaling": {
        "type": "telechat3-yarn",
        "factor": 16.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.2,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "mrope": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def module_of(form: str, dims: int, base: float, traditional: bool) -> Any:
    scaling = dict(FORMS[form])
    if form == "longrope":
        scaling["short_factor"] = [1.0] * (dims // 2)
        scaling["long_factor"] = np.linspace(1.0, 60.0, dims // 2).tolist()
    return rope_utils.initialize_rope(dims, base, traditional, scaling or None, 131_072)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    dim=st.sampled_from([32, 64, 80, 96, 128, 192, 256, 576]),
    part=st.sampled_from([1.0, 0.5, 0.25]),
    base=st.sampled_from([10_000.0, 500_000.0, 1_000_000.0]),
    traditional=st.booleans(),
    start=st.sampled_from(POSITIONS),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 20),
)
def test_every_form_is_done_undone_and_redone(
    form: str, dim: int, part: float, base: float, traditional: bool, start: int, heads: int,
    tokens: int,
) -> None:  # fmt: skip
    dims = int(dim * part) // 4 * 4
    module = module_of(form, dims, base, traditional)
    spec, positions = spec_of(module), positions_of((start, start + tokens))
    keys = np.random.default_rng(dim + tokens).uniform(-1, 1, (1, heads, tokens, dim))
    keys = keys.astype(np.float32)
    live = np.array(module(mx.array(keys), offset=start))
    allowed = tolerance(start) * max(1.0, spec.key_scale)
    np.testing.assert_allclose(apply(keys, spec, positions), live, atol=allowed, rtol=0)
    plain = undo(live, spec, positions)
    np.testing.assert_allclose(plain, keys, atol=allowed, rtol=0)
    np.testing.assert_allclose(apply(plain, spec, positions), live, atol=allowed, rtol=0)


@pytest.mark.parametrize("start", POSITIONS)
def test_layers_with_bases_of_their_own_are_undone_each_by_its_own(start: int) -> None:
    """Gemma 3: a small base on sliding layers, a large and scaled one on the others."""
    model = tiny("gemma3_text")
    specs = rope_specs(model)
    rotations = [layer.self_attn.rope for layer in model.layers]
    assert len({spec.fingerprint() for spec in specs}) == 2
    assert specs[0] == specs[1] != specs[2]
    plain = np.random.default_rng(3).uniform(-1, 1, (3, 2, 9, 32)).astype(np.float32)
    live = [
        np.array(rope(mx.array(x[None]), offset=start))[0]
        for rope, x in zip(rotations, plain, strict=True)
    ]
    span = (start, start + 9)
    page = PageTensors((0, 3), (0, 2), span, {"k": Stream("k", np.stack(live), DType.FLOAT32)})
    rows = page_rows(page, ["k"], {"k": specs}, start)
    wanted = plain.transpose(2, 0, 1, 3).reshape(9, -1)
    np.testing.assert_allclose(rows, wanted, atol=tolerance(start), rtol=0)
    again = np.empty_like(page.streams["k"].data)
    store_rows(again, DType.FLOAT32, rows, specs, span)
    np.testing.assert_allclose(again, page.streams["k"].data, atol=tolerance(start), rtol=0)


def tiny(name: str, **changes: Any) -> Any:
    """A model of three layers with random weights."""
    common: dict[str, Any] = {
        "model_type": name,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32,
    }
    extra: dict[str, dict[str, Any]] = {
        "gemma3_text": {
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "cohere2": {"sliding_window_pattern": 3},
        "exaone4": {
            "max_position_embeddings": 4096,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "rope_scaling": FORMS["llama3"],
            "sliding_window": 64,
            "sliding_window_pattern": "LLG",
        },
        "llama4_text": {
            "rope_theta": 5e5,
            "intermediate_size_mlp": 64,
            "tie_word_embeddings": True,
            "no_rope_layers": [1, 1, 0],
            "use_qk_norm": True,
        },
        "smollm3": {"no_rope_layers": [1, 1, 0]},
    }
    mx.random.seed(1)
    module = MODELS[name]
    args = module.ModelArgs.from_dict(common | extra.get(name, {}) | changes)
    model = module.Model(args)
    mx.eval(model.parameters())
    return model


MODELS: dict[str, Any] = {
    "cohere2": cohere2,
    "exaone4": exaone4,
    "gemma3_text": gemma3_text,
    "hunyuan_v1_dense": hunyuan_v1_dense,
    "llama": llama,
    "llama4_text": llama4_text,
    "nanochat": nanochat,
    "smollm3": smollm3,
    "talkie": talkie,
}


def first_layers_keys(model: Any) -> np.ndarray[Any, Any]:
    """Keys of a prompt of one token, repeated: all alike but for their rotation."""
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([[5] * 24]), cache=cache))
    return np.array(cache[0].keys[0, :, :24])


def spread(keys: np.ndarray[Any, Any]) -> float:
    return float(np.abs(keys - keys[:, :1]).max() / np.abs(keys).max())


UNROTATED: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window_pattern": 1},
    "exaone4": {"sliding_window_pattern": "GLL"},
    "llama4_text": {"no_rope_layers": [0, 1, 1]},
    "smollm3": {"no_rope_layers": [0, 1, 1]},
}


@pytest.mark.parametrize("name", MODELS)
def test_keys_in_a_live_cache_do_not_depend_on_position_once_undone(name: str) -> None:
    model = tiny(name)
    keys, spec = first_layers_keys(model), rope_specs(model)[0]
    assert spec.dims == 32
    assert spread(keys) > 0.2
    assert spread(undo(keys, spec, positions_of((0, 24)))) < 2e-5


@pytest.mark.parametrize("name", UNROTATED)
def test_layers_that_a_model_leaves_unrotated_are_known(name: str) -> None:
    model = tiny(name, **UNROTATED[name])
    assert rope_specs(model)[0] == NO_ROPE
    assert spread(first_layers_keys(model)) < 2e-5


@pytest.mark.parametrize("start", POSITIONS)
def test_yarn_of_deepseek_2_is_undone(start: int) -> None:
    module = deepseek_v2.DeepseekV2YarnRotaryEmbedding(
        64, scaling_factor=40.0, mscale=0.707, mscale_all_dim=0.2
    )
    spec, positions = spec_of(module), positions_of((start, start + 7))
    assert spec.traditional
    assert spec.key_scale > 1.1
    keys = np.random.default_rng(0).uniform(-1, 1, (1, 1, 7, 64)).astype(np.float32)
    live = np.array(module(mx.array(keys), offset=start))
    np.testing.assert_allclose(undo(live, spec, positions), keys, atol=tolerance(start), rtol=0)


def test_no_class_of_mlx_lm_is_left_to_chance() -> None:
    """A rotation that a later mlx-lm adds is known or refused, and this test says which."""
    classes = {
        name
        for name, value in vars(rope_utils).items()
        if isinstance(value, type) and issubclass(value, rope_utils.nn.Module)
    }
    undone = {"Llama3RoPE", "ProportionalRoPE", "SuScaledRoPE", "YarnRoPE"}
    assert classes == undone | {"DynamicNTKScalingRoPE"}
