"""What each layer's live rope module does, as a `RopeSpec`.

Read from the module, not from the config: it is the module that made the keys. Each
spec is then compared with what its module really does to a random vector.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from kvferry.codec.mlx.nope import Unrotated
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.rope import RopeSpec, apply, positions_of
from kvferry.errors import ModelError

NO_ROPE = RopeSpec(0, False, ())
_ATTENTION_NAMES = ("self_attn", "attention", "attn", "temporal_block", "mixer", "norm_attn_norm")
_ROPE_NAMES = ("rope", "rotary_emb", "rotary")
# False on layers that do not rotate; Cohere 2 keeps a module there that it never calls.
_ROTATES_NAMES: Mapping[str, str] = {"cohere2": "use_sliding_window"}
# Rotations without a module: these attentions call mx.fast.rope with their own `_rope_freqs`.
_FREQS_OF_ATTENTION = ("nanochat", "talkie")
_PROBE_OFFSETS = (0, 3, 1021)
_PROBE_TOLERANCE = 2e-3  # a GPU's frequencies differ from a CPU's by 1e-7 of themselves


def page_ropes(model: Any, layers: Sequence[int]) -> list[RopeSpec]:
    """Of those layers of the model that hold rows of tokens; raises as `rope_specs`."""
    specs = rope_specs(model, layers)
    if layers and max(layers) >= len(specs):
        raise ModelError(
            f"the caches have {max(layers) + 1} layers of rows and the model {len(specs)} layers: "
            "this model is not supported yet"
        )
    return [specs[layer] for layer in layers]


def rope_specs(model: Any, rows: Container[int] | None = None) -> list[RopeSpec]:
    """One spec per layer of the model, by absolute index.

    Args:
        rows: layers whose keys are coded; others need no attention. All if None.
    Raises: ModelError: a layer without attention, or a rope that is not known.
    """
    checked: set[tuple[type[Any], RopeSpec]] = set()
    unrotated = Unrotated(model)
    specs = []
    for index, layer in enumerate(model.layers):
        try:
            module = _rope_of(layer, index, unrotated)
            spec = NO_ROPE if module is None else spec_of(module)
        except ModelError:
            if rows is None or index in rows:
                raise
            module, spec = None, NO_ROPE
        if module is not None and (type(module), spec) not in checked:
            _probe(module, spec)
            checked.add((type(module), spec))
        specs.append(spec)
    return specs


def _rope_of(layer: Any, index: int, unrotated: Unrotated) -> Any | None:
    attention = next((getattr(layer, n) for n in _ATTENTION_NAMES if hasattr(layer, n)), None)
    if attention is None:
        raise ModelError(
            f"layer {index} ({type(layer).__name__}) has no attention that kvferry knows: "
            "this model is not supported yet"
        )
    if isinstance(attention, list):  # LongCat has two in a layer, which rotate alike
        attention = attention[0]
    for name in ("attention", "attn"):  # EXAONE and DBRX wrap one
        inner = getattr(attention, name, None)
        attention = inner if isinstance(inner, Module) else attention
    family = type(attention).__module__.rpartition(".")[2]
    if not getattr(attention, _ROTATES_NAMES.get(family, "use_rope"), True):
        return None
    for name in _ROPE_NAMES:
        if hasattr(attention, name):
            return getattr(attention, name)
    if family in _FREQS_OF_ATTENTION and hasattr(attention, "_rope_freqs"):
        return _OwnFrequencies(attention._rope_freqs)
    if unrotated(attention):
        return None
    raise ModelError(
        f"layer {index}: no rope module in {type(attention).__name__}: "
        "kvferry cannot tell how its keys are rotated"
    )


class _OwnFrequencies:
    """What an attention without a rope module does to its keys, as if it had one."""

    traditional = False

    def __init__(self, freqs: mx.array) -> None:
        self._freqs, self.dims = freqs, 2 * freqs.size

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """As `mlx_lm.models.nanochat` and `mlx_lm.models.talkie` call it."""
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )


def spec_of(module: Any) -> RopeSpec:
    """The spec of one rope module.

    Raises: ModelError: a class that is not known, by its name.
    """
    name = type(module).__name__
    read = _READERS.get(name)
    if read is None:
        raise ModelError(f"rope module {name} is not known: {_WHY_NOT.get(name, _UNKNOWN)}")
    return read(module)


_UNKNOWN = "this model's cache cannot be stored yet"
_WHY_NOT: Mapping[str, str] = {
    "DynamicNTKScalingRoPE": "its rotation depends on the length of the sequence, so that "
    "it cannot be undone later"
}


def _standard(module: Any) -> RopeSpec:
    half = module.dims // 2
    # The very operations of mx.fast.rope on a CPU, so that the bits are the same: its
    # logarithm is rounded to float32 before it is divided.
    factor = np.log(np.float32(module.base)) / np.float32(half)
    with mx.stream(mx.cpu):
        exponents = mx.arange(0, -half, -1, dtype=mx.float32)
        inv_freq = mx.exp(exponents * mx.array(float(factor), dtype=mx.float32))
    return _spec(module.dims, module.traditional, inv_freq, position_scale=module.scale)


def _frequencies(module: Any) -> RopeSpec:
    """Llama3, proportional and fixed-alpha NTK: everything is in ``_freqs``."""
    traditional = bool(getattr(module, "traditional", False))
    return _spec(module.dims, traditional, _reciprocal(module))


def _yarn(module: Any) -> RopeSpec:
    return _spec(module.dims, module.traditional, _reciprocal(module), key_scale=module.mscale)


def _deepseek_v2(module: Any) -> RopeSpec:
    freqs = _reciprocal(module)
    return _spec(2 * freqs.size, True, freqs, key_scale=module.mscale)


def _longrope(module: Any) -> RopeSpec:
    return _spec(module.dim, False, _reciprocal(module), key_scale=module._scale)


def _none(module: Any) -> RopeSpec:
    return NO_ROPE


_READERS: Mapping[str, Callable[[Any], RopeSpec]] = {
    "RoPE": _standard,
    "Llama3RoPE": _frequencies,
    "ProportionalRoPE": _frequencies,
    "DynamicNTKAlphaRoPE": _frequencies,
    "_OwnFrequencies": _frequencies,
    "YarnRoPE": _yarn,
    "DeepseekV2YarnRotaryEmbedding": _deepseek_v2,
    "SuScaledRoPE": _longrope,
    "NoPE": _none,
}


def _reciprocal(module: Any) -> mx.array:
    with mx.stream(mx.cpu):
        return mx.reciprocal(module._freqs.astype(mx.float32))


def _spec(
    dims: int,
    traditional: bool,
    inv_freq: mx.array,
    key_scale: float = 1.0,
    position_scale: float = 1.0,
) -> RopeSpec:
    values = tuple(float(value) for value in np.array(inv_freq))
    return RopeSpec(dims, bool(traditional), values, float(key_scale), float(position_scale))


def _probe(module: Any, spec: RopeSpec) -> None:
    """Compare spec and module on random vectors; a difference is a model we do not know."""
    # Two dims more than are rotated, but for modules that always rotate a head whole.
    width = (
        spec.dims + 2 if hasattr(module, "dims") or hasattr(module, "dim") else spec.dims
    ) or 64
    x = np.random.default_rng(0).standard_normal((1, 1, 2, width)).astype(np.float32)
    for offset in _PROBE_OFFSETS:
        live = np.array(module(mx.array(x), offset=offset))
        ours = apply(x, spec, positions_of((offset, offset + 2)))
        if live.shape != ours.shape or np.abs(live - ours).max() > _PROBE_TOLERANCE:
            raise ModelError(
                f"rope module {type(module).__name__} does not do what its name says: "
                "this version of mlx-lm is not known to kvferry"
            )


def stream_ropes(model: Any, shape: ModelShape) -> dict[str, list[RopeSpec]]:
    """Rotated stream -> one spec per page layer. Raises: ModelError."""
    specs = page_ropes(model, shape.page_layers)
    return {name: specs for name, stream in shape.streams.items() if stream.rotated}
