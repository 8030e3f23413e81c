"""Live mlx-lm caches to page and state tensors, and back.

`snapshot` runs on the model's thread and makes no copies; converting to host arrays
happens later, on any thread. `restore` stages everything before it touches a cache.

Layers are counted twice over: *page layers* are those that hold rows of tokens, *state
layers* are the caches (several may lie in one layer) that can only be restored at the
position where they were read. A model of plain attention has no state layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.mlx.leaves import (
    STEP,
    RowsAdapter,
    StateAdapter,
    extracted,
    fill_packed,
    leaves,
    packed_rows,
    rows_adapter,
    state_adapter,
)
from kvferry.errors import ModelError

_DTYPES = {mx.float16: DType.FLOAT16, mx.bfloat16: DType.BFLOAT16, mx.float32: DType.FLOAT32}
_HostArray = npt.NDArray[np.generic]
_View = tuple[mx.array, DType]

_PLAIN = (("k", "v"),)
_LATENT = (("latent", "rope_key"),)
_SECOND = (("index_key", "index_value"),)


@dataclass(frozen=True, slots=True)
class CacheParts:
    """The leaves of a cache, sorted.

    Attributes:
        rows: for each page layer, its leaves that hold rows.
        states: for each state layer, its leaf.
    """

    rows: Sequence[Sequence[Any]]
    states: Sequence[Any]


def parts_of(cache: Sequence[Any]) -> CacheParts:
    """Raises: ModelError: a cache class that is not known."""
    rows: list[list[Any]] = []
    states: list[Any] = []
    for layer in cache:
        held: list[Any] = []
        for leaf in leaves(layer):
            (states if rows_adapter(leaf) is None else held).append(leaf)
        if held:
            rows.append(held)
    return CacheParts(rows, states)


def _rows(leaf: Any) -> RowsAdapter:
    found = rows_adapter(leaf)
    if found is None:  # `parts_of` has sorted them
        raise ModelError(f"{type(leaf).__name__} holds no rows")
    return found


def length(cache: Sequence[Any]) -> int | None:
    """Tokens that all layers hold; None where no layer says (recurrent state only).

    Raises: ModelError: layers differ, or an unknown cache class.
    """
    parts = parts_of(cache)
    lengths = {int(leaf.offset) for held in parts.rows for leaf in held}
    counted = (state_adapter(leaf).length(leaf) for leaf in parts.states)
    lengths |= {count for count in counted if count is not None}
    if len(lengths) > 1:
        raise ModelError(f"layers of one cache hold different numbers of tokens: {lengths}")
    return lengths.pop() if lengths else None


@dataclass(frozen=True, slots=True, eq=False)
class CacheSnapshot:
    """Views of a cache as it was; later writes of the model go to buffers of their own.

    Attributes:
        layers: page layers, absolute, half-open; empty (a, a) where there are none.
        tokens: positions 0 to ``tokens`` are held.
        heads: absolute, half-open.
        states: state layers, absolute, half-open; none are held if the cache went on
            beyond ``tokens``.
    """

    layers: tuple[int, int]
    tokens: int
    heads: tuple[int, int]
    _views: Sequence[Mapping[str, _View]]
    states: tuple[int, int] = (0, 0)
    _states: Sequence[Mapping[str, _View]] = ()

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        """Host copies of absolute page layers and tokens. Any thread may call it.

        Raises: ModelError for ranges that the snapshot does not hold.
        """
        first, last = layers[0] - self.layers[0], layers[1] - self.layers[0]
        if not 0 <= first < last <= len(self._views):
            raise ModelError(f"layers {layers} are not within the snapshot's {self.layers}")
        if not 0 <= tokens[0] < tokens[1] <= self.tokens:
            raise ModelError(f"tokens {tokens} are not within the snapshot's {self.tokens}")
        streams = {}
        for name in self._views[first]:
            held = [layer[name] for layer in self._views[first:last]]
            # The buffer protocol gives strided host views: only the page is copied.
            parts = [np.asarray(view)[0, :, tokens[0] : tokens[1]] for view, _ in held]
            streams[name] = Stream(name, np.stack(parts), held[0][1])
        return PageTensors(layers, self.heads, tokens, streams)

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterator[PageTensors]:
        """States of consecutive layers of one form. Any thread may call it.

        Args:
            tokens: what a blob of them is to say; they stand at its end.
            part: which part of the states this rank has; the pages' ``heads``.
        """
        at = self.states[0]
        for _, run in groupby(self._states, key=_form):
            held = list(run)
            streams = {}
            for name in held[0]:
                parts = [_padded(np.asarray(layer[name][0])[0]) for layer in held]
                streams[name] = Stream(name, np.stack(parts), held[0][name][1])
            if streams:
                yield PageTensors((at, at + len(held)), (part, part + 1), tokens, streams)
            at += len(held)

    def refill(self, cache: Sequence[Any], pages: Sequence[PageTensors]) -> int:
        """Fill fresh caches of the same layers with ``pages`` and the states held here.

        Raises: ModelError, as `restore`.
        """
        span = (0, self.tokens)
        return restore(
            cache,
            pages,
            self.layers[0],
            states=list(self.state_pages(span)),
            state_start=self.states[0],
            tokens=self.tokens,
        )


def _form(layer: Mapping[str, _View]) -> object:
    return [(name, view.shape, dtype) for name, (view, dtype) in layer.items()]


def _padded(array: _HostArray) -> _HostArray:
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


def snapshot(
    cache: Sequence[Any],
    tokens: int,
    layer_start: int = 0,
    head_start: int = 0,
    *,
    latent: bool = False,
    state_start: int = 0,
    row: int | None = None,
    packed: bool = False,
) -> CacheSnapshot:
    """Hold on to the first ``tokens`` positions of a cache. Runs on the model's thread.

    Args:
        cache: caches of consecutive layers.
        layer_start: absolute page layer of the first that holds rows.
        head_start: absolute index of the first KV head (tensor parallelism).
        latent: whether rows are MLA's, latents and rotated keys.
        state_start: absolute state layer of the first state.
        row: which sequence of a batch cache; None: batch caches are refused, since
            tokens and rows might not belong together.
        packed: quantized caches as they are, for codecs that change no bit; else the
            numbers that they stand for.
    Raises:
        ModelError: another cache class, more than one sequence, too few tokens.
    """
    if row is not None:
        cache = [extracted(layer, row) for layer in cache]
    held = length(cache)
    if tokens < 1 or (held is not None and tokens > held):
        raise ModelError(f"{tokens} tokens wanted of a cache that holds {held}")
    parts = parts_of(cache)
    views = [_row_views(held, tokens, latent, packed) for held in parts.rows]
    states: list[dict[str, _View]] = []
    if held is None or held == tokens:
        states = [_state_views(leaf) for leaf in parts.states]
    mx.eval([view for layer in [*views, *states] for view, _ in layer.values()])
    heads = max((v.shape[1] for v, _ in views[0].values()), default=1) if views else 1
    return CacheSnapshot(
        (layer_start, layer_start + len(views)),
        tokens,
        (head_start, head_start + heads),
        views,
        (state_start, state_start + len(states)),
        states,
    )


def _row_views(held: Sequence[Any], tokens: int, latent: bool, packed: bool) -> dict[str, _View]:
    if packed and all(type(leaf).__name__ == "QuantizedKVCache" for leaf in held):
        arrays: dict[str, mx.array] = {}
        for leaf, names in zip(held, row_names(len(held), latent), strict=True):
            arrays |= packed_rows(leaf, names, tokens)
    else:
        arrays = row_arrays(held, tokens, latent)
    return {n: _view(a, n) for n, a in arrays.items()}


def row_arrays(held: Sequence[Any], tokens: int, latent: bool) -> dict[str, mx.array]:
    """Stream -> (batch, heads, tokens, dim) of one page layer; see `CacheParts`."""
    found = {}
    for leaf, names in zip(held, row_names(len(held), latent), strict=True):
        for name, buffer in zip(names, _rows(leaf).read(leaf), strict=True):
            if buffer.shape[3]:  # an indexer has no values
                found[name] = buffer[:, :, :tokens]
    return found


def row_names(count: int, latent: bool) -> Sequence[tuple[str, str]]:
    """Streams of each of ``count`` leaves of a page layer. Raises: ModelError."""
    names = ((_LATENT if latent else _PLAIN) + _SECOND)[:count]
    if len(names) < count:
        raise ModelError(f"a layer with {count} caches of rows is not supported")
    return names


def _state_views(leaf: Any) -> dict[str, _View]:
    return {name: _view(array, name) for name, array in state_adapter(leaf).read(leaf).items()}


def _view(view: mx.array, name: str) -> _View:
    if view.shape[0] != 1:
        raise ModelError(f"a cache of {view.shape[0]} sequences at once cannot be stored")
    if view.dtype not in _DTYPES:
        raise ModelError(f"stream {name}: elements of {view.dtype} are not supported")
    kind = _DTYPES[view.dtype]
    if view.dtype == mx.bfloat16:  # numpy has none
        view = view.view(mx.uint16)
    return view, kind


def restore(
    cache: Sequence[Any],
    pages: Sequence[PageTensors],
    layer_start: int = 0,
    *,
    states: Sequence[PageTensors] = (),
    state_start: int = 0,
    tokens: int | None = None,
) -> int:
    """Fill fresh caches, in place; all of them or none.

    Args:
        cache: empty caches of consecutive layers; the objects themselves are filled.
        pages: in order, from token 0 on without gaps, each with all page layers.
        layer_start: absolute index of the first page layer.
        states: of all state layers, as `CacheSnapshot.state_pages` gave them.
        state_start: absolute index of the first state layer.
        tokens: the position of the states; by default where the pages end.
    Returns: tokens that the caches hold now.
    Raises:
        ModelError: pages or states do not fit; the caches are as they were.
    """
    parts = parts_of(cache)
    if length(cache):
        raise ModelError(f"the cache to be filled holds {length(cache)} tokens already")
    total = tokens if tokens is not None else pages[-1].tokens[1] if pages else 0
    if not total:
        return 0
    if parts.rows:
        _check(pages, (layer_start, layer_start + len(parts.rows)), total)
    rows = [_staged_rows(pages, index, total, held) for index, held in enumerate(parts.rows)]
    kept = _staged_states(parts.states, states, state_start)
    mx.eval([arrays for layer in rows for _, arrays in layer])
    mx.eval([arrays for _, _, arrays in kept])
    for layer in rows:
        for fill, _ in layer:
            fill()
    for leaf, state, arrays in kept:
        state.fill(leaf, arrays, total)
    return total


def _staged_rows(
    pages: Sequence[PageTensors], index: int, total: int, held: Sequence[Any]
) -> list[tuple[Callable[[], None], list[mx.array]]]:
    """For each leaf of a page layer: how to fill it, and the arrays for that."""
    streams = pages[0].streams
    latent = any(name.partition(".")[0] == "latent" for name in streams)
    staged: list[tuple[Callable[[], None], list[mx.array]]] = []
    for leaf, names in zip(held, row_names(len(held), latent), strict=True):
        adapter = _rows(leaf)
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
