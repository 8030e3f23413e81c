"""Levels that do not depend on the order in which a BLAS sums.

Thread counts, kernels and libraries differ in the last bits of a product: about one
level in a million then rounds to its neighbour, and the same page would become other
bytes. Those so close to the edge between two levels that this could happen are computed
again in float64.
"""

import numpy as np

from kvferry.codec.base import FloatArray
from kvferry.codec.transform import Forward

# Of a float32 product, in units of |row| |column|: four times the largest that was seen
# in ten million coefficients over OpenBLAS's kernels for SSE, AVX2 and AVX-512.
_SUM_ERROR = 8 * 2.0**-24


def settle(levels: FloatArray, rows: FloatArray, by: Forward, steps: FloatArray) -> None:
    """Round ``levels`` where float32 does not say to which side.

    Args:
        levels: (tokens, rank) ``project / steps``, not yet rounded; changed.
        rows: (tokens, p).
        steps: (tokens,) float32.
    """
    rank = levels.shape[1]
    size = np.sqrt(np.einsum("ij,ij->i", rows, rows)) / steps * np.float32(_SUM_ERROR)
    if not np.isfinite(size).all():
        return  # refused when quantized
    distance = np.rint(levels)
    distance -= levels
    np.abs(distance, out=distance)
    distance += np.multiply.outer(size, by.reach[:rank])
    i, j = np.nonzero(distance > np.float32(0.5))
    if 100 * len(i) > levels.size:  # values far beyond their calibration
        exact = rows.astype(np.float64) @ by.matrix[:, :rank].astype(np.float64)
        levels[...] = np.rint((exact - by.offset[:rank]) / steps[:, None])
    elif len(i):
        columns = by.matrix[:, j].T.astype(np.float64)
        exact = np.einsum("ij,ij->i", rows[i].astype(np.float64), columns)
        levels[i, j] = np.rint((exact - by.offset[j]) / steps[i])
