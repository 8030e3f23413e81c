"""Per-head low rank in plain numpy, for `lowrank` and for caches that compress as they go.

`HeadBasis` is one PCA basis per layer and head; `project` and `reconstruct` go there and
back for all layers, heads and tokens at once; `quantize` and `dequantize` make int8 of
coefficients. Arrays are (..., tokens, dim) with any leading axes, mostly (layers, heads):
a cache that fills layer by layer takes ``basis[layer]`` and passes (heads, tokens, dim),
or repeats the call with a batch axis in front, (batch, heads, tokens, dim).

Keys must have RoPE undone first (`kvferry.codec.rope.undo`), or no rank is low.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.covariance import Float64Array
from kvferry.errors import CalibrationCorruptError, ConfigError, UnsupportedTensorError

Int8Array = npt.NDArray[np.int8]
_LEVELS = 127


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadBasis:
    """One basis per head. ``...`` are the same leading axes in all three, as (layers, heads).

    Attributes:
        mean: (..., dim) float32.
        vectors: (..., dim, rank) float32, orthonormal columns by falling variance.
        variances: (..., rank) float32, of the coefficients on the calibration text.
    """

    mean: FloatArray
    vectors: FloatArray
    variances: FloatArray

    def __post_init__(self) -> None:
        *lead, dim, rank = self.vectors.shape if self.vectors.ndim >= 2 else (0, 0)
        if not 1 <= rank <= dim:
            raise CalibrationCorruptError("basis", f"of shape {self.vectors.shape}")
        if self.mean.shape != (*lead, dim) or self.variances.shape != (*lead, rank):
            raise CalibrationCorruptError("basis", "mean, vectors and variances differ in size")
        if any(a.dtype != np.float32 for a in (self.mean, self.vectors, self.variances)):
            raise CalibrationCorruptError("basis", "holds a tensor that is not float32")

    @property
    def dim(self) -> int:
        """Values of a head and token."""
        return int(self.vectors.shape[-2])

    @property
    def rank(self) -> int:
        """Directions held."""
        return int(self.vectors.shape[-1])

    def keep(self, rank: int) -> Self:
        """The ``rank`` strongest directions of every head; views.

        Raises: ConfigError: there are not so many.
        """
        if not 1 <= rank <= self.rank:
            raise ConfigError("rank", rank, f"1 to {self.rank}, the directions of a head")
        return type(self)(
            mean=self.mean,
            vectors=self.vectors[..., :rank],
            variances=self.variances[..., :rank],
        )

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Self:
        """Of some layers, or layers and heads: indexes the leading axes; views."""
        return type(self)(
            mean=self.mean[index], vectors=self.vectors[index], variances=self.variances[index]
        )

    def lost(self, rank: int) -> FloatArray:
        """(...,) share of each head's variance that ``rank`` directions leave out, 0 to 1."""
        whole = self.variances.sum(axis=-1, dtype=np.float64)
        kept = self.variances[..., :rank].sum(axis=-1, dtype=np.float64)
        share: Float64Array = 1.0 - kept / np.where(whole > 0, whole, 1.0)
        return np.where(whole > 0, np.clip(share, 0.0, 1.0), 0.0).astype(np.float32)


def fit_heads(mean: Float64Array, covariance: Float64Array) -> HeadBasis:
    """PCA of every head by itself, all directions.

    Args:
        mean: (..., dim).
        covariance: (..., dim, dim), symmetric.
    Returns: rank = dim. Of each direction the entry that is largest is positive, so that
        equal covariances give equal bases.
    Source: eigenvectors of the covariance, as the SVD of the centred data would give.
    """
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = variances[..., ::-1], vectors[..., ::-1]
    largest = np.argmax(np.abs(vectors), axis=-2, keepdims=True)
    signs = np.where(np.take_along_axis(vectors, largest, axis=-2) < 0, -1.0, 1.0)
    return HeadBasis(
        mean=np.ascontiguousarray(mean, dtype=np.float32),
        vectors=np.ascontiguousarray(vectors * signs, dtype=np.float32),
        variances=np.ascontiguousarray(np.maximum(variances, 0.0), dtype=np.float32),
    )


def project(values: FloatArray, basis: HeadBasis) -> FloatArray:
    """Coefficients of values in their heads' bases.

    Args:
        values: (..., tokens, dim) float32, the basis' leading axes last before tokens.
    Returns: (..., tokens, rank) float32.
    Raises: UnsupportedTensorError: another shape than the basis'.
    """
    _check(values, basis.mean.shape, basis.dim)
    found: FloatArray = np.matmul(values - basis.mean[..., None, :], basis.vectors)
    return found


def reconstruct(coefficients: FloatArray, basis: HeadBasis) -> FloatArray:
    """Values again: the inverse of `project` at full rank, its best approximation below.

    Args:
        coefficients: (..., tokens, rank) float32.
    Returns: (..., tokens, dim) float32.
    Raises: UnsupportedTensorError: another shape than the basis'.
    """
    _check(coefficients, basis.mean.shape, basis.rank)
    found: FloatArray = np.matmul(coefficients, np.swapaxes(basis.vectors, -1, -2))
    found += basis.mean[..., None, :]
    return found


def quantize(coefficients: FloatArray, axis: int = -2) -> tuple[Int8Array, FloatArray]:
    """Coefficients as int8, evenly around 0.

    Args:
        coefficients: (..., tokens, rank) float32.
        axis: which values share a scale. -2: all tokens of a direction, best for whole
            pages, since directions differ in size by orders; -1: all directions of a
            token, for caches that grow token by token.
    Returns: levels from -127 to 127, of the same shape; scales float32, where ``axis``
        has length 1.
    Raises: UnsupportedTensorError: NaN or infinite values.
    """
    peak = np.abs(coefficients).max(axis=axis, keepdims=True, initial=0.0)
    if not np.isfinite(peak).all():
        raise UnsupportedTensorError("coefficients", "hold NaN or infinite values")
    scales: FloatArray = (peak / np.float32(_LEVELS)).astype(np.float32)
    # Too small for a scale of its own: its values are zeros to any use.
    inverse = np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(np.inf))
    levels = np.rint(coefficients / inverse)
    return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), scales


def dequantize(levels: Int8Array, scales: FloatArray) -> FloatArray:
    """Coefficients of `quantize` again, to half a scale."""
    found: FloatArray = levels * scales
    return found


def _check(values: FloatArray, lead: tuple[int, ...], last: int) -> None:
    wanted = lead[:-1]
    found = values.shape[:-2][len(values.shape[:-2]) - len(wanted) :]
    if values.ndim < len(wanted) + 2 or found != wanted or values.shape[-1] != last:
        shown = ", ".join(map(str, (*wanted, "tokens", last)))
        raise UnsupportedTensorError("*", f"shape {values.shape}, (..., {shown}) wanted")
