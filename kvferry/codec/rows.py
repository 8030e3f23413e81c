"""Between pages and rows: RoPE undone or redone, layers and heads side by side."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, FloatArray, PageTensors, clip_to, store_float32
from kvferry.codec.rope import RopeSpec, positions_of, rotate_into
from kvferry.codec.transform import from_rows


def page_rows(
    page: PageTensors, names: Sequence[str], ropes: Mapping[str, Sequence[RopeSpec]], first: int
) -> FloatArray:
    """Streams as rows, side by side, RoPE undone.

    Args:
        names: which streams, in the order of their columns.
        ropes: rotated stream -> one spec per layer of the page.
        first: absolute token to begin with.
    Returns: (tokens, sum of layers x heads x dim) float32, contiguous.
    """
    widths = [page.streams[n].data[:, :, 0].size for n in names]
    rows = np.empty((page.tokens[1] - first, sum(widths)), dtype=np.float32)
    at = 0
    for name, width in zip(names, widths, strict=True):
        _fill_rows(rows[:, at : at + width], page, name, ropes.get(name), first)
        at += width
    return rows


def page_values(
    page: PageTensors, name: str, ropes: Sequence[RopeSpec] | None, first: int
) -> FloatArray:
    """One stream with RoPE undone, from absolute token ``first`` on.

    Returns: (layers, heads, tokens, dim) float32, contiguous.
    """
    layers, heads, _, dim = page.streams[name].data.shape
    values = np.empty((layers, heads, page.tokens[1] - first, dim), dtype=np.float32)
    _fill(values, page, name, ropes, first)
    return values


def _fill_rows(
    rows: FloatArray,
    page: PageTensors,
    name: str,
    ropes: Sequence[RopeSpec] | None,
    first: int,
) -> None:
    layers, heads, _, dim = page.streams[name].data.shape
    _fill(from_rows(rows, layers, heads, dim), page, name, ropes, first)


def _fill(
    view: FloatArray,
    page: PageTensors,
    name: str,
    ropes: Sequence[RopeSpec] | None,
    first: int,
) -> None:
    stream = page.streams[name]
    skipped = first - page.tokens[0]
    part = stream.data[:, :, skipped:]
    if stream.dtype is DType.BFLOAT16:
        values = stream.float32()[:, :, skipped:]
    elif ropes is None:
        np.copyto(view, part, casting="same_kind")
        return
    else:
        values = part.astype(np.float32, copy=False)
    if ropes is None:
        view[...] = values
        return
    positions = positions_of((first, page.tokens[1]))
    for spec, span in _runs(ropes):
        rotate_into(view[span], values[span], spec, positions, inverse=True)


def store_rows(
    out: npt.NDArray[np.generic],
    dtype: DType,
    rows: FloatArray,
    ropes: Sequence[RopeSpec] | None,
    tokens: tuple[int, int],
) -> None:
    """Inverse of `page_rows`: redo RoPE, round, and write.

    A value near the end of float16 that quantization moved beyond it stays finite.

    Args:
        out: (layers, heads, tokens, dim) in ``dtype.storage``; any view.
        rows: (tokens, layers x heads x dim) float32; may be changed.
        tokens: absolute range of the rows.
    """
    layers, heads, _, dim = out.shape
    store_values(out, dtype, from_rows(rows, layers, heads, dim), ropes, tokens)


def store_values(
    out: npt.NDArray[np.generic],
    dtype: DType,
    values: FloatArray,
    ropes: Sequence[RopeSpec] | None,
    tokens: tuple[int, int],
) -> None:
    """Inverse of `page_values`. As `store_rows`, of ``values`` in ``out``'s shape."""
    if ropes is None:
        _store(out, values, dtype)
        return
    positions = positions_of(tokens)
    if dtype is DType.FLOAT32:
        rotated = out.view(np.float32)
    else:
        rotated = np.empty(out.shape, dtype=np.float32)
    for spec, span in _runs(ropes):
        rotate_into(rotated[span], values[span], spec, positions, inverse=False)
    if dtype is not DType.FLOAT32:
        _store(out, rotated, dtype)


def _store(out: npt.NDArray[np.generic], values: FloatArray, dtype: DType) -> None:
    store_float32(out, clip_to(values, dtype, out=values), dtype)


def _runs(ropes: Sequence[RopeSpec]) -> Iterator[tuple[RopeSpec, slice]]:
    """Consecutive layers with the same rope, as (spec, layers)."""
    start = 0
    for spec, run in itertools.groupby(ropes):
        end = start + len(list(run))
        yield spec, slice(start, end)
        start = end
