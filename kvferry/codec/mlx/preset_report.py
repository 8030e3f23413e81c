"""What a model's cache holds, for people and for tools that want its dims.

All of it is read off the model: its shape and element types from a token that was sent
through it lazily, its rotation from the rope modules.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.codec.base import RING_KEYS, RING_VALUES
from kvferry.codec.calibration import layer_groups
from kvferry.codec.mlx.leaves import state_adapter
from kvferry.codec.mlx.parts import parts_of, row_arrays
from kvferry.codec.mlx.probe import probe
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.mlx.shape import ModelShape, StateShape
from kvferry.codec.rope import RopeSpec
from kvferry.errors import ModelError
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS

# Names of KVTC's presets; what is behind them is the model's own.
FAMILIES = ("lfm2", "qwen3", "glm")
_FP16_BYTES = 2
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class CacheKind:
    """Layers whose caches are of one kind.

    Attributes:
        classes: of the cache, as in "KVCache" or "KVCache + KVCache".
        rows: a row for every token, so that it can be cut at any; else a state.
        layers: model layers.
        window: tokens that a ring keeps; 0: no ring.
        arrays: of a state: name -> shape without the batch, rings full.
        bytes: of a state of one layer, in the cache's own element types.
    """

    classes: str
    rows: bool
    layers: Sequence[int]
    window: int = 0
    arrays: Mapping[str, tuple[int, ...]] | None = None
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One stream of each page layer, and its element type."""

    name: str
    heads: int
    dim: int
    rotated: bool
    dtype: str
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class RopeReport:
    """How some layers rotate their keys, as far as the frequencies tell.

    Attributes:
        layers: model layers.
        base: None: they are no powers of one number.
        slowed: the slowest pair turns so many times slower than ``base`` says.
        still: pairs of ``dims`` that do not turn at all.
    """

    layers: Sequence[int]
    dims: int
    traditional: bool
    base: float | None
    slowed: float
    still: int
    key_scale: float
    position_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetReport:
    """See the module. Bytes are of one token, one page or one position, of all layers.

    Attributes:
        architecture: mlx-lm's module that the model's class is in.
        family: one of `FAMILIES` where it belongs to one, else the architecture.
        mode: "single_stream" where latents are kept in place of K and V.
        groups: page layers that are coded together, half-open, by number.
    """

    architecture: str
    family: str
    mode: str
    shape: ModelShape
    kinds: Sequence[CacheKind]
    streams: Sequence[StreamReport]
    ropes: Sequence[RopeReport]
    groups: Sequence[tuple[int, int]]
    bytes_per_token_fp16: int
    bytes_per_token: int
    state_bytes_fp16: int
    state_bytes: int
    page_tokens: int = DEFAULT_PAGE_TOKENS

    @property
    def head_dim(self) -> int:
        """Values that stand in place of a key: a head's, or latent and rotated key together."""
        streams = self.shape.streams
        names = ("latent", "rope_key") if self.shape.latent else ("k",)
        return sum(streams[name].dim for name in names if name in streams)

    @property
    def dtypes(self) -> Sequence[str]:
        """Element types of rows, each once."""
        return list(dict.fromkeys(stream.dtype for stream in self.streams))


def report_on(model: Any | None, config: Mapping[str, Any]) -> PresetReport:
    """What the cache of a model holds.

    Args:
        model: as `kvferry.codec.mlx.load.load_lazily` gives it; None: told from the config.
    Raises: ModelError: a kind of cache or of rotation that is not supported.
    """
    probed = probe(model, config, _dtype_of(config))
    shape, parts = probed.shape, parts_of(probed.cache)
    rows = row_arrays(parts.rows[0], 1, shape.latent) if parts.rows else {}
    streams = [
        StreamReport(
            s.name, s.heads, s.dim, s.rotated, _name(rows[s.name].dtype),
            s.heads * s.dim * shape.layers * rows[s.name].dtype.size,
        )
        for s in shape.streams.values()
    ]  # fmt: skip
    values = sum(s.heads * s.dim for s in shape.streams.values()) * shape.layers
    states = [_state(s, leaf) for s, leaf in zip(shape.states, parts.states, strict=True)]
    architecture = type(probed.model).__module__.rpartition(".")[2]
    groups = layer_groups(shape.layers, shape.kv_heads, shape.head_dim) if shape.layers else []
    return PresetReport(
        architecture=architecture,
        family=next((name for name in FAMILIES if architecture.startswith(name)), architecture),
        mode="single_stream" if shape.latent else "dual_stream",
        shape=shape,
        kinds=_kinds(shape, parts.rows, states),
        streams=streams,
        ropes=_ropes(probed.model, shape),
        groups=groups,
        bytes_per_token_fp16=values * _FP16_BYTES,
        bytes_per_token=sum(stream.bytes_per_token for stream in streams),
        state_bytes_fp16=sum(_FP16_BYTES * _values(arrays) for arrays, _ in states),
        state_bytes=sum(size for _, size in states),
    )


