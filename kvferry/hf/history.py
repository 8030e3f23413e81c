"""What a compressed layer holds of tokens behind its window, encoded by any codec."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

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

Pair = tuple[torch.Tensor, torch.Tensor]


class History(Protocol):
    """Keys and values of one layer, in chunks; nothing is encoded twice."""

    @property
    def tokens(self) -> int:
        """How many are held."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next chunk, (batch, heads, tokens, dim).

        Raises: UnsupportedTensorError: numbers that the codec refuses (NaN, infinities).
        """

    def decoded(self) -> Pair:
        """Keys and values, (batch, heads, tokens, dim), where the model has them.

        Called only where ``tokens`` is above 0.
        """

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens, at most all."""

    def select(self, rows: torch.Tensor) -> None:
        """Only these sequences, in this order; ``rows`` on the CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Encoded rows of one sequence. ``kept``: how many of its tokens are still wanted."""

    page: CodedPage
    kept: int

    @property
    def nbytes(self) -> int:
        return sum(len(section.data) for section in self.page.sections.values())


class EncodedHistory:
    """Chunks as a codec's sections, in the host's memory.

    Args:
        layer: absolute index, which codecs with a calibration look at.
        codec: of that single layer.
    """

    def __init__(self, layer: int, codec: Codec, calibrations: CalibrationSource) -> None:
        self._layer, self._codec, self._calibrations = layer, codec, calibrations
        # One list for each sequence of the batch, all of the same tokens.
        self._rows: list[list[_Chunk]] = []
        self._device = torch.device("cpu")

    @property
    def tokens(self) -> int:
        """How many are held."""
        return sum(chunk.kept for chunk in self._rows[0]) if self._rows else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all sections."""
        return sum(chunk.nbytes for chunks in self._rows for chunk in chunks)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `History`."""
        self._device = keys.device
        start, size = self.tokens, keys.shape[2]
        if not self._rows:
            self._rows = [[] for _ in range(keys.shape[0])]
        made = [
            self._encode(k, v, (start, start + size)) for k, v in zip(keys, values, strict=True)
        ]
        for chunks, chunk in zip(self._rows, made, strict=True):
            chunks.append(chunk)

    def decoded(self) -> Pair:
        """See `History`."""
        rows = [self._decode(chunks) for chunks in self._rows]
        keys, values = (torch.stack([pair[i] for pair in rows]).to(self._device) for i in (0, 1))
        return keys, values

    def crop(self, tokens: int) -> None:
        """See `History`: a chunk that is cut through stays as it is, and is cut when decoded."""
        self._rows = [_cropped(chunks, tokens) for chunks in self._rows]

    def select(self, rows: torch.Tensor) -> None:
        """See `History`: encoded rows are shared."""
        if self._rows:
            self._rows = [list(self._rows[row]) for row in rows.tolist()]

    def _encode(self, keys: torch.Tensor, values: torch.Tensor, tokens: tuple[int, int]) -> _Chunk:
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
        return _Chunk(CodedPage(wanted, sections), tokens[1] - tokens[0])

    def _decode(self, chunks: Sequence[_Chunk]) -> Pair:
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


def _shape(stream: Stream) -> tuple[int, int, int, int]:
    a, b, c, d = stream.data.shape
    return a, b, c, d


def _cropped(chunks: Sequence[_Chunk], excess: int) -> list[_Chunk]:
    kept = list(chunks)
    while excess > 0 and kept:
        last = kept.pop()
        if last.kept > excess:
            kept.append(replace(last, kept=last.kept - excess))
        excess -= last.kept
    return kept
