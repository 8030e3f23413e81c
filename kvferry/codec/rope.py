"""Rotary position embedding: what a layer does to its keys, undone and redone.

Keys compress far better before rotation. The cache holds them rotated, so codecs undo
the rotation in float32 and redo it on restore; both sides use the same `RopeSpec`, and
its fingerprint travels with the blob.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvferry.codec.base import FloatArray
from kvferry.errors import CalibrationCorruptError, UnsupportedTensorError
from kvferry.proto.keys import canonical_json

MAX_ROPE_DIMS = 4096
_DOMAIN = b"kvferry/rope/1"

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How one layer rotates its keys.

    Attributes:
        dims: leading dimensions of a head that are rotated; 0 where a layer has no RoPE.
        traditional: True rotates pairs (2i, 2i+1), False halves (i, i + dims/2).
        inv_freq: dims/2 angular frequencies in radians per position, float32 values
            as the model computes them.
        key_scale: factor that the model puts on the rotated dims (YaRN, longrope);
            divided out by `undo`.
        position_scale: positions are multiplied by it before all else (linear scaling).
    """

    dims: int
    traditional: bool
    inv_freq: tuple[float, ...]
    key_scale: float = 1.0
    position_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.dims <= MAX_ROPE_DIMS or self.dims % 2:
            raise CalibrationCorruptError("rope", f"{self.dims} rotated dims")
        if len(self.inv_freq) * 2 != self.dims:
            raise CalibrationCorruptError(
                "rope", f"{len(self.inv_freq)} frequencies for {self.dims} dims"
            )
        values = np.array([*self.inv_freq, self.key_scale, self.position_scale], dtype=np.float64)
        if not np.isfinite(values).all() or min(values[-2:]) <= 0:
            raise CalibrationCorruptError("rope", "a frequency or scale is not a finite number")

    def fingerprint(self) -> bytes:
        """32 bytes, the same on every machine.

        Frequencies enter with three significant digits: they are float32 values whose
        last bits differ between a CPU and a GPU. Their exact source, the model's
        config, is part of every key anyway.
        """
        return blake3(
            _DOMAIN
            + canonical_json(
                {
                    "dims": self.dims,
                    "traditional": self.traditional,
                    "inv_freq": [f"{value:.2e}" for value in self.inv_freq],
                    "key_scale": f"{self.key_scale:.4e}",
                    "position_scale": f"{self.position_scale:.4e}",
                }
            )
        ).digest()

    def to_json(self) -> dict[str, object]:
        """A JSON-like mapping that `from_json` reads."""
        return {
            "dims": self.dims,
            "traditional": self.traditional,
            "inv_freq": list(self.inv_freq),
            "key_scale": self.key_scale,
            "position_scale": self.position_scale,
        }

    @classmethod
    def from_json(cls, value: object) -> "RopeSpec":
        """Raises: CalibrationCorruptError for anything that `to_json` does not write."""
        if not isinstance(value, Mapping) or set(value) != {
            "dims",
            "traditional",
            "inv_freq",
            "key_scale",
            "position_scale",
        }:
            raise CalibrationCorruptError("rope", "not a rope specification")
        dims, traditional = value["dims"], value["traditional"]
        freq = value["inv_freq"]
        scales = [value["key_scale"], value["position_scale"]]
        if type(dims) is not int or type(traditional) is not bool or not isinstance(freq, list):
            raise CalibrationCorruptError("rope", "a field has the wrong type")
        if any(type(v) not in (float, int) for v in [*freq, *scales]):
            raise CalibrationCorruptError("rope", "a frequency or scale is no number")
        try:
            numbers = tuple(float(v) for v in [*freq, *scales])
        except OverflowError as exc:
            raise CalibrationCorruptError("rope", "a number is beyond all bounds") from exc
        return cls(dims, traditional, numbers[:-2], *numbers[-2:])


