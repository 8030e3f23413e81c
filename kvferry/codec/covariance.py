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
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise UnsupportedTensorError("rows", f"width {width}")
        self._width = width
        self._count = 0
        self._shift: FloatArray = np.zeros(width, dtype=np.float32)
        self._sum: Float64Array = np.zeros(width, dtype=np.float64)
        self._products: Float64Array = np.zeros((width, width), dtype=np.float64)

    @staticmethod
    def state_layout(width: int) -> SavedLayout:
        """What `state` holds at a width: part -> (shape, dtype)."""
        return {
            "count": ((1,), "<i8"),
            "shift": ((width,), "<f4"),
            "sum": ((width,), "<f8"),
            "products": ((width, width), "<f8"),
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
        made._width, made._count = len(state["shift"]), int(state["count"][0])
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
        """Take in (n, p) float32 rows. Raises: UnsupportedTensorError (shape, NaN, inf)."""
        if rows.ndim != 2 or rows.shape[1] != self._width:
            raise UnsupportedTensorError("rows", f"shape {rows.shape}, {self._width} wide wanted")
        if not np.isfinite(rows).all():
            raise UnsupportedTensorError("rows", "hold NaN or infinite values")
        if not self._count and len(rows):
            self._shift = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        for start in range(0, len(rows), _ROWS_PER_PRODUCT):
            part = rows[start : start + _ROWS_PER_PRODUCT] - self._shift
            self._sum += part.sum(axis=0, dtype=np.float64)
            self._products += part.T @ part
            self._count += len(part)

    def merge(self, other: "CovarianceAccumulator") -> None:
        """Take in all that ``other`` has seen (another rank's share of the text)."""
        if other.width != self._width:
            raise UnsupportedTensorError("rows", f"{other.width} wide, {self._width} wanted")
        if not other.count:
            return
        if not self._count:
            self._shift = other._shift.copy()
        moved = other._shift.astype(np.float64) - self._shift
        cross = np.outer(other._sum, moved)
        self._products += other._products + cross + cross.T
        self._products += other.count * np.outer(moved, moved)
        self._sum += other._sum + other.count * moved
        self._count += other.count

    def mean(self) -> Float64Array:
        """(p,)"""
        return self._shift + self._sum / max(self._count, 1)

    def covariance(self) -> Float64Array:
        """(p, p), symmetric; of the population, that is divided by ``count``."""
        offset = self._sum / max(self._count, 1)
        return self._products / max(self._count, 1) - np.outer(offset, offset)
