"""Live mlx-lm caches as page and state tensors.

`snapshot` runs on the model's thread and makes no copies; converting to host arrays
happens later, on any thread. The way back is `kvferry.codec.mlx.refill`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvferry.codec.base import Codec, DType, PageTensors, Stream
from kvferry.codec.mlx.gaps import Ropes
from kvferry.codec.mlx.leaves import extracted, packed_rows, state_adapter
from kvferry.codec.mlx.parts import length, parts_of, row_arrays, row_names
from kvferry.codec.mlx.refill import restore
from kvferry.codec.state_parts import StateLayout
from kvferry.codec.unrotating import told_ropes
from kvferry.errors import ModelError

_DTYPES = {mx.float16: DType.FLOAT16, mx.bfloat16: DType.BFLOAT16, mx.float32: DType.FLOAT32}
_HostArray = npt.NDArray[np.generic]
_View = tuple[mx.array, DType]


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
    _layout: StateLayout | None = None
    _ropes: Ropes | None = None

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

    def told(self, codec: Codec, layers: tuple[int, int]) -> Codec:
        """``codec``, told how keys of absolute page layers rotate, if it has to know."""
        first = self.layers[0]
        return told_ropes(codec, self._ropes, slice(layers[0] - first, layers[1] - first))

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterator[PageTensors]:
        """States of consecutive layers of one form, as stored. Any thread may call it.

        Args:
            tokens: what a blob of them is to say; they stand at its end.
            part: which part of the states this rank has; the pages' ``heads``.
        """
        layout = self._layout
        for page in self._state_pages(tokens, part):
            yield page if layout is None else layout.split(page)

    def _state_pages(self, tokens: tuple[int, int], part: int) -> Iterator[PageTensors]:
        at = self.states[0]
        for _, run in groupby(enumerate(self._states, at), key=self._form):
            held = [layer for _, layer in run]
            streams = {}
            for name in held[0]:
                parts = [_padded(np.asarray(layer[name][0])[0]) for layer in held]
                streams[name] = Stream(name, np.stack(parts), held[0][name][1])
            if streams:
                yield PageTensors((at, at + len(held)), (part, part + 1), tokens, streams)
            at += len(held)

    def _form(self, numbered: tuple[int, Mapping[str, _View]]) -> object:
        number, layer = numbered
        form = [(name, view.shape, dtype) for name, (view, dtype) in layer.items()]
        divided = None if self._layout is None else self._layout.of(number)
        return form, divided

    def refill(self, cache: Sequence[Any], pages: Sequence[PageTensors]) -> int:
        """Fill fresh caches of the same layers with ``pages`` and the states held here.

        Pages may lack tokens: see `restore`, which also tells why ``cache`` is best a list.

        Returns: the position at which the caches go on.
        Raises: ModelError, UnsupportedTensorError, as `restore`.
        """
        span = (0, self.tokens)
        return restore(
            cache,
            pages,
            self.layers[0],
            states=list(self._state_pages(span, 0)),
            state_start=self.states[0],
            tokens=self.tokens,
            ropes=self._ropes,
        )


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
    layout: StateLayout | None = None,
    ropes: Ropes | None = None,
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
        layout: which part of the states this rank has; None: all of them.
        ropes: gives each page layer's (see `kvferry.codec.mlx.rope.page_ropes`); asked
            where a refill puts entries side by side.
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
        layout,
        ropes,
    )


def _row_views(held: Sequence[Any], tokens: int, latent: bool, packed: bool) -> dict[str, _View]:
    if packed and all(type(leaf).__name__ == "QuantizedKVCache" for leaf in held):
        arrays: dict[str, mx.array] = {}
        for leaf, names in zip(held, row_names(len(held), latent), strict=True):
            arrays |= packed_rows(leaf, names, tokens)
    else:
        arrays = row_arrays(held, tokens, latent)
    return {n: _view(a, n) for n, a in arrays.items()}


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
