"""Small random llamas, and one as mlx-lm would save it: what needs any model, fast."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

# Two KV heads of 16.
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def sharp_llama(vocabulary: int, head_dim: int = 16) -> tuple[nn.Module, dict[str, Any]]:
    """Three layers, random but sharp enough to have opinions; and its configuration.

    Caches can be quantized from heads of 32 on.
    """
    mx.random.seed(3)
    config = CONFIG | {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * 4
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * 4
    model.lm_head.weight = model.lm_head.weight * 6
    mx.eval(model.parameters())
    return model, config


def save_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """As mlx-lm would, with a tokenizer of letters."""
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    letters = {"<unk>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
