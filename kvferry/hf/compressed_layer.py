"""One layer of a cache whose history is kept encoded: chunks behind a window of exact rows."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvferry.hf.history import History, Pair


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer; what lies behind the window is encoded, chunk by chunk.

    `update` answers with exact rows while they are within the window, and with decoded ones
    from then on.

    Args:
        history: makes an empty history.
        chunk: tokens encoded together.
        window: the newest tokens, which are never encoded.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, history: Callable[[], History], chunk: int, window: int) -> None:
        super().__init__()
        self._new, self._chunk, self._window = history, chunk, window
        self._history = history()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and shapes from the first rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """Append rows, (batch, heads, tokens, dim).

        Returns: all keys and values, history decoded.
        Raises: UnsupportedTensorError: rows that the codec refuses (NaN, infinities).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        whole = self.decoded()
        self._fold()
        return whole

    def decoded(self) -> Pair:
        """All keys and values, (batch, heads, tokens, dim), as the model sees them."""
        if not self._history.tokens:
            return self.keys, self.values
        keys, values = self._history.decoded()
        return torch.cat([keys, self.keys], dim=-2), torch.cat([values, self.values], dim=-2)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for the history, and for the window's exact rows."""
        recent = self.keys.nbytes + self.values.nbytes if self.is_initialized else 0
        return self._history.nbytes, recent

    def _fold(self) -> None:
        """Encode whole chunks that have left the window."""
        size, count = self._chunk, (self.keys.shape[-2] - self._window) // self._chunk
        for at in range(0, count * size, size):
            self._history.append(self.keys[:, :, at : at + size], self.values[:, :, at : at + size])
        if count > 0:
            # A copy: a view would keep the rows that were just encoded.
            self.keys = self.keys[:, :, count * size :].clone()
            self.values = self.values[:, :, count * size :].clone()

    def get_seq_length(self) -> int:
        """Tokens held, encoded ones included."""
        return self._history.tokens + int(self.keys.shape[-2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a query of so many tokens sees, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self._history, self.is_initialized = self._new(), False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. Raises: ValueError for a number above 0."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or less: how many tokens to remove")
        if not tokens_to_remove or not self.is_initialized:
            return
        recent = self.keys.shape[-2]
        left = max(0, recent + tokens_to_remove)
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        self._history.crop(-tokens_to_remove - (recent - left))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences in another order, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0]).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences, in this order."""
        if not self.is_initialized:
            return
        rows = torch.arange(self.keys.shape[0])[indices.cpu()]
        where = rows.to(self.keys.device)
        self.keys, self.values = self.keys[where], self.values[where]
        self._history.select(rows)

    def offload(self) -> None:
        """Stays where it is: it is small already."""

    def prefetch(self) -> None:
        """See `offload`."""
