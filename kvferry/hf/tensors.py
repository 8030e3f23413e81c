"""A transformers `DynamicCache` as page tensors, and back, bit by bit.

Keys are taken as the cache has them: rotated, for llamas by halves, which is MLX's
``traditional=False``. So pages of both worlds have one layout, (layers, heads, tokens, dim).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.rope import RopeSpec
from kvferry.errors import ConfigError, ModelError
from kvferry.hf.lacking import LackingLayer, check_follow, lacks, placed

_DTYPES = {
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float32: DType.FLOAT32,
}
_TORCH = {kind: dtype for dtype, kind in _DTYPES.items()}
_Host = npt.NDArray[np.generic]
Rows = tuple[torch.Tensor, torch.Tensor]
Device: TypeAlias = "torch.device | str"
Devices: TypeAlias = "Device | Mapping[int, Device]"


def dtype_of(dtype: torch.dtype) -> DType:
    """Raises: ModelError: an element type that no page has."""
    if dtype not in _DTYPES:
        raise ModelError(f"a cache of {dtype} cannot be stored: float32, float16 or bfloat16 can")
    return _DTYPES[dtype]


def torch_dtype(kind: DType) -> torch.dtype:
    """Inverse of `dtype_of`."""
    return _TORCH[kind]


def rows_of(cache: Any, *, lacking: bool = False) -> list[Rows | None]:
    """Keys and values of each layer, (1, heads, tokens, dim); None for a layer without any.

    Args:
        cache: a `DynamicCache` whose layers all attend to everything; or what iterating
            one gives, (keys, values) or (keys, values, None) for each layer, as it was
            before transformers had caches and is between processes.
        lacking: take also one that `fill` made of pages that lack tokens.
    Raises: ModelError: sliding, static, quantized, recurrent and encoder-decoder caches by
        their names; more than one sequence; layers that differ in tokens, or lack some.
    """
    layers = getattr(cache, "layers", None)
    if layers is not None:
        rows = [_of_layer(index, layer, lacking) for index, layer in enumerate(layers)]
    elif isinstance(cache, list | tuple):
        rows = [_of_tuple(index, entry) for index, entry in enumerate(cache)]
    else:
        raise ModelError(f"a {type(cache).__name__} cannot be stored: a DynamicCache can")
    held = {pair[0].shape[-2] for pair in rows if pair is not None}
    if len(held) > 1:
        raise ModelError(f"layers of the cache hold {sorted(held)} tokens: they must be alike")
    return rows


def length(cache: Any) -> int:
    """Rows that the cache holds: its tokens, or those that a codec left of them.

    Raises: ModelError, as `rows_of`.
    """
    rows = rows_of(cache, lacking=True)
    return next((int(pair[0].shape[-2]) for pair in rows if pair is not None), 0)


def read(
    cache: Any,
    layers: tuple[int, int] | None = None,
    tokens: tuple[int, int] | None = None,
    *,
    head_start: int = 0,
    lacking: bool = False,
) -> PageTensors:
    """Host copies of some layers and tokens, from any device.

    Args:
        cache: see `rows_of`. One sequence without padding: its first row is position 0.
        layers, tokens: absolute, half-open; all that the cache holds if None.
        head_start: absolute index of the first KV head (tensor parallelism).
        lacking: read also a cache that lacks tokens; its rows then pass for tokens.
    Returns: streams "k" and "v", (layers, heads, tokens, dim), the bits as they are.
    Raises: ModelError: as `rows_of`, and for ranges that the cache does not hold.
    """
    rows = rows_of(cache, lacking=lacking)
    first, last = layers or _filled(rows)
    if not 0 <= first < last <= len(rows) or None in rows[first:last]:
        raise ModelError(f"layers {(first, last)} are not all within the cache's {len(rows)}")
    part = [pair for pair in rows[first:last] if pair is not None]
    held = int(part[0][0].shape[-2])
    start, end = tokens or (0, held)
    if not 0 <= start < end <= held:
        raise ModelError(f"tokens {(start, end)} are not within the cache's {held}")
    streams = {}
    for index, name in enumerate(("k", "v")):
        tensors = [pair[index] for pair in part]
        kinds = {(tensor.dtype, tensor.shape[1], tensor.shape[3]) for tensor in tensors}
        if len(kinds) > 1:
            raise ModelError(f"layers {(first, last)} differ in heads, dims or element type")
        host = np.stack([host_array(tensor[0, :, start:end]) for tensor in tensors])
        streams[name] = Stream(name, host, dtype_of(tensors[0].dtype))
    heads = part[0][0].shape[1]
    return PageTensors((first, last), (head_start, head_start + heads), (start, end), streams)


def fill(
    pages: Sequence[PageTensors], device: Devices = "cpu", ropes: Sequence[RopeSpec] = ()
) -> DynamicCache:
    """A fresh cache that holds pages; every layer at its absolute index.

    Of pages that lack tokens it holds what is left, side by side, and goes on at position
    `length`; `offload` and `PrefixCache.offer` refuse it, since its rows are no prompt's.

    Args:
        pages: in any order; of each layer that has any, tokens 0 to the same end without
            gaps. Layers without any stay empty, as transformers leaves those that have
            not run.
        device: of all layers, or of each.
        ropes: how each layer of the model rotates its keys; for pages that lack tokens.
    Raises: ModelError: pages that do not fit together, or whose entries cannot be side by
        side; UnsupportedTensorError: nor moved; ConfigError: layers without a device.
    """
    check_devices(device, {layer for page in pages for layer in range(*page.layers)})
    cache = DynamicCache()
    if lacks(pages):
        pages = placed(pages, ropes)
        cache.layer_class_to_replicate = LackingLayer
    layers = sorted({layer for page in pages for layer in range(*page.layers)})
    ends = {page.tokens[1] for page in pages}
    staged = {layer: _joined(pages, layer, max(ends)) for layer in layers}
    for layer, (keys, values) in staged.items():
        where = device[layer] if isinstance(device, Mapping) else device
        cache.update(keys.to(where), values.to(where), layer)
    return cache


def check_devices(device: Devices, layers: Iterable[int]) -> None:
    """Raises: ConfigError: a mapping that has none for one of the layers."""
    missing = sorted(set(layers) - set(device)) if isinstance(device, Mapping) else []
    if missing:
        raise ConfigError("device", f"none for layer {missing[0]}", "one for every layer")


def host_array(tensor: torch.Tensor) -> _Host:
    """A tensor's bits in the host's memory, in its `DType`'s storage."""
    kind = dtype_of(tensor.dtype)
    host = tensor.detach().cpu()
    if kind is DType.BFLOAT16:  # numpy has none
        bits: _Host = host.contiguous().view(torch.int16).numpy().view(kind.storage)
        return bits
    found: _Host = host.numpy()
    return found


