"""Live mlx-lm caches to page tensors and back: the one place that knows cache classes.

`snapshot` runs on the model's thread and makes no copies; converting to host arrays
happens later, on any thread. `restore` stages everything before it touches a cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.errors import ModelError

STEP = 256  # mlx-lm's KVCache grows in steps of so many tokens
_DTYPES = {mx.float16: DType.FLOAT16, mx.bfloat16: DType.BFLOAT16, mx.float32: DType.FLOAT32}
_MLX_DTYPES = {kind: dtype for dtype, kind in _DTYPES.items()}
_HostArray = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """How one cache class is read and filled.

    Attributes:
        read: cache -> stream name -> buffer (batch, heads, at least length, dim).
        fill: (cache, stream name -> buffer, length) -> None; must not fail.
        step: buffers are made a multiple of so many tokens.
    """

    read: Callable[[Any], Mapping[str, mx.array]]
    fill: Callable[[Any, Mapping[str, mx.array], int], None]
    step: int


def _read_kv(cache: Any) -> Mapping[str, mx.array]:
    # .state has changed its layout between releases; these attributes have not.
    return {"k": cache.keys, "v": cache.values}


def _fill_kv(cache: Any, buffers: Mapping[str, mx.array], length: int) -> None:
    cache.keys, cache.values, cache.offset = buffers["k"], buffers["v"], length


_ADAPTERS: Mapping[str, _Adapter] = {
    "KVCache": _Adapter(_read_kv, _fill_kv, STEP),
    "ConcatenateKVCache": _Adapter(_read_kv, _fill_kv, 1),
}


def check_supported(cache: Any) -> None:
    """Raises: ModelError for a cache class that cannot be stored yet."""
    _adapter(cache)


def _adapter(cache: Any) -> _Adapter:
    # By exact name: a subclass may keep its tokens in another order.
    name = type(cache).__name__
    if name not in _ADAPTERS:
        raise ModelError(
            f"cache class {name} is not supported yet: only {', '.join(_ADAPTERS)} can be stored"
        )
    return _ADAPTERS[name]


def length(cache: Sequence[Any]) -> int:
    """Tokens that all layers hold. Raises: ModelError (layers differ, or no layers)."""
    lengths = {int(layer.offset) if _adapter(layer) else 0 for layer in cache}
    if len(lengths) != 1:
        raise ModelError(f"layers of one cache hold different numbers of tokens: {lengths}")
    return lengths.pop()


@dataclass(frozen=True, slots=True, eq=False)
class CacheSnapshot:
    """Views of a cache as it was; later writes of the model go to buffers of their own.

    Attributes:
        layers: absolute, half-open.
        tokens: positions 0 to ``tokens`` are held.
        heads: absolute, half-open.
    """

    layers: tuple[int, int]
    tokens: int
    heads: tuple[int, int]
    _views: Sequence[Mapping[str, tuple[mx.array, DType]]]

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        """Host copies of absolute layers and tokens. Any thread may call it.

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


def snapshot(
    cache: Sequence[Any], tokens: int, layer_start: int = 0, head_start: int = 0
) -> CacheSnapshot:
    """Hold on to the first ``tokens`` positions of a cache. Runs on the model's thread.

    Args:
        cache: caches of consecutive layers.
        layer_start: absolute index of the first of them.
        head_start: absolute index of the first KV head (tensor parallelism).
    Raises:
        ModelError: another cache class, more than one sequence, too few tokens.
    """
    held = length(cache)
    if not 0 < tokens <= held:
        raise ModelError(f"{tokens} tokens wanted of a cache that holds {held}")
    views: list[dict[str, tuple[mx.array, DType]]] = []
    for index, layer in enumerate(cache):
        views.append({})
        for name, buffer in _adapter(layer).read(layer).items():
            views[-1][name] = _view(buffer, name, tokens, layer_start + index)
    mx.eval([view for layer in views for view, _ in layer.values()])
    heads = views[0]["k"][0].shape[1]
    layers = (layer_start, layer_start + len(cache))
    return CacheSnapshot(layers, tokens, (head_start, head_start + heads), views)


def _view(buffer: mx.array, name: str, tokens: int, layer: int) -> tuple[mx.array, DType]:
    if buffer.shape[0] != 1:
        raise ModelError(f"a cache of {buffer.shape[0]} sequences at once cannot be stored")
    if buffer.dtype not in _DTYPES:
        raise ModelError(f"layer {layer}, {name}: elements of {buffer.dtype} are not supported")
    view = buffer[:, :, :tokens]
    if buffer.dtype == mx.bfloat16:  # numpy has none
        view = view.view(mx.uint16)
    return view, _DTYPES[buffer.dtype]


def restore(cache: Sequence[Any], pages: Sequence[PageTensors], layer_start: int = 0) -> int:
    """Fill fresh caches, in place; all of them or none.

    Args:
        cache: empty caches of consecutive layers; the objects themselves are filled.
        pages: in order, from token 0 on without gaps, each with all these layers.
        layer_start: absolute index of the first layer.
    Returns: tokens that the caches hold now.
    Raises:
        ModelError: the pages do not fit; the caches are as they were.
    """
    adapters = [_adapter(layer) for layer in cache]
    if length(cache):
        raise ModelError(f"the cache to be filled holds {length(cache)} tokens already")
    if not pages:
        return 0
    _check(pages, (layer_start, layer_start + len(cache)))
    total = pages[-1].tokens[1]
    staged = [
        {name: _buffer(pages, name, index, total, adapter.step) for name in pages[0].streams}
        for index, adapter in enumerate(adapters)
    ]
    mx.eval(staged)
    for layer, adapter, buffers in zip(cache, adapters, staged, strict=True):
        adapter.fill(layer, buffers, total)
    return total


def _check(pages: Sequence[PageTensors], layers: tuple[int, int]) -> None:
    end = 0
    kinds = {name: (s.data.shape[1], s.data.shape[3], s.dtype) for name, s in _streams(pages[0])}
    if set(kinds) != {"k", "v"}:
        raise ModelError(f"pages of streams {sorted(kinds)} do not fit a cache of k and v")
    for page in pages:
        if page.layers != layers:
            raise ModelError(f"a page of layers {page.layers} does not fit layers {layers}")
        if page.tokens[0] != end:
            raise ModelError(f"a page starts at token {page.tokens[0]}, {end} wanted")
        end = page.tokens[1]
        found = {n: (s.data.shape[1], s.data.shape[3], s.dtype) for n, s in _streams(page)}
        if found != kinds:
            raise ModelError("pages differ in heads, dimensions or element type")


def _streams(page: PageTensors) -> list[tuple[str, Stream]]:
    return list(page.streams.items())


def _buffer(pages: Sequence[PageTensors], name: str, layer: int, total: int, step: int) -> mx.array:
    """(1, heads, total rounded up to ``step``, dim), zeros behind ``total``."""
    first = pages[0].streams[name]
    heads, dim = first.data.shape[1], first.data.shape[3]
    host: _HostArray = np.empty((1, heads, -(-total // step) * step, dim), first.data.dtype)
    for page in pages:
        host[0, :, page.tokens[0] : page.tokens[1]] = page.streams[name].data[layer]
    host[:, :, total:] = 0
    made = mx.array(host)
    return made.view(mx.bfloat16) if first.dtype is DType.BFLOAT16 else made