def combined_fingerprint(specs: Sequence[RopeSpec]) -> bytes:
    """One fingerprint for the layers of a blob, in layer order; empty for none."""
    if not specs:
        return b""
    known = {spec: spec.fingerprint() for spec in set(specs)}
    return blake3(_DOMAIN + b"".join(known[spec] for spec in specs)).digest()


def positions_of(tokens: tuple[int, int]) -> Positions:
    """Positions of a half-open token range, int64 (tokens,)."""
    return np.arange(tokens[0], tokens[1], dtype=np.int64)


def apply(x: FloatArray, spec: RopeSpec, positions: Positions) -> FloatArray:
    """Rotate keys as the model does.

    Args:
        x: (..., tokens, dim) float32, not rotated.
        positions: (tokens,) absolute positions, or (..., tokens) where heads differ.
    Returns: a new array of the same shape.
    Raises: UnsupportedTensorError where ``dim`` is smaller than ``spec.dims``.
    """
    return _rotate(x, spec, positions, inverse=False)


def undo(x: FloatArray, spec: RopeSpec, positions: Positions) -> FloatArray:
    """Inverse of `apply`, to about 1e-6 of the values. Same arguments."""
    return _rotate(x, spec, positions, inverse=True)


def _rotate(x: FloatArray, spec: RopeSpec, positions: Positions, *, inverse: bool) -> FloatArray:
    out = np.empty(x.shape, dtype=np.float32)
    rotate_into(out, x, spec, positions, inverse=inverse)
    return out


def rotate_into(
    out: FloatArray, x: FloatArray, spec: RopeSpec, positions: Positions, *, inverse: bool
) -> None:
    """`apply` or `undo` into ``out``, which may be any view but not one of ``x``."""
    if x.shape[-1] < spec.dims or out.shape != x.shape or not _fits(positions, x):
        raise UnsupportedTensorError(
            "rope", f"shape {x.shape} with {spec.dims} rotated dims at {positions.shape} positions"
        )
    cos, sin = _factors(spec, positions, x.shape[-1], inverse=inverse)
    np.multiply(x, cos, out=out)
    if not spec.dims:
        return
    # Whole heads at a time: numpy is slow on half heads, whose runs are short.
    first, second = _halves(spec)
    partner = np.empty((*x.shape[:-1], spec.dims), dtype=np.float32)
    partner[..., first], partner[..., second] = x[..., second], x[..., first]
    partner *= sin
    out[..., : spec.dims] += partner


def _fits(positions: Positions, x: FloatArray) -> bool:
    return positions.shape in (x.shape[-2:-1], x.shape[:-1])


def _factors(
    spec: RopeSpec, positions: Positions, dim: int, *, inverse: bool
) -> tuple[FloatArray, FloatArray]:
    """(..., tokens, dim) factors of a value itself and (..., tokens, dims) of its partner."""
    # MLX rounds position x frequency to float32; only the same rounding undoes it: in
    # float64 the angle would differ by 6e-8 of itself, 0.02 in a key at position 131072.
    scaled = positions.astype(np.float32) * np.float32(spec.position_scale)
    rounded = scaled[..., None] * np.asarray(spec.inv_freq, dtype=np.float32)
    angles = rounded.astype(np.float64)
    scale = 1.0 / spec.key_scale if inverse else spec.key_scale
    first, second = _halves(spec)
    cos = np.ones((*positions.shape, dim), dtype=np.float32)
    sin = np.empty((*positions.shape, spec.dims), dtype=np.float32)
    cos[..., first] = cos[..., second] = np.cos(angles) * scale
    sin[..., second] = np.sin(angles) * (-scale if inverse else scale)
    sin[..., first] = -sin[..., second]
    return cos, sin


def _halves(spec: RopeSpec) -> tuple[slice, slice]:
    if spec.traditional:
        return slice(0, spec.dims, 2), slice(1, spec.dims, 2)
    half = spec.dims // 2
    return slice(0, half), slice(half, spec.dims)
