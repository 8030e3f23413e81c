"""The bytes of a stream's levels, shifts and scales, before and after DEFLATE."""

import zlib

import numpy as np

from kvferry.codec.entropy import pack_bits, unpack_bits
from kvferry.codec.kvtc_plan import BitPlan
from kvferry.codec.kvtc_quantize import WIDTHS, HalfArray, Quantized
from kvferry.codec.packing import Levels, pack_levels, packed_size, unpack_levels
from kvferry.errors import CorruptBlobError

ENTROPIES = ("zlib", "zstd")
_ZLIB_LEVEL = 6
_HALF_BYTES = 2


def pack(q: Quantized, entropy: str) -> bytes:
    """``entropy`` "zlib" or "zstd"."""
    parts = [_planes(q.shift), _planes(q.scale)]
    parts += [pack_levels(q.levels[bits], bits) for bits in WIDTHS if bits in q.levels]
    raw = b"".join(parts)
    if entropy == "zstd":
        return pack_bits(np.frombuffer(raw, dtype=np.uint8))
    return zlib.compress(raw, _ZLIB_LEVEL)


def raw_size(plan: BitPlan, tokens: int) -> int:
    """Bytes before DEFLATE of so many tokens."""
    levels = sum(packed_size(tokens * count, bits) for bits, count in _components(plan).items())
    return 2 * _HALF_BYTES * tokens * len(plan.stored) + levels


def unpack(
    data: bytes | memoryview, plan: BitPlan, tokens: int, entropy: str, field: str
) -> Quantized:
    """Inverse of `pack`. ``field``: what to name in errors.

    Raises: CorruptBlobError. Nothing beyond `raw_size` is inflated.
    """
    size = raw_size(plan, tokens)
    raw = _inflate(data, size, entropy, field)
    groups = len(plan.stored)
    half = _HALF_BYTES * tokens * groups
    shift, scale = (_halves(raw[at : at + half], groups, tokens) for at in (0, half))
    levels: dict[int, Levels] = {}
    at = 2 * half
    for bits, count in _components(plan).items():
        end = at + packed_size(tokens * count, bits)
        levels[bits] = unpack_levels(raw[at:end], tokens * count, bits).reshape(count, tokens)
        at = end
    return Quantized(shift, scale, levels)


def _components(plan: BitPlan) -> dict[int, int]:
    """Bits -> components that have so many, in the order of the levels."""
    counts = {bits: sum(g.size for g in plan.stored if g.bits == bits) for bits in WIDTHS}
    return {bits: count for bits, count in counts.items() if count}


def _inflate(data: bytes | memoryview, size: int, entropy: str, field: str) -> bytes:
    if entropy == "zstd":
        return unpack_bits(data, (size,), np.dtype(np.uint8), field).tobytes()
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, size + 1)
    except zlib.error as exc:
        raise CorruptBlobError(field, "DEFLATE stream does not decode") from exc
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise CorruptBlobError(field, f"inflates to another size than {size:,} bytes")
    return raw


def _planes(values: HalfArray) -> bytes:
    """Low bytes of all, then high bytes: the latter hardly differ."""
    raw = np.ascontiguousarray(values, dtype="<f2").reshape(-1).view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, _HALF_BYTES).T).tobytes()


def _halves(raw: bytes, groups: int, tokens: int) -> HalfArray:
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(_HALF_BYTES, -1)
    found: HalfArray = np.ascontiguousarray(planes.T).view("<f2").reshape(groups, tokens)
    return found
