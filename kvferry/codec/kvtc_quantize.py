"""Coefficients of grouped components to levels and back, and what that costs in error.

Every token has a shift and a scale of its own for each group, float16, from the least and
the greatest coefficient of the group, as microscaling formats have them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.kvtc_plan import BITS, SIZES, BitPlan, Errors, Group, GroupErrors
from kvferry.codec.packing import Levels
from kvferry.errors import UnsupportedTensorError

HalfArray = npt.NDArray[np.float16]
WIDTHS = tuple(sorted((bits for bits in BITS if bits), reverse=True))
# Groups of more than one component start at every sixteenth: the smallest of them is so
# long, and measuring each start would take sixteen times as long for nothing.
ALIGNMENT = 16
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """The stored groups of one stream of a page.

    Attributes:
        shift, scale: (groups, tokens) float16.
        levels: bits -> (components, tokens) uint8, of all groups with so many bits.
    """

    shift: HalfArray
    scale: HalfArray
    levels: dict[int, Levels]


def quantize(z: FloatArray, plan: BitPlan, stream: str) -> Quantized:
    """Args: z: (tokens, at least ``plan.rank``) float32.

    Raises: UnsupportedTensorError: NaN, infinities, or values beyond float16.
    """
    tokens = len(z)
    shifts, scales = [], []
    levels: dict[int, list[Levels]] = {bits: [] for bits in WIDTHS}
    for group, count, start in _runs(plan):
        if not group.bits:
            continue
        part = z[:, start : start + count * group.size].reshape(tokens, count, group.size)
        shift, scale, found = _quantize(part, group.bits, stream)
        shifts.append(shift.T)
        scales.append(scale.T)
        levels[group.bits].append(found.reshape(tokens, -1).T)
    nothing: HalfArray = np.zeros((0, tokens), dtype=np.float16)
    return Quantized(
        np.concatenate([nothing, *shifts]),
        np.concatenate([nothing, *scales]),
        {bits: np.concatenate(parts) for bits, parts in levels.items() if parts},
    )


def dequantize(q: Quantized, plan: BitPlan, out: FloatArray) -> None:
    """Into ``out`` (tokens, ``plan.rank``) float32; groups without bits become zero."""
    tokens = len(out)
    used = dict.fromkeys(WIDTHS, 0)
    row = 0
    for group, count, start in _runs(plan):
        wide = count * group.size
        part = out[:, start : start + wide]
        if not group.bits:
            part[...] = 0.0
            continue
        at = used[group.bits]
        used[group.bits] += wide
        found = q.levels[group.bits][at : at + wide].reshape(count, group.size, tokens)
        scale = q.scale[row : row + count, None].astype(np.float32)
        values = found * scale
        values += q.shift[row : row + count, None].astype(np.float32)
        part[...] = values.reshape(wide, tokens).T
        row += count


def measured_errors(z: FloatArray) -> tuple[Errors, GroupErrors]:
    """Squared errors per token, as `kvferry.codec.kvtc_plan.best_plans` takes them.

    Args: z: (tokens, r) float32, coefficients of calibration text.
    """
    tokens, rank = z.shape
    energy: Errors = np.square(z, dtype=np.float64).sum(axis=0) / tokens
    errors: dict[tuple[int, int], Errors] = {}
    for size in (size for size in SIZES if size <= rank):
        for bits in WIDTHS:
            found = errors[size, bits] = np.full(rank - size + 1, np.inf)
            if size == 1:  # its shift is the value
                lost = z - z.astype(np.float16).astype(np.float32)
                found[:] = np.square(lost, dtype=np.float64).sum(axis=0) / tokens
                continue
            for start in range(0, len(found), ALIGNMENT):
                part = z[:, None, start : start + size]
                shift, scale, levels = _quantize(part, bits, "*")
                back: FloatArray = levels.astype(np.float32)
                back *= scale[..., None].astype(np.float32)
                back += shift[..., None].astype(np.float32)
                back -= part
                found[start] = float(np.square(back, out=back).sum(dtype=np.float64)) / tokens
    return energy, errors


def _runs(plan: BitPlan) -> Iterator[tuple[Group, int, int]]:
    """Equal groups in a row: (group, how many, first component)."""
    start = 0
    for group, run in groupby(plan.groups):
        count = len(list(run))
        yield group, count, start
        start += count * group.size


def _quantize(z: FloatArray, bits: int, stream: str) -> tuple[HalfArray, HalfArray, Levels]:
    """(..., size) -> shift and scale (...) float16, levels (..., size)."""
    low, high = z.min(axis=-1), z.max(axis=-1)
    peak = max(float(high.max()), -float(low.min())) if z.size else 0.0
    if not peak <= _HALF_MAX:  # also true of NaN
        raise UnsupportedTensorError(stream, f"coefficient of {peak:.3g}, beyond float16")
    top = 2**bits - 1
    shift: HalfArray = low.astype(np.float16)
    base = shift.astype(np.float32)
    scale: HalfArray = (np.maximum(high - base, 0) / np.float32(top)).astype(np.float16)
    step = scale.astype(np.float32)
    levels = z - base[..., None]
    levels /= np.where(step > 0, step, np.float32(np.inf))[..., None]
    np.rint(levels, out=levels)
    np.clip(levels, 0, top, out=levels)
    return shift, scale, levels.astype(np.uint8)
