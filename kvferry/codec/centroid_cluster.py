"""`kvferry.codec.centroid_plain` for all heads of all layers at once.

A row is a head of a layer. No Python loop runs over tokens or heads: within a batch the
tokens that open entries are found in a few rounds, each of which settles all tokens whose
like are settled.
"""

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.centroid_plain import GRID, Labels, Merging

_Wide = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]
_NEVER = -4.0 / GRID  # below every cosine, also if one is added
_ROUNDS = 7  # halvings of a right angle: to 0.7 degrees


def merge(
    keys: FloatArray, how: Merging, similarity: npt.NDArray[np.floating] | None = None
) -> Labels:
    """Which entry each token goes into, named by the token that opened it.

    Args:
        keys: (rows, tokens, dim), un-rotated, finite.
        similarity: (rows,) in place of ``how.similarity``.
    Returns: (rows, tokens); see `centroid_plain.merge_head`.
    """
    rows, tokens, _ = keys.shape
    limit = np.full(rows, how.similarity) if similarity is None else similarity
    labels = np.broadcast_to(np.arange(tokens, dtype=np.int64), (rows, tokens)).copy()
    sums = keys.astype(np.float64)
    units = _unit(sums)
    joined_in = np.full((rows, tokens), -1, dtype=np.int64)  # -1: no entry
    for number, (start, end) in enumerate(how.batches(tokens)):
        open_ = joined_in[:, :start] >= 0
        if how.persistence:
            open_ &= number - joined_in[:, :start] <= how.persistence
        found = _assign(units[:, start:end], sums, open_, limit, start)
        found = _dissolved(found, start, how.min_merge)
        labels[:, start:end] = found
        _add(sums, found, keys[:, start:end], start)
        np.put_along_axis(joined_in, found, number, axis=1)
    return labels


def similarity_for(keys: FloatArray, how: Merging, entries: int) -> npt.NDArray[np.float64]:
    """The similarity at which each row comes to at most ``entries`` entries.

    The largest one that was found, or -1 where none is small enough.

    Args:
        keys: (rows, tokens, dim), un-rotated, finite.
    """
    low, high = np.zeros(len(keys)), np.full(len(keys), np.pi / 2)  # more, fewer entries
    few = entries_of(merge(keys, how, np.cos(high))) <= entries
    high[~few] = np.pi
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        labels = merge(keys, how, np.cos(middle))
        fits = entries_of(labels) <= entries
        high, low = np.where(fits, middle, high), np.where(fits, low, middle)
    found: _Wide = np.cos(high)
    return found


def entries_of(labels: Labels) -> npt.NDArray[np.int64]:
    """How many entries each row has, (rows,)."""
    found: Labels = (labels == np.arange(labels.shape[1])).sum(axis=1)
    return found


def _add(sums: _Wide, found: Labels, batch: FloatArray, start: int) -> None:
    """Add the keys of tokens that joined others to those entries' sums."""
    row, column = np.nonzero(found != np.arange(start, start + found.shape[1]))
    if not len(row):
        return
    flat = sums.reshape(-1, sums.shape[2])
    entry = row * sums.shape[1] + found[row, column]
    order = np.argsort(entry, kind="stable")
    starts = np.flatnonzero(np.diff(entry[order], prepend=-1))
    keys = batch[row[order], column[order]].astype(np.float64)
    flat[entry[order][starts]] += np.add.reduceat(keys, starts, axis=0)


def _assign(
    batch: _Wide, sums: _Wide, open_: _Mask, limit: npt.NDArray[np.floating], start: int
) -> Labels:
    """Labels of a batch's tokens, before small groups are dissolved: (rows, batch)."""
    rows, count, dim = batch.shape
    most = int(open_.sum(axis=1).max(initial=0))
    # Open entries of each row side by side; rows that have fewer end in others, masked.
    entries = np.argsort(~open_, axis=1, kind="stable")[:, :most]
    flat = entries + np.arange(rows)[:, None] * sums.shape[1]
    old = _cosines(batch, _unit(np.take(sums.reshape(-1, dim), flat, axis=0)))
    old += np.where(np.take_along_axis(open_, entries, axis=1), 0.0, _NEVER)[:, None]
    older, top = _nearest(old)
    limit = (limit / GRID)[:, None]
    among = _cosines(batch, batch)
    earlier = np.tri(count, k=-1, dtype=np.bool_)
    leads = _leaders((among >= limit[:, None]) & earlier, top < limit)
    among += np.where(leads[:, None] & earlier, 0.0, _NEVER)
    newer, newest = _nearest(among)
    named = np.take_along_axis(entries, older, axis=1) if most else older
    best = np.where(newest > top, newer + start, named)
    own = np.arange(start, start + count, dtype=np.int64)
    return np.where(np.maximum(top, newest) >= limit, best, own)


def _nearest(cosines: _Wide) -> tuple[Labels, _Wide]:
    """Of each token the first of those most like it, and how like: (rows, batch) each."""
    if not cosines.shape[2]:
        none = np.zeros(cosines.shape[:2], dtype=np.int64)
        return none, np.full(cosines.shape[:2], _NEVER)
    place = cosines.argmax(axis=2)
    return place, np.take_along_axis(cosines, place[:, :, None], axis=2)[:, :, 0]


def _leaders(like: _Mask, unsettled: _Mask) -> _Mask:
    """Tokens that open an entry: none of those before them that do is like them.

    Args:
        like: (rows, batch, batch), [r, i, j] only for j < i.
        unsettled: (rows, batch) tokens that join nothing older.
    """
    leads = np.zeros_like(unsettled)
    unsettled = unsettled.copy()
    while unsettled.any():
        # A token is settled once it is like one that leads, or like none that still might.
        free = unsettled & ~(like & unsettled[:, None]).any(axis=2)
        leads |= free
        unsettled &= ~(free | (like & leads[:, None]).any(axis=2))
    return leads


def _dissolved(labels: Labels, start: int, least: int) -> Labels:
    """With groups that were opened in this batch and stayed smaller than ``least`` undone."""
    if least < 3:  # one that stays alone is a group of one anyway
        return labels
    rows, count = labels.shape
    new = labels >= start
    group = np.where(new, labels - start, 0) + np.arange(rows)[:, None] * count
    sizes = np.bincount(group[new], minlength=rows * count)
    own = np.arange(start, start + count, dtype=np.int64)
    return np.where(new & (sizes[group] < least), own, labels)


def _cosines(a: _Wide, b: _Wide) -> _Wide:
    """In units of `GRID`, whole."""
    found: _Wide = a @ b.transpose(0, 2, 1)
    found *= 1 / GRID
    np.rint(found, out=found)
    return found


def _unit(vectors: _Wide) -> _Wide:
    norm = np.sqrt(np.einsum("rtd,rtd->rt", vectors, vectors))[:, :, None]
    found: _Wide = np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)
    return found