def rope_report(layers: Sequence[int], spec: RopeSpec) -> RopeReport:
    """What the frequencies of ``spec`` say about where they come from."""
    turning = np.array([f for f in spec.inv_freq if f > 0], dtype=np.float64)
    base, slowed = None, 1.0
    if len(turning) > 1 and abs(turning[0] - 1) < _SAME:
        # Scaled rotations leave the fastest pairs as they are.
        step = math.log(turning[0] / turning[1])
        base = math.exp(step * spec.dims / 2)
        slowed = float(math.exp(-step * (len(turning) - 1)) / turning[-1])
        # Float32 frequencies carry some 1e-7 each: no digits beyond that are shown.
        base = float(f"{base:.5g}")
        slowed = 1.0 if abs(slowed - 1) < 1e-2 else float(f"{slowed:.3g}")
    still = len(spec.inv_freq) - len(turning)
    return RopeReport(
        list(layers), spec.dims, spec.traditional, base, slowed, still,
        float(f"{spec.key_scale:.6g}"), float(f"{spec.position_scale:.6g}"),
    )  # fmt: skip


def _ropes(model: Any, shape: ModelShape) -> list[RopeReport]:
    """Of layers that hold rows; of rings too, whose keys are never unrotated, if known."""
    rings = {layer for layer, s in zip(shape.state_layers, shape.states, strict=True) if s.window}
    layers = sorted(rings.union(shape.page_layers))
    try:
        specs = rope_specs(model, layers)
    except ModelError:
        layers = list(shape.page_layers)
        specs = rope_specs(model, layers)
    runs: dict[RopeSpec, list[int]] = {}
    for layer in layers:
        runs.setdefault(specs[layer], []).append(layer)
    return [rope_report(held, spec) for spec, held in runs.items()]


def _state(state: StateShape, leaf: Any) -> tuple[Mapping[str, tuple[int, ...]], int]:
    """Shapes of a state layer's arrays, and their bytes; a ring counts as full."""
    arrays, size = {}, 0
    for name, array in state_adapter(leaf).read(leaf).items():
        shape = state.arrays[name]
        if state.window and name in (RING_KEYS, RING_VALUES):
            shape = (shape[0], state.window, *shape[2:])
        arrays[name] = shape
        size += math.prod(shape) * array.dtype.size
    return arrays, size


def _values(arrays: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in arrays.values())


def _kinds(
    shape: ModelShape,
    rows: Sequence[Sequence[Any]],
    states: Sequence[tuple[Mapping[str, tuple[int, ...]], int]],
) -> list[CacheKind]:
    found: dict[tuple[Any, ...], list[int]] = {}
    for layer, held in zip(shape.page_layers, rows, strict=True):
        classes = " + ".join(type(leaf).__name__ for leaf in held)
        found.setdefault((classes, True, 0, (), 0), []).append(layer)
    for state, layer, (arrays, size) in zip(shape.states, shape.state_layers, states, strict=True):
        key = (state.kind, False, state.window, tuple(arrays.items()), size)
        found.setdefault(key, []).append(layer)
    return [
        CacheKind(classes, is_rows, layers, window, dict(arrays), size)
        for (classes, is_rows, window, arrays, size), layers in found.items()
    ]


def _dtype_of(config: Mapping[str, Any]) -> mx.Dtype:
    """Of a live model's activations: float32 on a CPU, as `load_model` makes them."""
    if mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    text = {**config, **(config.get("text_config") or {})}
    said = str(text.get("dtype") or text.get("torch_dtype") or "").removeprefix("torch.")
    known: Mapping[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16}
    return known.get(said, mx.bfloat16)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
