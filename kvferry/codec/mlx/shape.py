"""The shape of a model's cache: layers, KV heads, and what streams it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvferry.codec.mlx.adapters import check_supported
from kvferry.errors import ModelError

_MLA_KEYS = ("kv_lora_rank",)


@dataclass(frozen=True, slots=True)
class StreamShape:
    """One stream of each layer: its KV heads, values per head, and whether it is rotated."""

    name: str
    heads: int
    dim: int
    rotated: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cache of the whole model looks like.

    Attributes:
        layers: of the whole model.
        kv_heads: of the whole model, as completeness of a page counts them.
        head_dim: of the first stream.
        streams: name -> shape, in the order that blobs list them.
    """

    layers: int
    kv_heads: int
    head_dim: int
    streams: Mapping[str, StreamShape]


def describe(model: Any, config: Mapping[str, Any]) -> ModelShape:
    """Read a live model. Nothing is run, so layers may be without weights.

    Raises: ModelError: a kind of cache or attention that is not supported yet.
    """
    from mlx_lm.models.cache import make_prompt_cache

    for cache in make_prompt_cache(model):
        check_supported(cache)
    text = {**config, **(config.get("text_config") or {})}
    if any(text.get(key) for key in _MLA_KEYS):
        raise ModelError(f"{config.get('model_type')}: latent attention is not supported yet")
    heads, dim = _heads(model), _head_dim(model, text)
    streams = {
        "k": StreamShape("k", heads, dim, rotated=True),
        "v": StreamShape("v", heads, int(text.get("v_head_dim") or dim), rotated=False),
    }
    return ModelShape(len(model.layers), heads, dim, streams)


def _heads(model: Any) -> int:
    counts = {_attribute(layer, ("n_kv_heads", "num_key_value_heads")) for layer in model.layers}
    if len(counts) != 1:
        raise ModelError(f"layers with {sorted(counts)} KV heads are not supported yet")
    return counts.pop()


def _attribute(layer: Any, names: tuple[str, ...]) -> int:
    attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
    for name in names:
        value = getattr(attention, name, None)
        if isinstance(value, int):
            return value
    raise ModelError(f"{type(layer).__name__} does not say how many KV heads it has")


def _head_dim(model: Any, config: Mapping[str, Any]) -> int:
    attention = getattr(model.layers[0], "self_attn", None) or model.layers[0].attention
    value = getattr(attention, "head_dim", None) or config.get("head_dim")
    if value is None:
        value = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(value)
