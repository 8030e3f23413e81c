"""Mean and covariance of rows, batch by batch, in memory that does not grow."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.errors import UnsupportedTensorError

Float64Array = npt.NDArray[np.float64]
SavedLayout = dict[str, tuple[tuple[int, ...], str]]
SavedTensors = Mapping[str, npt.NDArray[Any]]

_ROWS_PER_PRODUCT = 4096


class CovarianceAccumulator:
    """Mean and covariance of rows seen one batch at a time.

    Memory is one p x p float64 matrix (and one float32 product while adding), whatever
    the number of tokens. Sums run around the first batch's mean, so large constant
    channels cost no precision.

    Args:
        width: p.
        lead: axes in front of rows, as (layers, heads): so many covariances side by side,
            each of its own rows alone.
    """

    def __init__(self, width: int, lead: tuple[int, ...] = ()) -> None:
        if width < 1 or any(axis < 1 for axis in lead):
            raise UnsupportedTensorError("rows", f"width {width}, axes {lead}")
        self._width, self._lead = width, lead
        self._count = 0
        self._shift: FloatArray = np.zeros((*lead, width), dtype=np.float32)
        self._sum: Float64Array = np.zeros((*lead, width), dtype=np.float64)
        self._products: Float64Array = np.zeros((*lead, width, width), dtype=np.float64)

    @staticmethod
    def state_layout(width: int, lead: tuple[int, ...] = ()) -> SavedLayout:
        """What `state` holds at a width: part -> (shape, dtype)."""
        return {
            "count": ((1,), "<i8"),
            "shift": ((*lead, width), "<f4"),
            "sum": ((*lead, width), "<f8"),
            "products": ((*lead, width, width), "<f8"),
        }

    @property
    def state(self) -> SavedTensors:
        """Views of all that was summed up; `of_state` goes on from it bit for bit."""
        count = np.array([self._count], dtype="<i8")
        return {"count": count, "shift": self._shift, "sum": self._sum, "products": self._products}

    @classmethod
    def of_state(cls, state: SavedTensors) -> Self:
        """The inverse of `state`; takes the arrays over. Raises: KeyError."""
        made = cls(1)
        *lead, made._width = state["shift"].shape
        made._lead, made._count = tuple(lead), int(state["count"][0])
        made._shift, made._sum = state["shift"], state["sum"]
        made._products = state["products"]
        return made

    @property
    def width(self) -> int:
        """p."""
        return self._width

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._count

    def add(self, rows: FloatArray) -> None:
        """Take in (*lead, n, p) float32 rows. Raises: UnsupportedTensorError (shape, NaN, inf)."""
        if rows.ndim < 2 or (*rows.shape[:-2], rows.shape[-1]) != (*self._lead, self._width):
            raise UnsupportedTensorError("rows", f"shape {rows.shape}, {self._width} wide wanted")
        if not np.isfinite(rows).all():
            raise UnsupportedTensorError("rows", "hold NaN or infinite values")
        count = rows.shape[-2]
        if not self._count and count:
            self._shift = rows.mean(axis=-2, dtype=np.float64).astype(np.float32)
        for start in range(0, count, _ROWS_PER_PRODUCT):
            part = rows[..., start : start + _ROWS_PER_PRODUCT, :] - self._shift[..., None, :]
            self._sum += part.sum(axis=-2, dtype=np.float64)
            self._products += np.swapaxes(part, -1, -2) @ part
            self._count += part.shape[-2]

    def merge(self, other: "CovarianceAccumulator") -> None:
        """Take in all that ``other`` has seen (another rank's share of the text)."""
        if (other.width, other._lead) != (self._width, self._lead):
            raise UnsupportedTensorError("rows", f"{other.width} wide, {self._width} wanted")
        if not other.count:
            return
        if not self._count:
            self._shift = other._shift.copy()
        moved = other._shift.astype(np.float64) - self._shift
        cross = _outer(other._sum, moved)
        self._products += other._products + cross + np.swapaxes(cross, -1, -2)
        self._products += other.count * _outer(moved, moved)
        self._sum += other._sum + other.count * moved
        self._count += other.count

    def mean(self) -> Float64Array:
        """(*lead, p)"""
        return self._shift + self._sum / max(self._count, 1)

    def covariance(self) -> Float64Array:
        """(*lead, p, p), symmetric; of the population, that is divided by ``count``."""
        offset = self._sum / max(self._count, 1)
        return self._products / max(self._count, 1) - _outer(offset, offset)


def _outer(a: Float64Array, b: Float64Array) -> Float64Array:
    return a[..., :, None] * b[..., None, :]
