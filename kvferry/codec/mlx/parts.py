"""A cache sorted into what holds rows of tokens and what holds states.

Layers are counted twice over: *page layers* are those that hold rows of tokens, *state
layers* are the caches (several may lie in one layer) that can only be restored at the
position where they were read. A model of plain attention has no state layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx.leaves import RowsAdapter, leaves, rows_adapter, state_adapter
from kvferry.errors import ModelError

_PLAIN = (("k", "v"),)
_LATENT = (("latent", "rope_key"),)
_SECOND = (("index_key", "index_value"),)


@dataclass(frozen=True, slots=True)
class CacheParts:
    """The leaves of a cache, sorted.

    Attributes:
        rows: for each page layer, its leaves that hold rows.
        states: for each state layer, its leaf.
    """

    rows: Sequence[Sequence[Any]]
    states: Sequence[Any]


def parts_of(cache: Sequence[Any]) -> CacheParts:
    """Raises: ModelError: a cache class that is not known."""
    rows: list[list[Any]] = []
    states: list[Any] = []
    for layer in cache:
        held: list[Any] = []
        for leaf in leaves(layer):
            (states if rows_adapter(leaf) is None else held).append(leaf)
        if held:
            rows.append(held)
    return CacheParts(rows, states)


def rows_of(leaf: Any) -> RowsAdapter:
    """Of a leaf that `parts_of` found to hold rows. Raises: ModelError."""
    found = rows_adapter(leaf)
    if found is None:
        raise ModelError(f"{type(leaf).__name__} holds no rows")
    return found


def length(cache: Sequence[Any]) -> int | None:
    """Tokens that all layers hold; None where no layer says (recurrent state only).

    Raises: ModelError: layers differ, or an unknown cache class.
    """
    parts = parts_of(cache)
    lengths = {int(leaf.offset) for held in parts.rows for leaf in held}
    counted = (state_adapter(leaf).length(leaf) for leaf in parts.states)
    lengths |= {count for count in counted if count is not None}
    if len(lengths) > 1:
        raise ModelError(f"layers of one cache hold different numbers of tokens: {lengths}")
    return lengths.pop() if lengths else None


def row_arrays(held: Sequence[Any], tokens: int, latent: bool) -> dict[str, mx.array]:
    """Stream -> (batch, heads, tokens, dim) of one page layer; see `CacheParts`."""
    found = {}
    for leaf, names in zip(held, row_names(len(held), latent), strict=True):
        for name, buffer in zip(names, rows_of(leaf).read(leaf), strict=True):
            if buffer.shape[3]:  # an indexer has no values
                found[name] = buffer[:, :, :tokens]
    return found


def row_names(count: int, latent: bool) -> Sequence[tuple[str, str]]:
    """Streams of each of ``count`` leaves of a page layer. Raises: ModelError."""
    names = ((_LATENT if latent else _PLAIN) + _SECOND)[:count]
    if len(names) < count:
        raise ModelError(f"a layer with {count} caches of rows is not supported")
    return names
