"""Whether rectangles of layers x heads cover a whole model."""

from collections.abc import Iterable
from itertools import pairwise

Range = tuple[int, int]


def _union_covers(ranges: Iterable[Range], end: int) -> bool:
    """Whether half-open ranges cover 0..end."""
    reached = 0
    for start, stop in sorted(ranges):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= end


def covers(parts: Iterable[tuple[Range, Range]], layers: int, heads: int) -> bool:
    """Whether (layers, heads) ranges, half-open, cover all of ``layers`` x ``heads``.

    Overlaps are allowed. The work depends on the number of parts, not on their size.
    """
    distinct = set(parts)
    if not distinct:
        return False
    if all(h[0] <= 0 and h[1] >= heads for _, h in distinct):
        return _union_covers((p[0] for p in distinct), layers)
    edges = sorted({0, layers} | {edge for p in distinct for edge in p[0] if 0 < edge < layers})
    return all(
        _union_covers([h for (a, b), h in distinct if a <= start and b >= stop], heads)
        for start, stop in pairwise(edges)
    )
