"""A live mlx-lm cache that keeps its history packed to 6 or 8 bits.

Each attention unpacks the history and forgets it again, so that the cache costs the bits
that it keeps; what was read last, up to a block of tokens, stays as it is until the block
is full. A block has its own range for each channel of each head, as the pages of
`kvferry.codec.bitpack_pages`; a sequence's first tokens are never packed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask, make_prompt_cache

from kvferry.codec.bitpack import BITS
from kvferry.errors import ConfigError, ModelError
from kvferry.proto.keys import SINK_TOKENS

BLOCK_TOKENS = 128

_Arrays = tuple[mx.array, ...]
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, slots=True, eq=False)
class _History:
    """Keys or values. Token t of a block lies beside t + block/4, t + block/2, ...: whole
    rows are packed, four into three.

    Attributes:
        first, recent: (batch, heads, tokens, dim) as they came.
        levels: (batch, heads, blocks, rows, dim) uint8.
        low, high: (batch, heads, blocks, 1, dim) ends of ranges.
    """

    first: mx.array
    levels: mx.array
    low: mx.array
    high: mx.array
    recent: mx.array

    @classmethod
    def empty(cls, like: mx.array, bits: int, block: int) -> Self:
        batch, heads, _, dim = like.shape
        none = mx.zeros((batch, heads, 0, dim), like.dtype)
        ends = mx.zeros((batch, heads, 0, 1, dim), like.dtype)
        levels = mx.zeros((batch, heads, 0, block * bits // 8, dim), mx.uint8)
        return cls(none, levels, ends, ends, none)

    @property
    def arrays(self) -> _Arrays:
        return self.first, self.levels, self.low, self.high, self.recent

    def appended(self, new: mx.array, sinks: int) -> "_History":
        """With what came in behind the rest."""
        missing = sinks - self.first.shape[2]
        if missing > 0 and not self.recent.shape[2]:
            first = mx.concatenate([self.first, new[:, :, :missing]], axis=2)
            return replace(self, first=first, recent=new[:, :, missing:])
        return replace(self, recent=_joined([self.recent, new], axis=2))

    def packed(self, bits: int, block: int) -> "_History":
        """With whole blocks of what is recent packed."""
        count = self.recent.shape[2] // block
        if not count:
            return self
        batch, heads, _, dim = self.recent.shape
        whole = self.recent[:, :, : count * block].reshape(batch, heads, count, block, dim)
        low, high = whole.min(axis=3, keepdims=True), whole.max(axis=3, keepdims=True)
        levels = _pack[bits](*(array.astype(mx.float32) for array in (whole, low, high)))
        made = (levels, low, high)
        held = (self.levels, self.low, self.high)
        levels, low, high = (_joined(p, axis=2) for p in zip(held, made, strict=True))
        return _History(self.first, levels, low, high, self.recent[:, :, count * block :])

    def whole(self, bits: int, block: int) -> mx.array:
        """All tokens, (batch, heads, tokens, dim)."""
        if not self.levels.shape[2]:
            return mx.concatenate([self.first, self.recent], axis=2)
        return _joined([self.first, self._unpacked(bits, block), self.recent], axis=2)

    def cut(self, tokens: int, bits: int, block: int) -> "_History":
        """The first ``tokens``; a block that is cut through is unpacked."""
        first = self.first[:, :, :tokens]
        rest = tokens - first.shape[2]
        kept, over = divmod(rest, block)
        count = self.levels.shape[2]
        if kept >= count:
            return replace(self, first=first, recent=self.recent[:, :, : rest - count * block])
        torn = self._blocks(slice(kept, kept + 1))._unpacked(bits, block)[:, :, :over]
        return replace(self._blocks(slice(kept)), first=first, recent=torn)

    def _blocks(self, part: slice) -> "_History":
        levels, low, high = (a[:, :, part] for a in (self.levels, self.low, self.high))
        return _History(self.first, levels, low, high, self.recent)

    def _unpacked(self, bits: int, block: int) -> mx.array:
        batch, heads, count, _, dim = self.levels.shape
        ends = (self.low.astype(mx.float32), self.high.astype(mx.float32))
        found = _unpack(self.levels, *ends, bits).astype(self.low.dtype)
        return found.reshape(batch, heads, count * block, dim)


class BitPackedCache:
    """A drop-in for mlx-lm's ``KVCache``.

    Trimming into what is packed unpacks the block that is cut; packed again, its values
    move by another half step at most.
    """

    def __init__(
        self,
        num_bits: int = 6,
        block_tokens: int = BLOCK_TOKENS,
        sinks: int = SINK_TOKENS,
    ) -> None:
        """``block_tokens``: a multiple of 4. Raises: ConfigError."""
        # Not named "bits": mlx-lm takes caches that have those for its own quantized ones.
        if num_bits not in BITS:
            raise ConfigError("num_bits", num_bits, "6 or 8")
        if block_tokens < 4 or block_tokens % 4:
            raise ConfigError("block_tokens", block_tokens, "a multiple of 4")
        if sinks < 0:
            raise ConfigError("sinks", sinks, "0 or more tokens")
        self.num_bits, self.block_tokens, self.sinks = num_bits, block_tokens, sinks
        self.offset = 0
        self._held: tuple[_History, _History] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append; returns all keys and values, (batch, heads, tokens, dim), just unpacked.

        What comes in is seen as it is once, and packed for those who ask later.
        """
        how = self.num_bits, self.block_tokens
        held = self._held or (_History.empty(keys, *how), _History.empty(values, *how))
        grown = [h.appended(new, self.sinks) for h, new in zip(held, (keys, values), strict=True)]
        found = tuple(history.whole(*how) for history in grown)
        self._held = (grown[0].packed(*how), grown[1].packed(*how))
        self.offset += keys.shape[2]
        return found[0], found[1]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All tokens, unpacked."""
        keys, values = self._filled()
        how = self.num_bits, self.block_tokens
        return keys.whole(*how), values.whole(*how)

    @property
    def state(self) -> Sequence[mx.array]:
        """All arrays, of keys and then of values; none before the first token."""
        return [a for history in self._held or () for a in history.arrays]

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        if not arrays:
            self._held, self.offset = None, 0
            return
        self._held = (_History(*arrays[:5]), _History(*arrays[5:]))
        first, levels, _, _, recent = arrays[:5]
        packed = levels.shape[2] * self.block_tokens
        self.offset = first.shape[2] + packed + recent.shape[2]

    def is_trimmable(self) -> bool:
        """Always."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many were forgotten."""
        n = min(self.offset, n)
        if n and self._held is not None:
            left, how = self.offset - n, (self.num_bits, self.block_tokens)
            keys, values = self._held
            self._held = (keys.cut(left, *how), values.cut(left, *how)) if left else None
            self.offset = left
        return n

    def make_mask(self, tokens: int, **kwargs: Any) -> Any:
        """As ``KVCache`` has it."""
        return create_attention_mask(tokens, offset=self.offset, **kwargs)

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing is held."""
        return self._held is None

    @property
    def nbytes(self) -> int:
        """Bytes kept between two tokens."""
        return sum(array.nbytes for array in self.state)

    def _filled(self) -> tuple[_History, _History]:
        if self._held is None:
            raise ConfigError("cache", "empty", "filled first")
        return self._held


def make_bitpack_cache(
    model: Any, num_bits: int = 6, block_tokens: int = BLOCK_TOKENS
) -> list[Any]:
    """The model's cache for ``generate_step``, each of its plain ``KVCache`` packed.

    Others (rotating, recurrent) are as the model has them.
    Raises: ConfigError; ModelError: a model of several pipeline stages, which set arrays of
        their caches.
    """
    if getattr(getattr(model, "model", model), "pipeline_size", 1) > 1:
        raise ModelError("a model split over a pipeline cannot use packed caches: run it whole")
    return [
        BitPackedCache(num_bits, block_tokens) if type(layer).__name__ == "KVCache" else layer
        for layer in make_prompt_cache(model)
    ]


def _levels(whole: mx.array, low: mx.array, high: mx.array, steps: int) -> mx.array:
    span = high - low
    scale = mx.where(span > 1e-35, steps / mx.maximum(span, 1e-35), 0.0)
    exact = (whole - low) * scale
    return mx.clip(mx.round(exact), 0, steps).astype(mx.uint8)


def _values(levels: mx.array, low: mx.array, high: mx.array, steps: int) -> mx.array:
    return levels.astype(mx.float32) * ((high - low) / steps) + low


def _pack_8(whole: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return _levels(whole, low, high, 255)


def _pack_6(whole: mx.array, low: mx.array, high: mx.array) -> mx.array:
    a, b, c, d = mx.split(_levels(whole, low, high, 63), 4, axis=3)
    return mx.concatenate([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], axis=3)


def _unpack(levels: mx.array, low: mx.array, high: mx.array, bits: int) -> mx.array:
    if bits == 6:
        levels = mx.concatenate(list(_quarters(_wide(levels, 4))), axis=3).view(mx.uint8)
    return _affine[bits](levels, low, high)


def _four_of_three(words: mx.array) -> _Arrays:
    """`_pack_6` undone, whole words of levels at once."""
    x, y, z = mx.split(words, 3, axis=3)
    ones = 0x01010101 & (256**words.itemsize - 1)
    return (
        x & (63 * ones),
        ((x >> 6) & (3 * ones)) | ((y << 2) & (60 * ones)),
        ((y >> 4) & (15 * ones)) | ((z << 4) & (48 * ones)),
        (z >> 2) & (63 * ones),
    )


def _affine_6(levels: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return _values(levels, low, high, 63)


def _affine_8(levels: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return _values(levels, low, high, 255)


def _joined(parts: Sequence[mx.array], axis: int) -> mx.array:
    """``concatenate``, which MLX does number by number on a CPU: in as wide ones as fit."""
    return mx.concatenate([_wide(p, 8) for p in parts], axis=axis).view(parts[0].dtype)


def _wide(array: mx.array, most: int) -> mx.array:
    """The same bytes as unsigned integers of up to ``most`` bytes; the last axis shrinks."""
    return array.view(_WORDS[math.gcd(array.shape[-1] * array.itemsize, most)])


_Kernel = Callable[[mx.array, mx.array, mx.array], mx.array]
# Fused by MLX: one pass over what is packed instead of one for each operation. In float32
# only: on a CPU every kernel is compiled once, by the system's compiler, in about a second.
_pack: dict[int, _Kernel] = {6: mx.compile(_pack_6), 8: mx.compile(_pack_8)}
_quarters: Callable[[mx.array], _Arrays] = mx.compile(_four_of_three)
_affine: dict[int, _Kernel] = {6: mx.compile(_affine_6), 8: mx.compile(_affine_8)}
