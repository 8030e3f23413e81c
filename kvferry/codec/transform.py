"""The linear part of `ferry`: covariance in, an eigenbasis out, one matrix each way.

Rows are tokens. A row of ``x`` holds one token's values of one stream, ordered
(layer, head, dim), so its width is p = layers x heads x dim.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.errors import UnsupportedTensorError

Float64Array = npt.NDArray[np.float64]


class CovarianceAccumulator:
    """Mean and covariance of rows seen one batch at a time.

    Memory is two p x p matrices, whatever the number of tokens. Sums run in float64
    around the first batch's mean, so large constant channels cost no precision.
    """

    def __init__(self, width: int) -> None:
        raise NotImplementedError

    @property
    def width(self) -> int:
        """p."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Rows seen."""
        raise NotImplementedError

    def add(self, rows: FloatArray) -> None:
        """Take in (n, p) float32 rows. Raises: UnsupportedTensorError (shape, NaN, inf)."""
        raise NotImplementedError

    def merge(self, other: "CovarianceAccumulator") -> None:
        """Take in all that ``other`` has seen (another rank's share of the text)."""
        raise NotImplementedError

    def mean(self) -> Float64Array:
        """(p,)"""
        raise NotImplementedError

    def covariance(self) -> Float64Array:
        """(p, p), symmetric; of the population, that is divided by ``count``."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Directions by falling variance, in the weighted space.

    Attributes:
        mean: (p,) mean of the weighted rows.
        vectors: (p, r) orthonormal columns.
        sigma: (r,) standard deviation of the coefficients, falling.
    """

    mean: FloatArray
    vectors: FloatArray
    sigma: FloatArray


def eigenbasis(
    seen: CovarianceAccumulator, max_rank: int, weight: FloatArray | None = None
) -> Basis:
    """Eigenvectors of the (weighted) covariance, the ``max_rank`` strongest.

    Args:
        weight: (layers, heads, dim, dim) matrices A, applied as A x per head; None:
            identity.
    Raises: UnsupportedTensorError: too few rows, or a weight that does not fit.
    """
    raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Weight, basis and mean as one matrix each way; serves every step and rank.

    Attributes:
        encode: (p, r) float32; ``z = x @ encode - offset``.
        offset: (r,) float32.
        decode: (p, 1 + r) float32, the mean in its first column;
            ``x = [1, z] @ decode.T``. Rows can be sliced for some layers, leading
            columns for a smaller rank.
    """

    encode: FloatArray
    offset: FloatArray
    decode: FloatArray


def fold(basis: Basis, weight: FloatArray | None = None) -> Fold:
    """Fold once per calibration. ``weight`` as in `eigenbasis`.

    Raises: UnsupportedTensorError: a singular weight.
    """
    raise NotImplementedError


def rank_at(sigma: FloatArray, step: float) -> int:
    """How many leading directions survive quantization at ``step``; at least 1."""
    raise NotImplementedError


def project(x: FloatArray, by: Fold, rank: int) -> FloatArray:
    """(tokens, p) float32 -> coefficients (tokens, rank) float32, in one matmul."""
    raise NotImplementedError


def reconstruct(augmented: FloatArray, by: Fold, rows: slice = slice(None)) -> FloatArray:
    """Coefficients back to rows, in one matmul.

    Args:
        augmented: (tokens, 1 + rank) float32, ones in the first column.
        rows: which of the p values of a token to compute (a cut reader's layers).
    Returns: (tokens, rows) float32.
    """
    raise NotImplementedError


def to_rows(data: npt.NDArray[np.float32]) -> FloatArray:
    """(layers, heads, tokens, dim) -> (tokens, p), contiguous."""
    layers, heads, tokens, dim = data.shape
    return np.ascontiguousarray(data.transpose(2, 0, 1, 3)).reshape(tokens, layers * heads * dim)


def from_rows(rows: FloatArray, layers: int, heads: int, dim: int) -> FloatArray:
    """(tokens, p) -> a view (layers, heads, tokens, dim)."""
    if rows.shape[1] != layers * heads * dim:
        raise UnsupportedTensorError("rows", f"{rows.shape[1]} wide, {layers}x{heads}x{dim} wanted")
    return rows.reshape(-1, layers, heads, dim).transpose(1, 2, 0, 3)
