"""One layer of a cache whose history is kept encoded: chunks behind a window of exact rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvferry.codec.base import (
    CalibrationSource,
    Codec,
    CodedPage,
    PageTensors,
    RunCodec,
    Stream,
    Wanted,
)
from kvferry.hf.tensors import dtype_of, host_array, tensor_of


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Encoded rows of one sequence. ``kept``: how many of its tokens are still wanted."""

    page: CodedPage
    kept: int

    @property
    def nbytes(self) -> int:
        """Bytes of its sections."""
        return sum(len(section.data) for section in self.page.sections.values())


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer; what lies behind the window is encoded, chunk by chunk.

    `update` answers with exact rows while they are within the window, and with decoded ones
    from then on. Nothing is encoded twice: what `crop` leaves of a chunk stays as it is.

    Args:
        layer: absolute index, which codecs with a calibration look at.
        codec: of single layers.
        chunk: tokens encoded together.
        window: the newest tokens, which are never encoded.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        layer: int,
        codec: Codec,
        calibrations: CalibrationSource,
        chunk: int,
        window: int,
    ) -> None:
        super().__init__()
        self._layer, self._codec, self._calibrations = layer, codec, calibrations
        self._chunk, self._window = chunk, window
        # One list for each sequence of the batch, all of the same tokens.
        self._history: list[list[Chunk]] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and shapes from the first rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._history = [[] for _ in range(key_states.shape[0])]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows, (batch, heads, tokens, dim).

        Returns: all keys and values, history decoded.
        Raises: UnsupportedTensorError: rows that the codec refuses (NaN, infinities).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.decoded()
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        whole = (
            torch.cat([keys, key_states], dim=-2),
            torch.cat([values, value_states], dim=-2),
        )
        self._fold()
        return whole

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (batch, heads, tokens, dim), as the model sees them."""
        if not self._past:
            return self.keys, self.values
        rows = [self._decode(chunks) for chunks in self._history]
        keys, values = (
            torch.cat([torch.stack([pair[i] for pair in rows]).to(self.device), recent], dim=-2)
            for i, recent in enumerate((self.keys, self.values))
        )
        return keys, values

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for the history, and for the window's exact rows."""
        coded = sum(chunk.nbytes for chunks in self._history for chunk in chunks)
        if not self.is_initialized:
            return 0, 0
        return coded, self.keys.nbytes + self.values.nbytes

    @property
    def _past(self) -> int:
        return sum(chunk.kept for chunk in self._history[0]) if self._history else 0

    def _fold(self) -> None:
        """Encode whole chunks that have left the window."""
        while self.keys.shape[-2] >= self._window + self._chunk:
            start, size = self._past, self._chunk
            for row, chunks in enumerate(self._history):
                k, v = (tensor[row, :, :size] for tensor in (self.keys, self.values))
                chunks.append(self._encode(k, v, (start, start + size)))
            # A copy: a view would keep the rows that were just encoded.
            self.keys = self.keys[:, :, size:].clone()
            self.values = self.values[:, :, size:].clone()

    def _encode(self, keys: torch.Tensor, values: torch.Tensor, tokens: tuple[int, int]) -> Chunk:
        streams = {
            name: Stream(name, host_array(rows)[None].copy(), dtype_of(rows.dtype))
            for name, rows in (("k", keys), ("v", values))
        }
        layers = (self._layer, self._layer + 1)
        page = PageTensors(layers, (0, keys.shape[0]), tokens, streams)
        encoded = self._codec.encode(page)
        wanted = Wanted(
            layers=layers,
            heads=page.heads,
            tokens=tokens,
            shapes={name: _shape(stream) for name, stream in streams.items()},
            dtypes={name: stream.dtype for name, stream in streams.items()},
            cut=layers,
            params=self._codec.params,
            calibration_id=self._codec.calibration_id,
            rope_fingerprint=encoded.rope_fingerprint,
        )
        sections = {section.name: section for section in encoded.sections}
        return Chunk(CodedPage(wanted, sections), tokens[1] - tokens[0])

    def _decode(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """(heads, tokens, dim) of one sequence, on the host."""
        pages = [chunk.page for chunk in chunks]
        if isinstance(self._codec, RunCodec) and len(pages) > 1:
            found = self._codec.decode_run(pages, self._calibrations)
        else:
            found = [self._codec.decode(p.wanted, p.sections, self._calibrations) for p in pages]
        keys, values = (
            torch.cat(
                [
                    tensor_of(page.streams[name].data[0, :, : chunk.kept], page.streams[name].dtype)
                    for page, chunk in zip(found, chunks, strict=True)
                ],
                dim=-2,
            )
            for name in ("k", "v")
        )
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held, encoded ones included."""
        return self._past + int(self.keys.shape[-2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a query of so many tokens sees, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self._history, self.is_initialized = [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. Raises: ValueError for a number above 0."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or less: how many tokens to remove")
        if not tokens_to_remove or not self.is_initialized:
            return
        recent = self.keys.shape[-2]
        left = max(0, recent + tokens_to_remove)
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        excess = -tokens_to_remove - (recent - left)
        self._history = [_cropped(chunks, excess) for chunks in self._history]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences in another order, as beam search asks; encoded rows are shared."""
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
        self._history = [list(self._history[row]) for row in rows.tolist()]

    def offload(self) -> None:
        """Encoded rows are in the host's memory already."""

    def prefetch(self) -> None:
        """See `offload`."""


def _shape(stream: Stream) -> tuple[int, int, int, int]:
    a, b, c, d = stream.data.shape
    return a, b, c, d


def _cropped(chunks: Sequence[Chunk], excess: int) -> list[Chunk]:
    kept = list(chunks)
    while excess > 0 and kept:
        last = kept.pop()
        if last.kept > excess:
            kept.append(replace(last, kept=last.kept - excess))
        excess -= last.kept
    return kept
