"""Which blobs to fetch for a prefix, and how their tensors become one run of tokens.

No mlx and no sockets: the hook fetches and decodes in between.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvferry.cluster.repository import BlobInfo, LookupResult
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.registry import restorable
from kvferry.codec.state_parts import parts_wanted
from kvferry.errors import IdentityMismatchError
from kvferry.proto.keys import Medium, media_within, state_key, tail_key

# Enough rows for a matrix product at full speed, few enough that decoding starts early
# and that a deadline costs little of the prefix.
RUN_PAGES = 4
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A blob, and the layers and heads to take from it (absolute, half-open)."""

    info: BlobInfo
    cut: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """The pieces that together hold the wanted layers of consecutive tokens."""

    tokens: tuple[int, int]
    pieces: tuple[Piece, ...]


Parts = tuple[tuple[Segment, Piece], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces of a few consecutive segments with the same layers and heads: decoded together."""

    cut: tuple[int, int]
    heads: tuple[int, int]
    parts: Parts


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

    def upto(self, tokens: int) -> "RestorePlan":
        """Without the segments that begin at ``tokens`` or later."""
        kept = tuple(s for s in self.segments if s.tokens[0] < tokens)
        return RestorePlan(kept, self.has_tail and len(kept) == len(self.segments))


@dataclass(frozen=True, slots=True)
class StatePlan:
    """The states after ``tokens`` tokens.

    Attributes:
        start: where their blobs say they begin.
        parts: ranks that divided each of them.
    """

    start: int
    tokens: int
    pieces: tuple[Piece, ...]
    parts: int = 1


def choose_pieces(
    blobs: Iterable[BlobInfo], layers: tuple[int, int], heads: tuple[int, int]
) -> tuple[Piece, ...] | None:
    """Few blobs that cover ``layers`` and ``heads``; of equals the smaller one. None: no cover.

    Blobs of all heads where there are such; else heads are put together from what
    tensor-parallel ranks stored, the widest part first.
    """
    blobs = list(blobs)
    ends = {b.heads[1] for b in blobs if b.heads[0] <= heads[0] < b.heads[1] < heads[1]}
    for end in [heads[1], *sorted(ends, reverse=True)]:
        first = _covering(blobs, layers, (heads[0], end))
        rest = choose_pieces(blobs, layers, (end, heads[1])) if end < heads[1] else ()
        if first is not None and rest is not None:
            return first + rest
    return None


def _covering(
    blobs: Sequence[BlobInfo], layers: tuple[int, int], heads: tuple[int, int]
) -> tuple[Piece, ...] | None:
    """Blobs that each hold all of ``heads``."""
    usable = [b for b in blobs if b.heads[0] <= heads[0] and b.heads[1] >= heads[1]]
    pieces: list[Piece] = []
    at = layers[0]
    while at < layers[1]:
        reach = [b for b in usable if b.layers[0] <= at < b.layers[1]]
        if not reach:
            return None
        best = max(reach, key=lambda b: (min(b.layers[1], layers[1]), -b.size, str(b.key)))
        end = min(best.layers[1], layers[1])
        pieces.append(Piece(best, (at, end), heads))
        at = end
    return tuple(pieces)


def without_droppers(found: LookupResult) -> LookupResult:
    """Only blobs that have all their tokens: no others are put back into a live cache."""

    def whole(blobs: Sequence[BlobInfo]) -> list[BlobInfo]:
        return [blob for blob in blobs if restorable(blob.key.codec_name)]

    return replace(
        found,
        pages=[whole(page) for page in found.pages],
        tails=[replace(tail, blobs=whole(tail.blobs)) for tail in found.tails],
        states=[replace(state, blobs=whole(state.blobs)) for state in found.states],
    )


def plan_restore(
    found: LookupResult,
    page_keys: Sequence[bytes],
    root: bytes,
    tokens: Sequence[int],
    page_tokens: int,
    layers: tuple[int, int],
    heads: tuple[int, int],
    media: Sequence[Medium] = (),
) -> RestorePlan:
    """Turn what a lookup found into segments to fetch.

    A tail counts only where it goes on beyond the run of pages and was keyed by exactly
    these tokens; the one that reaches farthest is taken, in place of pages within it.
    """
    segments: list[Segment] = []
    for index, blobs in enumerate(found.pages):
        pieces = choose_pieces(blobs, layers, heads)
        if pieces is None:
            return RestorePlan(tuple(segments))
        segments.append(Segment((index * page_tokens, (index + 1) * page_tokens), pieces))
    places = {key: at for at, key in enumerate([root, *page_keys[: len(segments)]])}
    anchored = [
        (places[tail.blobs[0].previous_key], tail)
        for tail in found.tails
        if tail.blobs and tail.blobs[0].previous_key in places
    ]
    for pages, tail in sorted(anchored, key=lambda t: t[0] * page_tokens + t[1].tokens)[::-1]:
        start = pages * page_tokens
        end, previous = start + tail.tokens, page_keys[pages - 1] if pages else root
        if not len(segments) * page_tokens < end <= len(tokens):
            continue
        seen = media_within(media, start, end)
        if tail_key(previous, tokens[start:end], seen) != tail.tail_key:
            continue
        pieces = choose_pieces(tail.blobs, layers, heads)
        if pieces is not None:
            return RestorePlan((*segments[:pages], Segment((start, end), pieces)), has_tail=True)
    return RestorePlan(tuple(segments))


def plan_states(
    found: LookupResult,
    page_keys: Sequence[bytes],
    root: bytes,
    tokens: Sequence[int],
    page_tokens: int,
    states: tuple[int, int],
    part: tuple[int, int] = (0, 1),
    any_parts: bool = True,
    media: Sequence[Medium] = (),
) -> list[StatePlan]:
    """States keyed by exactly these tokens, the longest first.

    Args:
        states: state layers wanted; (a, a): none, only where they stand.
        part: which part of each, of how many.
        any_parts: whether those of another number of ranks are of use. Of one position
            those of as many are taken.
    """
    plans: dict[int, StatePlan] = {}
    for state in found.states:
        start = state.pages * page_tokens
        end = start + state.tokens
        previous = page_keys[state.pages - 1] if state.pages else root
        parts = state.blobs[0].model_heads if state.blobs else part[1]
        if end > len(tokens) or not (any_parts or parts == part[1]):
            continue
        tail = tail_key(previous, tokens[start:end], media_within(media, start, end))
        if state_key(tail, parts) != state.key:
            continue
        pieces = choose_pieces(state.blobs, states, parts_wanted(part, parts))
        if pieces is not None and (end not in plans or parts == part[1]):
            plans[end] = StatePlan(start, end, pieces, parts)
    return sorted(plans.values(), key=lambda plan: plan.tokens, reverse=True)


def runs_of(plan: RestorePlan) -> list[Run]:
    """The plan's pieces as runs, in the order to be fetched: early tokens first."""
    runs: list[Run] = []
    for start in range(0, len(plan.segments), RUN_PAGES):
        parts: dict[tuple[Range, Range], list[tuple[Segment, Piece]]] = {}
        for segment in plan.segments[start : start + RUN_PAGES]:
            for piece in segment.pieces:
                parts.setdefault((piece.cut, piece.heads), []).append((segment, piece))
        runs += [Run(cut, heads, tuple(pieces)) for (cut, heads), pieces in parts.items()]
    return runs


class Assembly:
    """One run of tokens from decoded pieces, each copied once, in any order and thread.

    Args:
        tokens: how many there may be, from token 0 on.
        layers, heads: absolute, half-open; of the whole.
    """

    def __init__(self, tokens: int, layers: tuple[int, int], heads: tuple[int, int]) -> None:
        self._tokens, self._layers, self._heads = tokens, layers, heads
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}

    def add(self, part: PageTensors) -> None:
        """Copy a piece to its place, by its layers, heads and tokens.

        Raises: IdentityMismatchError: it does not fit what is there (streams, dtypes), or
            lacks tokens.
        """
        if part.kept is not None:
            raise IdentityMismatchError("tokens", f"{part.entries} of {part.tokens}", "all")
        with self._lock:
            if not self._streams:
                self._streams = {n: self._empty(s, part) for n, s in part.streams.items()}
        mine, theirs = _kinds(self._streams, self._heads), _kinds(part.streams, part.heads)
        if mine != theirs:
            raise IdentityMismatchError("streams", str(theirs), str(mine))
        rows, heads = (
            slice(a - start, b - start)
            for (a, b), start in ((part.layers, self._layers[0]), (part.heads, self._heads[0]))
        )
        for name, stream in part.streams.items():
            whole = self._streams[name].data
            into = heads if whole.shape[1] > 1 else slice(None)
            whole[rows, into, slice(*part.tokens)] = stream.data

    def _empty(self, like: Stream, part: PageTensors) -> Stream:
        _, heads, _, dim = like.data.shape
        if heads == part.heads[1] - part.heads[0]:  # divided, not one for all heads
            heads = self._heads[1] - self._heads[0]
        shape = (self._layers[1] - self._layers[0], heads, self._tokens, dim)
        return Stream(like.name, np.empty(shape, dtype=like.data.dtype), like.dtype)

    def upto(self, tokens: int) -> PageTensors:
        """Streams (layers, heads, tokens, dim) of the first ``tokens``, all of them added."""
        whole = PageTensors(self._layers, self._heads, (0, self._tokens), self._streams)
        return whole.cut_tokens((0, tokens))


def _kinds(streams: Mapping[str, Stream], heads: Range) -> dict[str, tuple[DType, bool, int]]:
    count = heads[1] - heads[0]
    return {n: (s.dtype, s.data.shape[1] == count, s.data.shape[3]) for n, s in streams.items()}
