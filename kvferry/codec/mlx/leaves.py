"""How each cache class of mlx-lm is read and filled.

A layer's cache is one of these, or a `CacheList` of them. Those that hold a row for every
token can be cut at any token; the others (recurrent state, rings that drop old tokens) are
kept as they are at one position. Attributes are used and never ``.state``, whose layout
has changed between releases.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvferry.codec.base import RING_KEYS, RING_VALUES, STATE_PREFIX
from kvferry.errors import ModelError

STEP = 256  # mlx-lm's KVCache grows in steps of so many tokens
_MAX_STATE_DIMS = 4

Pair = tuple[mx.array, mx.array]
Arrays = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class RowsAdapter:
    """A cache class that holds a row for every token.

    Attributes:
        read: leaf -> keys and values, each (batch, heads, at least ``offset``, dim).
        fill: (leaf, keys, values, tokens) -> None; must not fail.
        step: buffers to be filled in are a multiple of so many tokens.
    """

    read: Callable[[Any], Pair]
    fill: Callable[[Any, mx.array, mx.array, int], None]
    step: int = STEP


@dataclass(frozen=True, slots=True)
class StateAdapter:
    """A cache class that can only be restored at the position where it was read.

    Attributes:
        read: leaf -> stream name -> array (batch, ...), at most 4-d.
        fill: (leaf, stream name -> array, tokens) -> None; must not fail.
        fits: (leaf, stream names) -> whether `fill` can take these.
        shape: (stream name, three dims as stored) -> the array's own shape.
        length: leaf -> tokens it has seen, None where it does not say.
    """

    read: Callable[[Any], Arrays]
    fill: Callable[[Any, Arrays, int], None]
    fits: Callable[[Any, Sequence[str]], bool]
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    length: Callable[[Any], int | None]


def rows_adapter(leaf: Any) -> RowsAdapter | None:
    """None: not a class that holds rows. Raises: ModelError: no class that is known."""
    # By exact name: a subclass may keep its tokens in another order.
    name = type(leaf).__name__
    if name not in _ROWS and name not in _STATES:
        known = ", ".join(sorted({*_ROWS, *_STATES}))
        raise ModelError(f"cache class {name} is not supported: only {known} can be stored")
    return _ROWS.get(name)


def state_adapter(leaf: Any) -> StateAdapter:
    """Of a leaf that `rows_adapter` has nothing for."""
    return _STATES[type(leaf).__name__]


def leaves(layer: Any) -> Iterator[Any]:
    """The caches of one layer, those in (nested) lists one by one."""
    if type(layer).__name__ == "CacheList":
        for child in layer.caches:
            yield from leaves(child)
    else:
        yield layer


def extracted(layer: Any, row: int) -> Any:
    """One sequence of a batch cache, as a plain one; a plain cache is itself."""
    name = type(layer).__name__
    if name.startswith("Batch") or (name in ("CacheList", "ArraysCache") and _is_batch(layer)):
        return layer.extract(row)
    return layer


def _is_batch(layer: Any) -> bool:
    for leaf in leaves(layer):
        if type(leaf).__name__.startswith("Batch"):
            return True
        held = [a for a in getattr(leaf, "cache", []) if a is not None]
        if held and held[0].shape[0] != 1:
            return True
    return False


def _read_kv(leaf: Any) -> Pair:
    return leaf.keys, leaf.values


def _fill_kv(leaf: Any, keys: mx.array, values: mx.array, tokens: int) -> None:
    leaf.keys, leaf.values, leaf.offset = keys, values, tokens


def _read_chunked(leaf: Any) -> Pair:
    if leaf.start_position:
        raise ModelError(
            f"the first {leaf.start_position} tokens have left a chunked cache: "
            f"prompts of at most {leaf.chunk_size} tokens can be stored"
        )
    return leaf.keys, leaf.values


def _fill_chunked(leaf: Any, keys: mx.array, values: mx.array, tokens: int) -> None:
    _fill_kv(leaf, keys, values, tokens)
    leaf.start_position = 0


def _read_quantized(leaf: Any) -> Pair:
    def plain(parts: Sequence[mx.array]) -> mx.array:
        levels, scales, biases = (part[..., : leaf.offset, :] for part in parts)
        return mx.dequantize(levels, scales, biases, group_size=leaf.group_size, bits=leaf.bits)

    return plain(leaf.keys), plain(leaf.values)


def packed_rows(leaf: Any, names: Sequence[str], tokens: int) -> dict[str, mx.array]:
    """A quantized cache as it is: levels, scales and biases of keys and values, as streams.

    32-bit words of levels travel as the bits of float32.
    """
    found = {}
    for name, parts in zip(names, (leaf.keys, leaf.values), strict=True):
        levels, scales, biases = (part[..., :tokens, :] for part in parts)
        found[f"{name}.levels"] = levels.view(mx.float32)
        found[f"{name}.scales"], found[f"{name}.biases"] = scales, biases
    return found


def fill_packed(
    leaf: Any, parts: Mapping[str, mx.array], names: Sequence[str], tokens: int
) -> None:
    """Undo `packed_rows`; must not fail."""
    keys, values = (
        tuple(parts[f"{name}.{part}"] for part in ("levels", "scales", "biases")) for name in names
    )
    leaf.keys, leaf.values, leaf.offset = keys, values, tokens


def cache_form(cache: Sequence[Any]) -> str:
    """What else than the model decides the numbers in a cache; empty for plain ones."""
    forms = {
        f"{leaf.bits} bits, groups of {leaf.group_size}"
        for layer in cache
        for leaf in leaves(layer)
        if type(leaf).__name__ == "QuantizedKVCache"
    }
    return "; ".join(sorted(forms))


def _fill_quantized(leaf: Any, keys: mx.array, values: mx.array, tokens: int) -> None:
    leaf.keys = mx.quantize(keys, group_size=leaf.group_size, bits=leaf.bits)
    leaf.values = mx.quantize(values, group_size=leaf.group_size, bits=leaf.bits)
    leaf.offset = tokens


def _read_ring(leaf: Any) -> Arrays:
    keys, values = (_in_order(leaf, a)[:, :, -leaf.max_size :] for a in (leaf.keys, leaf.values))
    if leaf.keep and leaf.offset > leaf.max_size:
        keys, values = (_with_first(leaf, a) for a in (leaf.keys, leaf.values))
    return {RING_KEYS: keys, RING_VALUES: values}


def _in_order(leaf: Any, buffer: mx.array) -> mx.array:
    """Rows by age, without what is not used yet; see `RotatingKVCache._temporal_order`."""
    at = leaf._idx
    if at == buffer.shape[2]:
        return buffer
    if at < leaf.offset:
        old = [buffer[:, :, : leaf.keep], buffer[:, :, at:], buffer[:, :, leaf.keep : at]]
        return mx.concatenate(old, axis=2)
    return buffer[:, :, :at]


def _with_first(leaf: Any, buffer: mx.array) -> mx.array:
    rows = _in_order(leaf, buffer)
    recent = rows[:, :, rows.shape[2] - (leaf.max_size - leaf.keep) :]
    return mx.concatenate([rows[:, :, : leaf.keep], recent], axis=2)


def _fill_ring(leaf: Any, arrays: Arrays, tokens: int) -> None:
    leaf.keys, leaf.values = arrays[RING_KEYS], arrays[RING_VALUES]
    leaf.offset, leaf._idx = tokens, leaf.keys.shape[2]


def _read_arrays(leaf: Any) -> Arrays:
    found = {}
    for index, array in enumerate(leaf.cache):
        if array is not None:
            if array.ndim > _MAX_STATE_DIMS:
                raise ModelError(f"a state of {array.ndim} dimensions is not supported")
            # The name tells how many dimensions it has: streams are padded to four.
            found[f"{STATE_PREFIX}{index}.{array.ndim}d"] = array
    return found


def _fill_arrays(leaf: Any, arrays: Arrays, tokens: int) -> None:
    for name, array in arrays.items():
        leaf.cache[_place(name)[0]] = array


def _place(name: str) -> tuple[int, int]:
    index, dims = name.removeprefix(STATE_PREFIX).split(".")
    return int(index), int(dims[:-1])


def _fits_arrays(leaf: Any, names: Sequence[str]) -> bool:
    return all(_is_place(n) and _place(n)[0] < len(leaf.cache) for n in names)


def _is_place(name: str) -> bool:
    index, _, dims = name.removeprefix(STATE_PREFIX).partition(".")
    return index.isdecimal() and dims in {f"{n}d" for n in range(1, _MAX_STATE_DIMS + 1)}


_ROWS: Mapping[str, RowsAdapter] = {
    "KVCache": RowsAdapter(_read_kv, _fill_kv),
    "ConcatenateKVCache": RowsAdapter(_read_kv, _fill_kv, 1),
    "ChunkedKVCache": RowsAdapter(_read_chunked, _fill_chunked),
    "QuantizedKVCache": RowsAdapter(_read_quantized, _fill_quantized),
}
_RING = StateAdapter(
    _read_ring,
    _fill_ring,
    lambda _, names: set(names) == {RING_KEYS, RING_VALUES},
    lambda _, stored: (1, *stored),
    lambda leaf: int(leaf.offset),
)
_ARRAYS = StateAdapter(
    _read_arrays,
    _fill_arrays,
    _fits_arrays,
    lambda name, stored: (1, *stored[_MAX_STATE_DIMS - _place(name)[1] :]),
    lambda _: None,
)
_STATES: Mapping[str, StateAdapter] = {
    "RotatingKVCache": _RING,
    "ArraysCache": _ARRAYS,
    "MambaCache": _ARRAYS,
}
