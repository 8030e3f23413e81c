"""The norm before attention, and which directions of K and V it leaves empty.

Told from what modules do and not from their names: a norm that does not notice a constant
added to its input takes the mean away (LayerNorm), one that does is an RMSNorm. What
attention makes of the norm's outputs is read from a cache that was given one-hot inputs,
so that fused, quantized and biased projections are all alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.lowrank_calibration import LAYER_NORM, RMS_NORM, UNKNOWN_NORM
from kvferry.codec.lowrank_null import null_directions
from kvferry.codec.mlx.parts import row_arrays
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.rope import RopeSpec, positions_of, undo

_NORM_NAMES = (
    "input_layernorm",
    "ln_1",
    "ln1",
    "ln",
    "norm1",
    "norm_1",
    "att_norm",
    "attn_norm",
    "attention_norm",
    "operator_norm",
    "pre_norm",
    "norm",
)
_ATTENTION_NAMES = ("self_attn", "attention", "attn")
_SAME = 1e-2  # relative; what 16-bit norms differ by when a constant is added
_LINEAR = 2e-2

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """What stands before attention.

    Attributes:
        kind: "layernorm", "rmsnorm", or "unknown" where it cannot be told or differs.
        nulls: stream -> (layers, heads, dim) float32: the unit vector of each head that
            is empty, zeros where there is none; see `null_directions`.
    """

    kind: str
    nulls: Mapping[str, FloatArray] = field(default_factory=dict)


def attention_norms(
    model: Any, shape: ModelShape, ropes: Mapping[str, Sequence[RopeSpec]]
) -> Norms:
    """Of all page layers of a live model.

    Args:
        ropes: rotated stream -> one spec per page layer.
    """
    found = [_norm_of(model.layers[layer]) for layer in shape.page_layers]
    kinds = {kind for kind, _ in found}
    kind = kinds.pop() if len(kinds) == 1 else UNKNOWN_NORM
    if kind != LAYER_NORM:
        return Norms(kind)
    nulls: dict[str, list[FloatArray]] = {"k": [], "v": []}
    for index, (_, gain) in enumerate(found):
        weights = _weights(model, shape, index, len(gain), ropes)
        if weights is None:
            return Norms(kind)
        for name, matrix in weights.items():
            nulls[name].append(null_directions(matrix, gain))
    stacked = {name: np.stack(parts) for name, parts in nulls.items() if parts}
    return Norms(kind, {name: u for name, u in stacked.items() if u.any()})


def _norm_of(layer: Any) -> tuple[str, Float64Array]:
    """Its kind and gain."""
    norm = next((getattr(layer, n) for n in _NORM_NAMES if hasattr(layer, n)), None)
    width = _width(norm)
    nothing = np.zeros(0)
    if norm is None or not width:
        return _named(norm), nothing
    # Far larger than any epsilon, without zeros, and no two alike.
    x = np.linspace(3.0, 9.0, width) * np.where(np.arange(width) % 2, 1, -1)
    try:
        there, back, moved = (_apply(norm, rows) for rows in (x, -x, x + 100.0))
    except Exception:  # a module that is none of the norms that are known
        return UNKNOWN_NORM, nothing
    centred = x - x.mean()
    gain = (there - back) / 2 / (centred / np.sqrt((centred**2).mean()))
    bias = (there + back) / 2
    scale = float(np.abs(there - bias).max())
    if not np.isfinite(scale) or not scale:
        return UNKNOWN_NORM, nothing
    same = float(np.abs(moved - there).max()) <= _SAME * scale
    return (LAYER_NORM, gain) if same else (RMS_NORM, nothing)


def _named(norm: Any) -> str:
    return RMS_NORM if "RMS" in type(norm).__name__ else UNKNOWN_NORM


def _width(norm: Any) -> int:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, mx.array) and weight.ndim == 1:
        return int(weight.size)
    return int(getattr(norm, "dims", 0))


def _apply(norm: Any, x: Float64Array) -> Float64Array:
    rows: Float64Array = np.array(norm(mx.array(x[None], dtype=mx.float32)), dtype=np.float64)
    return rows.reshape(-1)


def _weights(
    model: Any,
    shape: ModelShape,
    index: int,
    width: int,
    ropes: Mapping[str, Sequence[RopeSpec]],
) -> dict[str, Float64Array] | None:
    """Stream -> (heads, dim, width), what attention of a page layer makes of its inputs.

    A stream that is not linear (keys that are normed) is left out; None: it cannot be told.
    """
    layer = model.layers[shape.page_layers[index]]
    attention = next((getattr(layer, n) for n in _ATTENTION_NAMES if hasattr(layer, n)), None)
    if attention is None:
        return None
    probe = np.random.default_rng(0).standard_normal((1, width))
    inputs = np.concatenate([np.zeros((1, width)), np.eye(width), probe])
    try:
        rows = _cached(model, shape, index, attention, inputs)
    except Exception:  # calls its attention in another way than most
        return None
    found = {}
    for name, values in zip(("k", "v"), rows, strict=True):
        spec = ropes[name][index] if name in ropes else None
        if spec is not None:
            values = undo(values, spec, positions_of((0, len(inputs))))
        linear = (values[:, 1:-1] - values[:, :1]).swapaxes(-1, -2).astype(np.float64)
        wanted = values[:, -1] - values[:, 0]
        off = np.abs(linear @ probe[0] - wanted).max()
        if off <= _LINEAR * max(float(np.abs(wanted).max()), 1e-9):
            found[name] = linear
    return found


def _cached(
    model: Any, shape: ModelShape, index: int, attention: Any, inputs: Float64Array
) -> list[FloatArray]:
    """Keys and values, (heads, rows, dim), that a fresh cache has of so many inputs."""
    from mlx_lm.models.cache import make_prompt_cache

    entries = shape.page_entries or range(shape.layers)
    entry = make_prompt_cache(model)[entries[index]]
    attention(mx.array(inputs[None], dtype=mx.float32), mask=None, cache=entry)
    rows = row_arrays([entry], len(inputs), latent=False)
    return [np.array(rows[name].astype(mx.float32))[0] for name in ("k", "v")]
