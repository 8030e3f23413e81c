"""SmolLM2-135M-Instruct without a hub: the GGUF file of a PyPI package, as an mlx-lm model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.gguf import GgufFile, read_gguf
from kvferry.codec.mlx.smollm2_file import NAME, config_of, gguf_path, layer_of, placed

__all__ = ["NAME", "config_of", "gguf_path", "load"]

_GROUP = 32


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
        layer = layer_of(base)
        if layer is None or layer in wanted:
            made.append(placed(base, _float32(raw, base), config))
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
