"""A live cache that holds fewer entries than the tokens it stands for."""

from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache

from kvferry.codec.kept import Positions, Weights
from kvferry.errors import ModelError


class GappedKVCache(KVCache):
    """mlx-lm's `KVCache` with gaps: what is appended goes on at the position after the gaps.

    ``offset``, which models rotate new queries and keys by, counts tokens; ``entries``
    counts rows of the buffers. Any earlier entry is before any later token, so causal
    masks count entries, and only sliding windows look at positions.

    Attributes:
        offset: position of the next token.
        entries: rows held.
        log_weights: float32 (1, kv_heads, 1, n) for the first n entries, the logarithm of
            the tokens that each stands for, to be added to attention scores; None: each
            stands for itself. See `kvferry.codec.mlx.weighted_attention`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0
        self.log_weights: mx.array | None = None
        self._first = np.zeros(0, dtype=np.int64)
        self._weights: Weights | None = None
        self._unanswered = False

    @classmethod
    def of(cls, held: Any, offset: int, positions: Positions, weights: Weights | None) -> Self:
        """Take over the buffers of a `KVCache`.

        Args:
            held: with ``held.offset`` rows.
            offset: position of the next token.
            positions: (rows,) or (kv_heads, rows), of each row.
            weights: (kv_heads, rows), tokens that each stands for; 0: none, padding.
        """
        made = cls()
        made.keys, made.values = held.keys, held.values
        made.entries, made.offset = int(held.offset), offset
        made._first, made._weights = positions, weights
        if weights is not None:
            with np.errstate(divide="ignore"):
                made.log_weights = mx.array(np.log(weights)[None, :, None, :])
        return made

    @property
    def positions(self) -> Positions:
        """Of each entry, int64 (entries,) or (kv_heads, entries)."""
        first = self._first[..., : self.entries]
        count = self.entries - first.shape[-1]
        later = np.arange(self.offset - count, self.offset, dtype=np.int64)
        return np.concatenate([first, np.broadcast_to(later, (*first.shape[:-1], count))], axis=-1)

    def weights(self) -> Weights | None:
        """Tokens that each entry stands for, (kv_heads, entries); None: each for itself."""
        if self._weights is None:
            return None
        later = self.entries - self._weights.shape[1]
        return np.pad(self._weights, ((0, 0), (0, later)), constant_values=1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append; all entries. Raises: ModelError: attention leaves the weights out."""
        if self._unanswered:
            raise ModelError(
                "attention leaves out how many tokens an entry stands for: run the model "
                "within kvferry.codec.mlx.weighted_attention.weighted_attention(model)"
            )
        self._unanswered = self.log_weights is not None
        position, count = self.offset, keys.shape[2]
        self.offset = self.entries  # the buffers are the parent's business
        super().update_and_fetch(keys, values)  # type: ignore[no-untyped-call]
        self.entries, self.offset = self.offset, position + count
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All entries."""
        keys: Any = self.keys
        values: Any = self.values
        return keys[..., : self.entries, :], values[..., : self.entries, :]

    @property
    def awaits_weights(self) -> bool:
        """Whether the weights are still to be added to what was fetched last."""
        return self._unanswered

    def weigh(self, mask: mx.array | str | None, queries: mx.array) -> mx.array:
        """A mask that adds the weights too; to be called once after each fetch.

        Args:
            mask: as the model made it: None, "causal", bool or additive, (..., new, entries).
            queries: (1, heads, new, dim); KV heads divide the heads among them, in order.
        Returns: additive, (1, heads, 1 or new, entries), in the type of ``queries``.
        """
        self._unanswered = False
        assert self.log_weights is not None  # noqa: S101
        later = self.entries - self.log_weights.shape[3]
        bias = mx.pad(self.log_weights, [(0, 0), (0, 0), (0, 0), (0, later)])
        bias = mx.repeat(bias, queries.shape[1] // bias.shape[1], axis=1)
        new = queries.shape[2]
        seen = create_causal_mask(new, self.entries - new) if isinstance(mask, str) else mask
        if seen is not None and seen.dtype == mx.bool_:
            bias = mx.where(seen, bias, -mx.inf)
        elif seen is not None:
            bias = bias + seen
        return bias.astype(queries.dtype)

    def make_mask(
        self,
        N: int,  # noqa: N803 (mlx-lm's name)
        return_array: bool = False,
        window_size: int | None = None,
    ) -> mx.array | str | None:
        """As `KVCache.make_mask`, for ``N`` new tokens. Raises: ModelError: a window over
        heads that keep different tokens."""
        if window_size is None:
            if N == 1:
                return None
            return create_causal_mask(N, self.entries) if return_array else "causal"
        held = self.positions
        if held.ndim > 1:
            raise ModelError("sliding attention over heads that keep different tokens")
        new = np.arange(self.offset, self.offset + N, dtype=np.int64)
        back = new[:, None] - np.concatenate([held, new])[None]
        return mx.array((back >= 0) & (back < window_size))

    def trim(self, n: int) -> int:
        """Take back tokens that were appended; those before stay. Returns: how many."""
        n = min(self.entries - self._first.shape[-1], n)
        self.entries -= n
        self.offset -= n
        return n

    @property
    def state(self) -> Any:
        """Buffers, for `mx.eval`."""
        return self.keys, self.values

    @state.setter
    def state(self, value: Any) -> None:
        raise ModelError("a cache with gaps is not read from mlx-lm's prompt cache files")

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Raises: ModelError."""
        raise ModelError("a cache with gaps cannot be quantized")

    @classmethod
    def merge(cls, caches: Any) -> Any:
        """Raises: ModelError."""
        raise ModelError("caches with gaps cannot be batched")