def tensor_of(host: _Host, kind: DType) -> torch.Tensor:
    """Inverse of `host_array`; a copy."""
    if kind is DType.BFLOAT16:
        return torch.from_numpy(host.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(host.copy())


def _of_layer(index: int, layer: Any, lacking: bool) -> Rows | None:
    if type(layer) is LackingLayer:
        if not lacking:
            raise ModelError(
                "the cache lacks tokens that a codec dropped and cannot be stored: store the one "
                "that it was made of"
            )
    elif type(layer) is not DynamicLayer:
        raise ModelError(
            f"layer {index} of the cache is a {type(layer).__name__}: only a DynamicLayer, which "
            "holds every token as it is, can be stored"
        )
    return _checked(index, layer.keys, layer.values)


def _of_tuple(index: int, entry: Any) -> Rows | None:
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        raise ModelError(f"layer {index} of the cache is no pair of keys and values")
    if len(entry) == 3 and entry[2] is not None:
        raise ModelError(f"layer {index} of the cache has a sliding window: it cannot be stored")
    return _checked(index, entry[0], entry[1])


def _checked(index: int, keys: Any, values: Any) -> Rows | None:
    if keys is None or values is None or keys.numel() == 0:
        return None
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ModelError(
            f"layer {index}: keys {tuple(keys.shape)} and values {tuple(values.shape)} are not "
            "(1, heads, tokens, dim) both"
        )
    if keys.shape[0] != 1:
        raise ModelError(f"a cache of {keys.shape[0]} sequences at once cannot be stored")
    dtype_of(keys.dtype)
    dtype_of(values.dtype)
    return keys, values


def _filled(rows: Sequence[Rows | None]) -> tuple[int, int]:
    filled = [index for index, pair in enumerate(rows) if pair is not None]
    if not filled:
        raise ModelError("the cache is empty")
    return filled[0], filled[-1] + 1


def _joined(pages: Iterable[PageTensors], layer: int, end: int) -> Rows:
    mine = sorted(
        (page for page in pages if page.layers[0] <= layer < page.layers[1]),
        key=lambda page: page.tokens,
    )
    check_follow(mine, layer, end)
    joined = []
    for name in ("k", "v"):
        held = [page.streams[name] for page in mine]
        parts = [s.data[layer - page.layers[0]] for s, page in zip(held, mine, strict=True)]
        joined.append(tensor_of(np.concatenate(parts, axis=1)[None], held[0].dtype))
    return joined[0], joined[1]
