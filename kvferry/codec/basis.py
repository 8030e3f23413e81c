"""The basis of `ferry`: weighted covariance in, its strongest directions out.

Rows are tokens, as in `kvferry.codec.transform`; rows of a basis are a token's p values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.covariance import CovarianceAccumulator, Float64Array
from kvferry.codec.eigen import strongest
from kvferry.errors import UnsupportedTensorError


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Directions by falling variance, in the weighted space.

    Attributes:
        mean: (p,) mean of the weighted rows.
        vectors: (p, r) orthonormal columns, float32 or float16.
        sigma: (r,) standard deviation of the coefficients, falling.
        importance: (n,) with n <= r, or None: see `kvferry.codec.importance`.
    """

    mean: FloatArray
    vectors: npt.NDArray[np.float16] | FloatArray
    sigma: FloatArray
    importance: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowWeight:
    """Matrices A of consecutive rows, one per layer and head: A x instead of x.

    Attributes:
        start: first row that they weigh; rows of no `RowWeight` are taken as they are.
        blocks: (layers x heads, dim, dim).
    """

    start: int
    blocks: FloatArray | Float64Array

    @property
    def rows(self) -> slice:
        """The rows that they weigh."""
        return slice(self.start, self.start + self.blocks.shape[0] * self.blocks.shape[1])


Weights = Sequence[RowWeight]


def row_weight(weight: FloatArray, start: int = 0) -> RowWeight:
    """(layers, heads, dim, dim) as the weight of the rows from ``start``.

    Raises: UnsupportedTensorError for another shape.
    """
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise UnsupportedTensorError("weight", f"shape {weight.shape}")
    return RowWeight(start, weight.reshape(-1, *weight.shape[2:]))


def apply_weights(
    weights: Weights, columns: npt.NDArray[np.floating[Any]], *, transposed: bool = False
) -> Float64Array:
    """Block-diagonal matrix times (p, n) columns; a new array.

    Raises: UnsupportedTensorError: weights of more rows than there are.
    """
    out = np.array(columns, dtype=np.float64)
    for weight in weights:
        if weight.rows.stop > len(out):
            raise UnsupportedTensorError("weight", f"of rows to {weight.rows.stop} of {len(out)}")
        count, dim, _ = weight.blocks.shape
        blocks = weight.blocks.astype(np.float64)
        part = out[weight.rows].reshape(count, dim, -1)
        out[weight.rows] = np.matmul(
            blocks.transpose(0, 2, 1) if transposed else blocks, part
        ).reshape(count * dim, -1)
    return out


def weighted_covariance(seen: CovarianceAccumulator, weights: Weights) -> FloatArray:
    """(p, p) float32 covariance of the weighted rows, symmetric.

    float32 holds it: its rounding, 1e-7 of the greatest variance, lies far below any
    step, and the eigensolver is twice as fast.
    """
    covariance = seen.covariance()
    if weights:
        covariance = apply_weights(weights, apply_weights(weights, covariance).T)
    covariance += covariance.T.copy()
    covariance /= 2
    return covariance.astype(np.float32)


def eigenbasis(seen: CovarianceAccumulator, max_rank: int, weights: Weights = ()) -> Basis:
    """Eigenvectors of the (weighted) covariance, the ``max_rank`` strongest.

    Raises: UnsupportedTensorError: fewer than two rows.
    """
    if seen.count < 2 or max_rank < 1:
        raise UnsupportedTensorError("rows", f"{seen.count} rows and rank {max_rank}: no basis")
    mean = apply_weights(weights, seen.mean()[:, None])[:, 0]
    keep = min(max_rank, seen.width, seen.count - 1)
    variances, vectors = strongest(weighted_covariance(seen, weights), keep)
    sigma = np.sqrt(np.maximum(variances, 0.0))
    return Basis(
        mean.astype(np.float32),
        np.ascontiguousarray(vectors, dtype=np.float32),
        sigma.astype(np.float32),
    )


def cut_basis(basis: Basis, rows: npt.NDArray[np.intp]) -> Basis:
    """The basis of some of the rows, without the data.

    Basis times sigma is a square root of the covariance, and its kept rows are one of
    the covariance of the kept values; their SVD is the basis sought (design section 3).
    It is taken through the smaller of the two Gram matrices, which costs a tenth of it.

    What the importance of a token was predicted from goes the same way: coefficients of
    the part, as far as they determine those of the whole.
    """
    root = basis.vectors[rows].astype(np.float64) * basis.sigma
    if root.shape[0] <= root.shape[1]:
        variances, vectors = np.linalg.eigh(root @ root.T)
        vectors = vectors[:, ::-1]
    else:
        variances, right = np.linalg.eigh(root.T @ root)
        # Left vectors of the numerically null space are noise: QR makes them orthonormal.
        vectors, _ = np.linalg.qr(root @ right[:, ::-1])
    sigma = np.sqrt(np.maximum(variances[::-1], 0.0))
    importance = None
    if basis.importance is not None:
        known = len(basis.importance)
        seen = vectors.T @ (root[:, :known] @ basis.importance.astype(np.float64))
        usable = sigma > 1e-6 * max(float(sigma[0]), 1e-30)
        kept = np.divide(seen, sigma, out=np.zeros_like(seen), where=usable)
        importance = kept[:known].astype(np.float32)
    return Basis(
        basis.mean[rows],
        np.ascontiguousarray(vectors, dtype=np.float32),
        sigma.astype(np.float32),
        importance,
    )
