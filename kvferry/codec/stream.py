"""One kind of tensor of a page: its values, and what its bits mean."""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.errors import UnsupportedTensorError

FloatArray = npt.NDArray[np.float32]

# Streams that belong to a position and not to a run of tokens: recurrent state, rings.
STATE_PREFIX = "state."
RING_KEYS, RING_VALUES = f"{STATE_PREFIX}k", f"{STATE_PREFIX}v"
_FLOAT16_MAX = np.float32(np.finfo(np.float16).max)


class DType(enum.StrEnum):
    """Element types of a cache. numpy has no bfloat16: its bits travel as uint16."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def storage(self) -> np.dtype[np.generic]:
        """numpy dtype that carries the bits, little-endian."""
        return np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[self.value])


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One kind of tensor of a page.

    Attributes:
        name: "k", "v", "latent", "rope_key", "index_key" or "state.*".
        data: (layers, heads, tokens, dim), in ``dtype.storage``; keys as the cache has
            them, that is with RoPE applied. Of a "state.*" stream only the first axis has
            a meaning.
        dtype: what the elements mean.
    """

    name: str
    data: npt.NDArray[np.generic]
    dtype: DType

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise UnsupportedTensorError(self.name, f"shape {self.data.shape} is not 4-d")
        if self.data.dtype != self.dtype.storage:
            raise UnsupportedTensorError(
                self.name, f"array of {self.data.dtype} cannot carry {self.dtype.value}"
            )

    def float32(self) -> FloatArray:
        """The values as float32, (layers, heads, tokens, dim). Exact for all dtypes."""
        if self.dtype is DType.BFLOAT16:
            bits = self.data.astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32)
        return self.data.astype(np.float32)

    @classmethod
    def from_float32(cls, name: str, values: FloatArray, dtype: DType) -> "Stream":
        """Round float32 values to ``dtype`` (to nearest even); beyond its range: infinity."""
        out = np.empty(values.shape, dtype=dtype.storage)
        store_float32(out, values, dtype)
        return cls(name, out, dtype)


def clip_to(values: FloatArray, dtype: DType, out: FloatArray | None = None) -> FloatArray:
    """Finite ``values`` within what ``dtype`` reaches; float16 ends at 65504.

    What is rotated or decoded may be longer than what came in, and an infinite key makes
    all attention NaN.
    """
    if dtype is not DType.FLOAT16:
        return values
    return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX, out=out)


def store_float32(out: npt.NDArray[np.generic], values: FloatArray, dtype: DType) -> None:
    """Write float32 ``values`` into ``out`` (same shape, ``dtype.storage``), rounded."""
    if dtype is not DType.BFLOAT16:
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="same_kind")
        return
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = np.isnan(values)
    if nan.any():  # rounding may carry a NaN's payload into its sign
        rounded[nan] = 0x7FC0
    np.copyto(out, rounded, casting="unsafe")
