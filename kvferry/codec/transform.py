"""The linear part of `ferry`: weight, basis and mean folded into one matrix each way.

Rows are tokens. A row of ``x`` holds one token's values of the streams that are coded
together, stream after stream, each ordered (layer, head, dim): its width p is the sum of
layers x heads x dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.basis import Basis, RowWeight, Weights, apply_weights
from kvferry.errors import CalibrationCorruptError, UnsupportedTensorError

# Directions whose calibrated deviation is below this share of a step are left out: the
# few of their values that would not round to zero cost more bits than they are worth.
# Measured at equal KL on other text than the calibration's: a third takes 7 % fewer
# bytes and half the matrix time of a tenth; a half takes 5 % more bytes again.
SURVIVING_SIGMA = 1 / 3
_ROWS_AT_ONCE = 384  # of a basis while it is folded


class Products(Protocol):
    """Where the two matrix products of a page run; numpy on the host where none is given.

    An implementation gives the host's result to 1e-4 of the largest coefficient or value.
    """

    def project(self, x: FloatArray, by: "Fold", rank: int) -> FloatArray:
        """See `project`."""

    def reconstruct(self, augmented: FloatArray, by: "Fold", rows: slice) -> FloatArray:
        """See `reconstruct`."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Forward:
    """Rows to coefficients: ``z = x @ matrix - offset``.

    Attributes:
        matrix: (p, r) float32, maybe a view of the way back.
        offset: (r,) float32.
        reach: (r,) float32, lengths of the columns of ``matrix``.
    """

    matrix: FloatArray
    offset: FloatArray
    reach: FloatArray


class Fold:
    """Weight, basis and mean as one matrix each way; serves every step and rank.

    The step stays outside: it scales the few coefficients while they change type
    anyway, and one pair of matrices serves all steps that a policy may choose. The way
    forward is made when it is first asked for, since a machine that only restores never
    needs it. Any thread may ask.

    Attributes:
        decode: (p, 1 + r) float32, the mean in its first column;
            ``x = [1, z] @ decode.T``. Rows can be sliced for some layers, leading
            columns for a smaller rank.
        products: where its products run; None: numpy on the host.
    """

    def __init__(
        self,
        decode: FloatArray,
        make_forward: Callable[[], Forward],
        products: Products | None = None,
    ) -> None:
        self.decode = decode
        self.products = products
        self._make_forward = make_forward
        self._forward: Forward | None = None
        self._lock = Lock()

    @property
    def forward(self) -> Forward:
        """Raises: CalibrationCorruptError: a weight that makes infinite values."""
        with self._lock:
            if self._forward is None:
                self._forward = self._make_forward()
            return self._forward


def fold(basis: Basis, weights: Weights = (), products: Products | None = None) -> Fold:
    """Fold once per calibration.

    Raises: CalibrationCorruptError: a weight that has no inverse.
    """
    width, rank = basis.vectors.shape
    decode = np.empty((width, 1 + rank), dtype=np.float32)
    vectors = decode[:, 1:]
    try:
        inverse = [RowWeight(w.start, np.linalg.inv(w.blocks.astype(np.float64))) for w in weights]
    except np.linalg.LinAlgError as exc:
        raise CalibrationCorruptError("weight", "a matrix has no inverse") from exc
    with np.errstate(over="ignore", invalid="ignore"):
        _weighted_into(vectors, inverse, basis.vectors)
        decode[:, 0] = apply_weights(inverse, basis.mean[:, None])[:, 0]
    _check_finite(decode)
    return Fold(decode, partial(_forward, basis, weights, None if weights else vectors), products)


def _forward(basis: Basis, weights: Weights, unweighted: FloatArray | None) -> Forward:
    """Args: unweighted: the basis in float32 where there are no weights."""
    matrix = unweighted
    if matrix is None:
        matrix = np.empty(basis.vectors.shape, dtype=np.float32)
        back = [RowWeight(w.start, w.blocks.transpose(0, 2, 1)) for w in weights]
        with np.errstate(over="ignore", invalid="ignore"):
            _weighted_into(matrix, back, basis.vectors)
        _check_finite(matrix)
    mean = basis.mean.astype(np.float64)
    offset = np.zeros(matrix.shape[1], dtype=np.float64)
    for start in range(0, len(mean), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        offset += mean[rows] @ basis.vectors[rows].astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->j", matrix, matrix))
    return Forward(matrix, offset.astype(np.float32), lengths.astype(np.float32))


def _weighted_into(
    out: FloatArray, weights: Weights, columns: npt.NDArray[np.floating[Any]]
) -> None:
    """`apply_weights` a few blocks at a time: what lies between stays in the cache."""
    at = 0
    for weight in sorted(weights, key=lambda w: w.start):
        out[at : weight.start] = columns[at : weight.start]
        count, dim, _ = weight.blocks.shape
        step = max(1, _ROWS_AT_ONCE // dim)
        for first in range(0, count, step):
            blocks = weight.blocks[first : first + step]
            start = weight.start + first * dim
            rows = slice(start, start + len(blocks) * dim)
            out[rows] = apply_weights([RowWeight(0, blocks)], columns[rows])
        at = weight.rows.stop
    out[at:] = columns[at:]


def _check_finite(matrix: FloatArray) -> None:
    if not np.isfinite(matrix).all():
        raise CalibrationCorruptError("weight", "a matrix is close to singular")


def rank_at(sigma: FloatArray, step: float) -> int:
    """How many leading directions survive quantization at ``step``; at least 1."""
    return max(1, int(np.count_nonzero(sigma >= SURVIVING_SIGMA * step)))


def project(x: FloatArray, by: Fold, rank: int) -> FloatArray:
    """(tokens, p) float32 -> coefficients (tokens, rank) float32, in one matmul."""
    if by.products is not None:
        return by.products.project(x, by, rank)
    forward = by.forward
    z: FloatArray = x @ forward.matrix[:, :rank]
    z -= forward.offset[:rank]
    return z


def reconstruct(augmented: FloatArray, by: Fold, rows: slice = slice(None)) -> FloatArray:
    """Coefficients back to rows, in one matmul.

    Args:
        augmented: (tokens, 1 + rank) float32, ones in the first column.
        rows: which of the p values of a token to compute (a cut reader's layers).
    Returns: (tokens, rows) float32.
    """
    if by.products is not None:
        return by.products.reconstruct(augmented, by, rows)
    out: FloatArray = augmented @ by.decode[rows, : augmented.shape[1]].T
    return out


def from_rows(rows: FloatArray, layers: int, heads: int, dim: int) -> FloatArray:
    """(tokens, p) -> a view (layers, heads, tokens, dim), also to write into."""
    if rows.shape[1] != layers * heads * dim:
        raise UnsupportedTensorError("rows", f"{rows.shape[1]} wide, {layers}x{heads}x{dim} wanted")
    return rows.reshape(-1, layers, heads, dim).transpose(1, 2, 0, 3)
