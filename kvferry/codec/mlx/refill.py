"""Page and state tensors back into live mlx-lm caches.

Everything is staged before a cache is touched: all of them are filled or none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, PageTensors
from kvferry.codec.mlx.gaps import Ropes, placement
from kvferry.codec.mlx.leaves import STEP, StateAdapter, fill_packed, state_adapter
from kvferry.codec.mlx.parts import length, parts_of, row_names, rows_of
from kvferry.errors import ModelError

_HostArray = npt.NDArray[np.generic]


def restore(
    cache: Sequence[Any],
    pages: Sequence[PageTensors],
    layer_start: int = 0,
    *,
    states: Sequence[PageTensors] = (),
    state_start: int = 0,
    tokens: int | None = None,
    ropes: Ropes | None = None,
) -> int:
    """Fill fresh caches, in place; all of them or none.

    Pages that lack tokens (`PageTensors.kept`) are filled in as their codec says: side by
    side, with all keys behind them rotated anew to follow, in the caches given; or where
    they were, or weighted, in `GappedKVCache` objects that take their places in ``cache``.

    Args:
        cache: empty caches of consecutive layers; the objects themselves are filled.
        pages: in order, from token 0 on without gaps, each with all page layers.
        layer_start: absolute index of the first page layer.
        states: of all state layers, as `CacheSnapshot.state_pages` gave them.
        state_start: absolute index of the first state layer.
        tokens: the position of the states; by default where the pages end.
        ropes: gives each page layer's; needed where entries are put side by side.
    Returns: the position at which the caches go on.
    Raises:
        ModelError: pages or states do not fit; the caches are as they were.
        UnsupportedTensorError: keys that cannot be moved.
    """
    parts = parts_of(cache)
    if length(cache):
        raise ModelError(f"the cache to be filled holds {length(cache)} tokens already")
    total = tokens if tokens is not None else pages[-1].tokens[1] if pages else 0
    if not total:
        return 0
    if parts.rows:
        _check(pages, (layer_start, layer_start + len(parts.rows)), total)
    placed = placement(cache, parts, pages, total, ropes)
    rows = [_staged_rows(placed.pages, i, placed.held, leaf) for i, leaf in enumerate(parts.rows)]
    kept = _staged_states(parts.states, states, state_start)
    mx.eval([arrays for layer in rows for _, arrays in layer])
    mx.eval([arrays for _, _, arrays in kept])
    for layer in rows:
        for fill, _ in layer:
            fill()
    for leaf, state, arrays in kept:
        state.fill(leaf, arrays, placed.at)
    placed.leave_gaps(cache)
    return placed.at


def _staged_rows(
    pages: Sequence[PageTensors], index: int, total: int, held: Sequence[Any]
) -> list[tuple[Callable[[], None], list[mx.array]]]:
    """For each leaf of a page layer: how to fill it, and the arrays for that."""
    streams = pages[0].streams
    latent = any(name.partition(".")[0] == "latent" for name in streams)
    staged: list[tuple[Callable[[], None], list[mx.array]]] = []
    for leaf, names in zip(held, row_names(len(held), latent), strict=True):
        adapter = rows_of(leaf)
        if f"{names[0]}.levels" in streams:
            parts = _packed(pages, index, total, leaf, names)
            fill = partial(fill_packed, leaf, parts, names, total)
            staged.append((fill, list(parts.values())))
            continue
        first, second = (_buffer(pages, name, index, total, adapter.step) for name in names)
        if first is None:
            raise ModelError(f"pages without stream {names[0]!r} do not fit this cache")
        if second is None:
            second = mx.zeros((*first.shape[:3], 0), dtype=first.dtype)
        staged.append((partial(adapter.fill, leaf, first, second, total), [first, second]))
    return staged


def _packed(
    pages: Sequence[PageTensors], index: int, total: int, leaf: Any, names: Sequence[str]
) -> dict[str, mx.array]:
    parts: dict[str, mx.array] = {}
    if type(leaf).__name__ != "QuantizedKVCache":
        raise ModelError(f"pages of a quantized cache do not fit a {type(leaf).__name__}")
    for name in (f"{n}.{part}" for n in names for part in ("levels", "scales", "biases")):
        made = _buffer(pages, name, index, total, STEP)
        if made is None:
            raise ModelError(f"pages without stream {name!r} do not fit this cache")
        parts[name] = made.view(mx.uint32) if name.endswith(".levels") else made
    for name in names:
        levels, scales = (parts[f"{name}.{part}"].shape[3] for part in ("levels", "scales"))
        if levels * 32 != scales * leaf.group_size * leaf.bits:
            raise ModelError(f"pages were not quantized to {leaf.bits} bits as this cache is")
    return parts


def _staged_states(
    leaves_: Sequence[Any], states: Sequence[PageTensors], start: int
) -> list[tuple[Any, StateAdapter, dict[str, mx.array]]]:
    staged: list[tuple[Any, StateAdapter, dict[str, mx.array]]] = []
    found = {layer: page for page in states for layer in range(*page.layers)}
    for layer, leaf in enumerate(leaves_, start):
        page, adapter = found.get(layer), state_adapter(leaf)
        if page is None or not adapter.fits(leaf, list(page.streams)):
            raise ModelError(f"no state that fits the {type(leaf).__name__} of state layer {layer}")
        arrays = {}
        for name, stream in page.streams.items():
            host = stream.data[layer - page.layers[0]]
            arrays[name] = _array(host.reshape(adapter.shape(name, host.shape)), stream.dtype)
        staged.append((leaf, adapter, arrays))
    return staged


def _check(pages: Sequence[PageTensors], layers: tuple[int, int], total: int) -> None:
    end = 0
    if not pages:
        raise ModelError("there are no pages for a cache that holds rows of tokens")
    kinds = _kinds(pages[0])
    plain = {name.partition(".")[0] for name in kinds}
    if not {"k", "v"} <= plain and not {"latent", "rope_key"} <= plain:
        raise ModelError(f"pages of streams {sorted(kinds)} do not fit a cache")
    for page in pages:
        if page.layers != layers:
            raise ModelError(f"a page of layers {page.layers} does not fit layers {layers}")
        if page.tokens[0] != end:
            raise ModelError(f"a page starts at token {page.tokens[0]}, {end} wanted")
        end = page.tokens[1]
        if _kinds(page) != kinds:
            raise ModelError("pages differ in heads, dimensions or element type")
    if end != total:
        raise ModelError(f"pages end at token {end}, {total} wanted")


def _kinds(page: PageTensors) -> dict[str, tuple[int, int, DType]]:
    return {n: (s.data.shape[1], s.data.shape[3], s.dtype) for n, s in page.streams.items()}


def _buffer(
    pages: Sequence[PageTensors], name: str, layer: int, total: int, step: int
) -> mx.array | None:
    """(1, heads, total rounded up to ``step``, dim), zeros behind ``total``; None: no stream."""
    if name not in pages[0].streams:
        return None
    first = pages[0].streams[name]
    heads, dim = first.data.shape[1], first.data.shape[3]
    host: _HostArray = np.empty((1, heads, -(-total // step) * step, dim), first.data.dtype)
    for page in pages:
        host[0, :, page.tokens[0] : page.tokens[1]] = page.streams[name].data[layer]
    host[:, :, total:] = 0
    return _array(host, first.dtype)


def _array(host: _HostArray, kind: DType) -> mx.array:
    made = mx.array(host)
    return made.view(mx.bfloat16) if kind is DType.BFLOAT16 else made
