"""Which blobs to fetch for a prefix, and how their tensors become one run of tokens.

Pure functions; no mlx and no sockets. The hook fetches and decodes in between.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.cluster.repository import BlobInfo, LookupResult
from kvferry.codec.base import PageTensors, Stream
from kvferry.errors import IdentityMismatchError
from kvferry.proto.keys import tail_key


@dataclass(frozen=True, slots=True)
class Piece:
    """A blob, and the layers to take from it (absolute, half-open)."""

    info: BlobInfo
    cut: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """The pieces that together hold the wanted layers of consecutive tokens."""

    tokens: tuple[int, int]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Segments in token order, from 0 without a gap; ``has_tail``: the last is a tail."""

    segments: tuple[Segment, ...] = ()
    has_tail: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that the plan restores if all goes well."""
        return self.segments[-1].tokens[1] if self.segments else 0

    def pieces(self) -> list[Piece]:
        """All pieces, in token order."""
        return [piece for segment in self.segments for piece in segment.pieces]


def choose_pieces(
    blobs: Iterable[BlobInfo], layers: tuple[int, int], heads: tuple[int, int]
) -> tuple[Piece, ...] | None:
    """Fewest blobs that cover ``layers``; of equals the smaller one. None: no cover."""
    usable = [b for b in blobs if b.heads[0] <= heads[0] and b.heads[1] >= heads[1]]
    pieces: list[Piece] = []
    at = layers[0]
    while at < layers[1]:
        reach = [b for b in usable if b.layers[0] <= at < b.layers[1]]
        if not reach:
            return None
        best = max(reach, key=lambda b: (min(b.layers[1], layers[1]), -b.size, str(b.key)))
        end = min(best.layers[1], layers[1])
        pieces.append(Piece(best, (at, end)))
        at = end
    return tuple(pieces)


def plan_restore(
    found: LookupResult,
    page_keys: Sequence[bytes],
    root: bytes,
    tokens: Sequence[int],
    page_tokens: int,
    layers: tuple[int, int],
    heads: tuple[int, int],
) -> RestorePlan:
    """Turn what a lookup found into segments to fetch.

    A tail counts only where it stands right behind the run of pages and was keyed by
    exactly these tokens; the longest such tail is taken.
    """
    segments: list[Segment] = []
    for index, blobs in enumerate(found.pages):
        pieces = choose_pieces(blobs, layers, heads)
        if pieces is None:
            return RestorePlan(tuple(segments))
        segments.append(Segment((index * page_tokens, (index + 1) * page_tokens), pieces))
    start = len(segments) * page_tokens
    previous = page_keys[len(segments) - 1] if segments else root
    for tail in sorted(found.tails, key=lambda t: t.tokens, reverse=True):
        end = start + tail.tokens
        if end > len(tokens) or tail_key(previous, tokens[start:end]) != tail.tail_key:
            continue
        pieces = choose_pieces(tail.blobs, layers, heads)
        if pieces is not None:
            segments.append(Segment((start, end), pieces))
            return RestorePlan(tuple(segments), has_tail=True)
    return RestorePlan(tuple(segments))


def assemble(
    segments: Sequence[Segment],
    decoded: Mapping[tuple[bytes, tuple[int, int]], PageTensors],
    layers: tuple[int, int],
    heads: tuple[int, int],
) -> PageTensors:
    """One run of tokens from decoded pieces, each copied once.

    Args:
        segments: consecutive, from token 0; all their pieces are in ``decoded``.
        decoded: (page key, cut) -> tensors of that piece.
    Returns:
        Streams of shape (layers, heads, tokens, dim).
    Raises:
        IdentityMismatchError: pieces that do not fit together (streams or dtypes).
    """
    end = segments[-1].tokens[1]
    first = decoded[_at(segments[0].pieces[0])]
    whole: dict[str, Stream] = {}
    for name, stream in first.streams.items():
        _, stream_heads, _, dim = stream.data.shape
        shape = (layers[1] - layers[0], stream_heads, end, dim)
        whole[name] = Stream(name, np.empty(shape, dtype=stream.data.dtype), stream.dtype)
    for segment in segments:
        for piece in segment.pieces:
            part = decoded[_at(piece)]
            _check_same(first, part)
            rows = slice(piece.cut[0] - layers[0], piece.cut[1] - layers[0])
            for name, stream in part.streams.items():
                whole[name].data[rows, :, slice(*segment.tokens)] = stream.data
    return PageTensors(layers, heads, (0, end), whole)


def _at(piece: Piece) -> tuple[bytes, tuple[int, int]]:
    return piece.info.key.page_key, piece.cut


def _check_same(first: PageTensors, other: PageTensors) -> None:
    mine = {n: (s.dtype, s.data.shape[1], s.data.shape[3]) for n, s in first.streams.items()}
    theirs = {n: (s.dtype, s.data.shape[1], s.data.shape[3]) for n, s in other.streams.items()}
    if mine != theirs:
        raise IdentityMismatchError("streams", str(theirs), str(mine))
