"""MLX's own group-wise affine quantization: ``w = scale * level + bias``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    FloatArray,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.packing import pack_levels, packed_size, unpack_levels
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.errors import CorruptBlobError, UnsupportedTensorError
from kvferry.proto.container import SectionData

BITS = (2, 3, 4, 8)
_EPS = np.float32(1e-7)
_HALF = np.finfo(np.float16)
_TOO_LARGE = 1e38  # a level beyond the last one of such a group leaves float32


@dataclass(frozen=True, slots=True)
class AffineCodec(Uncalibrated):
    """Groups of 64 values of a head (32 where the head asks for it) share scale and bias.

    Scales and biases are float16 where they fit without loss that matters, else
    float32. Sections ``<stream>/levels``, ``/scales``, ``/biases``.
    Source: ``mlx.core.quantize``, mode "affine"; levels are packed in its bit order.
    """

    name: ClassVar[str] = "affine"
    version: ClassVar[int] = 1

    bits: int = 8

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``bits``: 2, 3, 4 or 8. Raises: ConfigError."""
        opts.check_names(cls.name, options, ("bits",))
        return cls(opts.whole_number("bits", options.get("bits", 8), BITS))

    @property
    def params(self) -> Mapping[str, object]:
        """``bits``."""
        return {"bits": self.bits}

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for NaN, infinities, and values beyond 1e38."""
        sections = []
        for name, stream in sorted(page.streams.items()):
            values = stream.float32()
            peak = max(float(values.max()), -float(values.min()))
            if not peak < _TOO_LARGE:  # also true of NaN
                raise UnsupportedTensorError(name, "NaN, infinite or beyond 1e38: not stored")
            groups = values.reshape(-1, group_size(stream.data.shape[3]))
            levels, scales, biases = quantize_groups(groups, self.bits)
            parts = {
                "levels": pack_levels(levels, self.bits),
                "scales": scales.tobytes(),
                "biases": biases.tobytes(),
            }
            sections += [SectionData(f"{name}/{p}", data, len(data)) for p, data in parts.items()]
        return Encoded(sections)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError."""
        sec.check_params(wanted, ("bits",))
        bits = sec.integer(wanted, "bits", BITS[0], BITS[-1])
        if bits not in BITS:
            raise CorruptBlobError("codec parameters", f"{bits} bits")
        parts = ("levels", "scales", "biases")
        sec.check_names(sections, (f"{n}/{part}" for n in wanted.shapes for part in parts))
        streams = {
            name: Stream.from_float32(
                name,
                _decode_stream(name, shape, bits, sections, sec.layer_slice(wanted)),
                wanted.dtypes[name],
            )
            for name, shape in wanted.shapes.items()
        }
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)


def group_size(dim: int) -> int:
    """64, or 32, as MLX has them; for odd head sizes the largest divisor up to 64."""
    sizes = (64, 32, *range(63, 0, -1))
    return int(next(size for size in sizes if dim % size == 0))


def quantize_groups(
    groups: FloatArray, bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Levels (n, group) uint8 with scales (n,) and biases (n,) in their stored type.

    The edge farther from zero is exact, and zero is a level wherever it lies inside.
    Groups of one value only are exact.
    """
    steps = np.float32(2**bits - 1)
    low, high = groups.min(axis=1), groups.max(axis=1)
    flat = low == high
    span = np.maximum((high.astype(np.float64) - low) / steps, _EPS).astype(np.float32)
    span[flat] = 1
    falling = np.abs(low) <= np.abs(high)
    scale = np.where(falling, -span, span)
    edge = np.where(falling, high, low)
    zero = np.rint(edge / scale)
    scale = np.where(zero == 0, scale, edge / np.where(zero == 0, 1, zero)).astype(np.float32)
    bias = np.where((zero == 0) & ~flat, 0, edge).astype(np.float32)
    dtype = _parameter_dtype(scale, bias, flat)
    scales, biases = scale.astype(dtype), bias.astype(dtype)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        exact = (groups - biases.astype(np.float32)[:, None]) / scales.astype(np.float32)[:, None]
    np.rint(np.nan_to_num(exact, copy=False), out=exact)
    return np.clip(exact, 0, steps).astype(np.uint8), scales, biases


def _parameter_dtype(
    scale: FloatArray, bias: FloatArray, flat: npt.NDArray[np.bool_]
) -> np.dtype[np.floating]:
    """float16 unless a value overflows, a scale in use lies among its subnormals, or the
    one value of a flat group would be rounded."""
    large = max(float(np.abs(scale).max()), float(np.abs(bias).max()))
    small = float(np.abs(scale).min(where=~flat, initial=np.inf))
    if not (large < float(_HALF.max) and small >= float(_HALF.smallest_normal)):
        return np.dtype("<f4")
    alone = bias[flat]
    return np.dtype("<f2" if (alone == alone.astype(np.float16)).all() else "<f4")


def _decode_stream(
    name: str,
    shape: tuple[int, int, int, int],
    bits: int,
    sections: Mapping[str, SectionData],
    layers: slice,
) -> FloatArray:
    size = group_size(shape[3])
    grid = (*shape[:3], shape[3] // size)
    count = int(np.prod(grid, dtype=np.int64))
    levels = sections[f"{name}/levels"]
    sec.check_raw(levels, packed_size(count * size, bits))
    scales = _parameters(sections[f"{name}/scales"], count).reshape(grid)[layers]
    biases = _parameters(sections[f"{name}/biases"], count).reshape(grid)[layers]
    if len(levels.data) != levels.raw_length:
        raise CorruptBlobError(f"section {levels.name!r}", "is not as long as its levels")
    level = unpack_levels(levels.data, count * size, bits).reshape(*grid, size)[layers]
    with np.errstate(over="ignore", invalid="ignore"):
        values = level * scales[..., None] + biases[..., None]
    if not np.isfinite(values).all():
        raise CorruptBlobError(f"stream {name!r}", "decodes to NaN or infinite values")
    return values.reshape(level.shape[0], *shape[1:])


def _parameters(section: SectionData, count: int) -> FloatArray:
    width, rest = divmod(len(section.data), count)
    if rest or width not in (2, 4) or section.raw_length != len(section.data):
        raise CorruptBlobError(f"section {section.name!r}", f"does not hold {count:,} numbers")
    values = np.frombuffer(section.data, dtype="<f2" if width == 2 else "<f4")
    return values.astype(np.float32)
