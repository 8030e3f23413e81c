"""Where the entries of pages that lack tokens go in a live cache."""

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvferry.codec.base import PageTensors
from kvferry.codec.join import join_tokens
from kvferry.codec.kept import Kept
from kvferry.codec.mlx.gapped_cache import GappedKVCache
from kvferry.codec.mlx.leaves import leaves, state_adapter
from kvferry.codec.mlx.parts import CacheParts
from kvferry.codec.moving import side_by_side
from kvferry.codec.rope import RopeSpec
from kvferry.errors import ModelError

Ropes = Callable[[], Sequence[RopeSpec]]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """How pages are to be filled into a cache.

    Attributes:
        pages: as if all tokens were there.
        held: entries that they have.
        at: the position at which the cache goes on.
        kept: of all entries; None: nothing is missing.
        gapped: which entries of the cache become `GappedKVCache`; in layer order.
    """

    pages: Sequence[PageTensors]
    held: int
    at: int
    kept: Kept | None = None
    gapped: Sequence[int] = ()

    def leave_gaps(self, cache: Sequence[Any]) -> None:
        """Once the caches are filled: put those with gaps in their places."""
        if not self.gapped or self.kept is None:
            return
        assert isinstance(cache, MutableSequence)  # noqa: S101
        shared = self.kept.positions.ndim == 1
        for layer, place in enumerate(self.gapped):
            positions = self.kept.positions if shared else self.kept.positions[layer]
            weights = None if self.kept.weights is None else self.kept.weights[layer]
            cache[place] = GappedKVCache.of(cache[place], self.at, positions, weights)


def placement(
    cache: Sequence[Any],
    parts: CacheParts,
    pages: Sequence[PageTensors],
    total: int,
    ropes: Ropes | None,
) -> Placement:
    """Where ``pages``, which were checked, go; nothing is filled yet.

    Raises: ModelError: the cache has no room for gaps; UnsupportedTensorError.
    """
    if all(page.kept is None for page in pages):
        return Placement(pages, total, total)
    whole = join_tokens(pages)
    kept = whole.kept
    assert kept is not None  # noqa: S101
    held = kept.count
    if kept.weights is None and held == total and kept.positions.ndim == 1:
        return Placement([_plain(whole)], total, total)
    if not kept.contiguous:
        return Placement([_plain(whole)], held, total, kept, _places(cache, parts))
    if any(state_adapter(leaf).length(leaf) is not None for leaf in parts.states):
        raise ModelError("a cache with rings cannot go on at another position: keep the original")
    if ropes is None:
        raise ModelError("entries cannot be put side by side: it is not known how keys rotate")
    moved = side_by_side(whole, ropes())
    if kept.weights is None:
        return Placement([moved], held, held)
    kept = Kept(
        np.broadcast_to(np.arange(held, dtype=np.int64), kept.positions.shape), kept.weights
    )
    return Placement([moved], held, held, kept, _places(cache, parts))


def _plain(whole: PageTensors) -> PageTensors:
    return PageTensors(whole.layers, whole.heads, (0, whole.entries), whole.streams)


def _places(cache: Sequence[Any], parts: CacheParts) -> list[int]:
    """Which entries of the cache hold rows. Raises: ModelError: others than `KVCache`."""
    plain = [place for place, layer in enumerate(cache) if type(layer).__name__ == "KVCache"]
    if [[cache[place]] for place in plain] != [list(held) for held in parts.rows]:
        rows = {id(leaf) for held in parts.rows for leaf in held}
        holding = [layer for layer in cache if rows & {id(leaf) for leaf in leaves(layer)}]
        names = sorted({type(layer).__name__ for layer in holding} - {"KVCache"})
        raise ModelError(f"layers of {', '.join(names)} cannot hold gaps: only KVCache can")
    if not isinstance(cache, MutableSequence):
        raise ModelError(f"a {type(cache).__name__} of caches cannot hold gaps: give a list")
    return plain
