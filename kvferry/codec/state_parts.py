"""States that tensor-parallel ranks divide: which part a rank has, and parts put together.

A ring is divided by its KV heads, in order. An array of recurrent state is divided along
one axis, not always in order: a convolution over queries, keys and values has a piece of
each. Its pieces are stored as streams of their own that say where they belong, ``NAME.A-S``
for a piece that begins at place ``S`` of axis ``A`` (the batch is not counted).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import RING_KEYS, RING_VALUES, DType, PageTensors, Stream

Array = npt.NDArray[np.generic]
Run = tuple[int, int]
RINGS = (RING_KEYS, RING_VALUES)
_PIECE = re.compile(r"(state\.[0-9]{1,6}\.[1-4]d)\.([0-9])-([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class ArrayPart:
    """What a rank has of one array of a state.

    Attributes:
        whole: shape on one rank alone, without the batch; a ring's rows vary.
        axis: along which it is divided; 0 where it is not.
        runs: places along that axis, (start, length), in the order that the rank has them.
    """

    whole: tuple[int, ...]
    axis: int
    runs: tuple[Run, ...]

    @property
    def divided(self) -> bool:
        """Whether there is more than this rank has."""
        return bool(self.whole) and self.runs != ((0, self.whole[self.axis]),)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """How the states of one rank lie in those of the whole model.

    Attributes:
        start: absolute state layer of the first.
        part: rank, and how many divide the states.
        layers: for each state layer, stream name -> part; None where it cannot be told.
    """

    start: int
    part: tuple[int, int]
    layers: Sequence[Mapping[str, ArrayPart | None]]

    @property
    def told(self) -> bool:
        """Whether states of other numbers of ranks can be put together for this one."""
        return all(part is not None for layer in self.layers for part in layer.values())

    def of(self, layer: int) -> Mapping[str, ArrayPart | None]:
        """Of one state layer, absolute."""
        return self.layers[layer - self.start]

    def split(self, page: PageTensors) -> PageTensors:
        """A page of this rank's states, of layers divided alike, as it is stored."""
        layer = self.of(page.layers[0])
        streams: dict[str, Stream] = {}
        for name, stream in page.streams.items():
            part = layer.get(name)
            if part is None or name in RINGS or not part.divided:
                streams[name] = stream
                continue
            at = 0
            for start, length in part.runs:
                index = _along(part.axis + 4 - len(part.whole), at, length)
                piece = f"{name}.{part.axis}-{start}"
                streams[piece] = Stream(piece, stream.data[index], stream.dtype)
                at += length
        return PageTensors(page.layers, page.heads, page.tokens, streams)

    def join(self, pages: Sequence[PageTensors], parts: int) -> list[PageTensors] | None:
        """What this rank needs, out of what ``parts`` ranks stored of each state.

        Returns: None where what is there is not all of it, or cannot be told.
        """
        if parts == self.part[1] == 1:
            return list(pages)
        found: dict[int, dict[str, list[_Piece]]] = defaultdict(lambda: defaultdict(list))
        for page in pages:
            for piece in _pieces(page, parts):
                found[piece.layer][piece.name].append(piece)
        joined = []
        for layer, arrays in sorted(found.items()):
            streams = {}
            for name, pieces in arrays.items():
                part = self.of(layer).get(name)
                made = self._alike(pieces, parts) if part is None else _filled(part, pieces)
                if made is None:
                    return None
                streams[name] = Stream(name, made[None], pieces[0].dtype)
            heads = (self.part[0], self.part[0] + 1)
            joined.append(PageTensors((layer, layer + 1), heads, pages[0].tokens, streams))
        return joined

    def _alike(self, pieces: Sequence["_Piece"], parts: int) -> Array | None:
        """What just this rank's like has stored, whatever it is a part of."""
        own = [p for p in pieces if p.part == self.part[0] and p.axis is None]
        return own[0].data if parts == self.part[1] and len(own) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Of one array of one layer, padded to three dims; ``axis`` None: not said."""

    layer: int
    name: str
    part: int
    parts: int
    axis: int | None
    start: int
    data: Array
    dtype: DType


def _pieces(page: PageTensors, parts: int) -> Iterable[_Piece]:
    for stored, stream in page.streams.items():
        named = _PIECE.fullmatch(stored)
        name, axis, start = (named[1], int(named[2]), int(named[3])) if named else (stored, None, 0)
        for index, layer in enumerate(range(*page.layers)):
            data = stream.data[index]
            yield _Piece(layer, name, page.heads[0], parts, axis, start, data, stream.dtype)


def _filled(part: ArrayPart, pieces: Sequence[_Piece]) -> Array | None:
    """The array of one rank from pieces of any ranks; None where some of it is not there."""
    if not part.whole:
        return pieces[0].data
    placed = [_placed(part, piece) for piece in pieces]
    axes = {axis for axis, _ in placed if axis >= 0} | ({part.axis} if part.divided else set())
    if len(axes) > 1 or any(axis < -1 for axis, _ in placed):
        return None
    axis = axes.pop() if axes else 0
    at = axis + 3 - len(part.whole)
    runs = part.runs if part.divided else ((0, part.whole[axis]),)
    like = pieces[0]
    shape = list(like.data.shape)
    shape[at] = sum(length for _, length in runs)
    made = np.empty(shape, like.data.dtype)
    there = np.zeros(shape[at], bool)
    for piece, (_, start) in zip(pieces, placed, strict=True):
        others = [n for i, n in enumerate(piece.data.shape) if i != at]
        if piece.dtype is not like.dtype or others != [n for i, n in enumerate(shape) if i != at]:
            return None
        end, local = start + piece.data.shape[at], 0
        for begin, length in runs:
            low, high = max(start, begin), min(end, begin + length)
            if low < high:
                into = _along(at, local + low - begin, high - low)
                made[into] = piece.data[_along(at, low - start, high - low)]
                there[into[at]] = True
            local += length
    return made if there.all() else None


def _placed(part: ArrayPart, piece: _Piece) -> tuple[int, int]:
    """Axis and start of a piece; axis -1: it is the whole array, -2: it cannot be told."""
    if piece.axis is not None:
        inside = piece.axis < len(part.whole)
        return (piece.axis, piece.start) if inside else (-2, 0)
    if piece.name in RINGS:
        heads, whole = piece.data.shape[0], part.whole[0]
        if heads == whole:
            return -1, 0
        return (0, piece.part * heads) if heads * piece.parts == whole else (-2, 0)
    shape = piece.data.shape[3 - len(part.whole) :]
    return (-1, 0) if tuple(shape) == part.whole else (-2, 0)


def _along(axis: int, start: int, length: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, start + length))


def parts_wanted(part: tuple[int, int], parts: int) -> Run:
    """Which of ``parts`` parts hold what rank ``part[0]`` of ``part[1]`` needs, half-open."""
    rank, size = part
    return rank * parts // size, -(-(rank + 1) * parts // size)
