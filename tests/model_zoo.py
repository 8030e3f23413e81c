"""Real model classes of mlx-lm with small random weights, one for each kind of cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny_llama
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache

VOCABULARY = 96
_PLAIN: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_key_value_heads": 4,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "rope_scaling": None,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "glm4_moe_lite": {**_LATENT, "partial_rotary_factor": 1.0},
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 2048},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
    "gemma3_text": {
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "query_pre_attn_scalar": 16,
    },
    "qwen3_next": {
        **_EXPERTS,
        **_LINEAR,
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
    },
    # Attention without RoPE, and a layer without a cache.
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "M", "-"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "time_step_limit": [0.0, 10000.0],
        "layer_norm_epsilon": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
    },
    # Its search left out the attention of a layer.
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads, "no_op": heads is None},
                "ffn": {"ffn_mult": 1.0},
            }
            for heads in (2, None, 2, 2)
        ],
    },
    "qwen3_5": {
        "text_config": {
            **_PLAIN,
            **_LINEAR,
            "model_type": "qwen3_5_text",
            "rope_parameters": {
                "type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    },
}


def config_of(name: str) -> dict[str, Any]:
    """As a model's folder would hold it."""
    return {**_PLAIN, **CONFIGS[name], "model_type": name}


def model_of(name: str) -> Any:
    """The same weights every time."""
    mx.random.seed(1)
    get_classes: Any = utils._get_classes
    model_class, args_class = get_classes(config_of(name))
    model = model_class(args_class.from_dict(config_of(name)))
    mx.eval(model.parameters())
    return model


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """Token ids."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


def prefilled(model: Any, tokens: list[int], chunk: int = 128) -> list[Any]:
    """A cache that has seen ``tokens``."""
    cache: list[Any] = make_prompt_cache(model)
    for start in range(0, len(tokens), chunk):
        mx.eval(model(mx.array([tokens[start : start + chunk]]), cache=cache))
    return cache


def go_on(model: Any, cache: list[Any], tokens: list[int], steps: list[int]) -> np.ndarray:
    """(tokens, vocabulary) logits of the next tokens, given in chunks of ``steps``."""
    found, at = [], 0
    for step in steps:
        logits = model(mx.array([tokens[at : at + step]]), cache=cache)
        found.append(np.array(logits.astype(mx.float32))[0])
        at += step
    return np.concatenate(found)


def save_model(name: str, folder: Path) -> None:
    """As a folder that mlx-lm loads, with a tokenizer of letters."""
    tiny_llama.save_model(model_of(name), config_of(name), folder)
