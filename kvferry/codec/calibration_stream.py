"""The basis of one stream of one layer group."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.transform import Basis, Fold, Products, cut_basis, fold
from kvferry.errors import CalibrationCorruptError

MAX_WIDTH = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamCalibration:
    """Basis of one stream of one layer group.

    Attributes:
        name: "k", "v", ...
        heads, dim: of this stream; MLA's streams have one head.
        mean: (p,) float32, of the weighted rows; p = layers x heads x dim.
        basis: (p, r) float16 or float32, orthonormal columns by falling variance.
        sigma: (r,) float32, standard deviations of the coefficients.
        weight: (layers, heads, dim, dim) float32, or None for identity.
        products: where its matrix products run; no part of what is stored.
    """

    name: str
    heads: int
    dim: int
    mean: FloatArray
    basis: npt.NDArray[np.float16] | FloatArray
    sigma: FloatArray
    weight: FloatArray | None = None
    products: Products | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationCorruptError(f"stream {self.name!r}", problem)

    def _problem(self) -> str:
        if self.basis.ndim != 2 or min(self.basis.shape) < 1:
            return f"basis of shape {self.basis.shape}"
        width, rank = self.basis.shape
        if self.heads < 1 or self.dim < 1 or width % (self.heads * self.dim) or width > MAX_WIDTH:
            return f"width {width} with {self.heads} heads of {self.dim}"
        if rank > width or self.mean.shape != (width,) or self.sigma.shape != (rank,):
            return "mean, basis and sigma differ in size"
        layers = width // (self.heads * self.dim)
        wanted = (layers, self.heads, self.dim, self.dim)
        if self.weight is not None and self.weight.shape != wanted:
            return f"weight of shape {self.weight.shape}"
        for name in ("mean", "sigma", "weight"):
            value = getattr(self, name)
            if value is not None and value.dtype != np.float32:
                return f"{name} of {value.dtype}"
        if self.basis.dtype not in (np.float16, np.float32):
            return f"basis of {self.basis.dtype}"
        if (self.sigma < 0).any() or (np.diff(self.sigma) > 0).any():
            return "sigma does not fall"
        return ""

    @property
    def width(self) -> int:
        """p = layers x heads x dim."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """Directions kept."""
        return int(self.basis.shape[1])

    @property
    def layers(self) -> int:
        """How many layers the rows hold."""
        return self.width // (self.heads * self.dim)

    @cached_property
    def fold(self) -> Fold:
        """Weight, basis and mean as one float32 matrix each way; made once and kept."""
        return fold(self._float32_basis(), self.weight, self.products)

    def _float32_basis(self) -> Basis:
        return Basis(self.mean, self.basis.astype(np.float32), self.sigma)

    def cut(self, layers: slice, heads: slice) -> "StreamCalibration":
        """Only these layers and heads (indices within the stream)."""
        shape = (self.layers, self.heads, self.dim)
        index = np.arange(self.width).reshape(shape)[layers, heads]
        part = cut_basis(self._float32_basis(), index.reshape(-1))
        weight = None if self.weight is None else np.ascontiguousarray(self.weight[layers, heads])
        made = stream_calibration(self.name, index.shape[1], self.dim, part, weight)
        return replace(made, products=self.products)


def stream_calibration(
    name: str, heads: int, dim: int, basis: Basis, weight: FloatArray | None
) -> StreamCalibration:
    """A stream's calibration as it is stored.

    float16 is enough for the basis: its rounding adds 1e-7 of a page's energy, a step
    that suits any use thousands of times that.
    """
    return StreamCalibration(
        name=name,
        heads=heads,
        dim=dim,
        mean=basis.mean,
        basis=basis.vectors.astype(np.float16),
        sigma=np.minimum.accumulate(basis.sigma),
        weight=weight,
    )
