"""The direction of a head that a LayerNorm before attention leaves empty, where there is one.

See `kvferry.codec.lowrank` for when that is. Nothing here is learned from text: it follows
from weights, and text is only asked whether it agrees.
"""

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.covariance import Float64Array

# How far all-ones may lie from a head's row space, as a share of its length: what rounding
# weights to 16 bits leaves. Heads of any trained model narrower than it are at 0.8 and more.
TOLERANCE = 3e-3
# A direction that holds more of a head's variance than rounding to 16 bits is not empty.
_HELD = 1e-5

Flags = npt.NDArray[np.float32]


def null_directions(weights: Float64Array, gain: Float64Array) -> FloatArray:
    """The unit vector u of each head with u . W diag(g) a multiple of all-ones.

    Args:
        weights: (..., heads, dim, width), values of a head from the norm's outputs.
        gain: (width,), the norm's.
    Returns: (..., heads, dim) float32; zeros for heads without one.
    """
    mixed = weights * gain
    ones = np.ones(mixed.shape[-1])
    # The least-squares answer to mixed^T u = ones.
    found = np.linalg.pinv(np.swapaxes(mixed, -1, -2)) @ ones
    reached = np.matmul(found[..., None, :], mixed)[..., 0, :]
    apart = np.linalg.norm(reached - ones, axis=-1) / np.sqrt(len(ones))
    length = np.linalg.norm(found, axis=-1)
    valid = (apart <= TOLERANCE) & (length > 0)
    unit = found / np.where(length > 0, length, 1.0)[..., None]
    return np.where(valid[..., None], unit, 0.0).astype(np.float32)


def without(covariance: Float64Array, null: FloatArray) -> tuple[Float64Array, Flags]:
    """A covariance whose last eigenvector is the empty direction.

    Args:
        covariance: (layers, heads, dim, dim).
        null: (layers, heads, dim), unit vectors, or zeros.
    Returns: the covariance, and (layers, heads) float32: 1 where a direction was taken,
        which is where no more than rounding lies along it.
    """
    u = null.astype(np.float64)
    whole = np.trace(covariance, axis1=-2, axis2=-1)
    along = np.einsum("...i,...ij,...j->...", u, covariance, u)
    taken = (np.abs(u).sum(axis=-1) > 0) & (along <= _HELD * whole)
    u = np.where(taken[..., None], u, 0.0)
    image = np.einsum("...ij,...j->...i", covariance, u)
    cross = u[..., :, None] * image[..., None, :]
    square = u[..., :, None] * u[..., None, :]
    apart = covariance - cross - np.swapaxes(cross, -1, -2)
    apart += (along - whole - 1.0)[..., None, None] * square  # below all others, so the last
    return apart, taken.astype(np.float32)
