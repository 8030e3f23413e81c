"""Coefficients to integers: plain rounding, one step per token."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.errors import ConfigError, UnsupportedTensorError

IntArray = npt.NDArray[np.int16] | npt.NDArray[np.int32]
_MAX_INT16 = 32_767
_MAX_LEVEL = float(1 << 30)


def check_step(step: object) -> float:
    """A usable step as a float. Raises: ConfigError."""
    try:
        value = float(step)  # type: ignore[arg-type]
    except (TypeError, ValueError) as exc:
        raise ConfigError("step", step, "a number above 0") from exc
    if not (1e-30 < value < 1e30):
        raise ConfigError("step", step, "a number above 0")
    return value


def quantize(
    z: FloatArray,
    steps: FloatArray,
    stream: str,
    settle: Callable[[FloatArray], None] | None = None,
) -> IntArray:
    """``round(z / steps)``; ``z`` is used up.

    Args:
        z: (tokens, rank).
        steps: (tokens,) float32.
        stream: what to name in errors.
        settle: sees ``z / steps`` before it is rounded; see `kvferry.codec.settle`.

    Returns: (tokens, rank) int16, or int32 where a coefficient leaves int16.
    Raises: UnsupportedTensorError for NaN, infinities, and levels beyond 2**30.
    """
    z *= (1.0 / steps.astype(np.float64)).astype(np.float32)[:, None]
    if settle is not None:
        settle(z)
    np.rint(z, out=z)
    peak = max(abs(float(z.max())), abs(float(z.min()))) if z.size else 0.0
    if not peak <= _MAX_LEVEL:  # also true of NaN
        problem = f"level {peak:.3g} is out of range" if np.isfinite(peak) else "NaN or infinite"
        raise UnsupportedTensorError(stream, f"{problem}: not stored")
    return z.astype(np.int16) if peak <= _MAX_INT16 else z.astype(np.int32)
