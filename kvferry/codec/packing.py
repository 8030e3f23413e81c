"""Small unsigned integers side by side, lowest bits first (MLX's order)."""

import numpy as np
import numpy.typing as npt

Levels = npt.NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_levels(levels: Levels, bits: int) -> bytes:
    """Numbers below 2**bits, any shape, as a little-endian bit stream; 1 to 8 bits."""
    flat = np.ascontiguousarray(levels).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    if bits in (2, 4):
        per_byte = 8 // bits
        padded = np.zeros(-(-flat.size // per_byte) * per_byte, dtype=np.uint8)
        padded[: flat.size] = flat
        out = padded[::per_byte].copy()
        for place in range(1, per_byte):
            out |= padded[place::per_byte] << np.uint8(bits * place)
        return out.tobytes()
    if bits == 6:
        return _pack_sixes(flat)
    planes = np.unpackbits(flat[:, None], axis=1, bitorder="little", count=bits)
    return np.packbits(planes, bitorder="little").tobytes()


def unpack_levels(data: bytes | memoryview, count: int, bits: int) -> Levels:
    """Inverse of `pack_levels`: (count,). ``data`` has `packed_size` bytes."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if bits == 8:
        return raw
    if bits in (2, 4):
        per_byte = 8 // bits
        out = np.empty((raw.size, per_byte), dtype=np.uint8)
        for place in range(per_byte):
            np.right_shift(raw, bits * place, out=out[:, place])
        out &= np.uint8(2**bits - 1)
        return out.reshape(-1)[:count]
    if bits == 6:
        return _unpack_sixes(raw, count)
    planes = np.unpackbits(raw, bitorder="little", count=count * bits).reshape(count, bits)
    return np.packbits(planes, axis=1, bitorder="little").reshape(-1)


def _pack_sixes(flat: Levels) -> bytes:
    """Four values in three bytes."""
    four = np.zeros((-(-flat.size // 4), 4), dtype=np.uint8)
    four.reshape(-1)[: flat.size] = flat
    out = np.empty((len(four), 3), dtype=np.uint8)
    for place in range(3):  # the high bits of one value beside the low bits of the next
        shift = 2 * place
        out[:, place] = (four[:, place] >> shift) | (four[:, place + 1] << (6 - shift))
    return out.tobytes()[: packed_size(flat.size, 6)]


def _unpack_sixes(raw: Levels, count: int) -> Levels:
    three = raw.reshape(-1, 3) if raw.size % 3 == 0 else _padded_threes(raw)
    out = np.empty((len(three), 4), dtype=np.uint8)
    out[:, 0] = three[:, 0]
    out[:, 1] = (three[:, 0] >> 6) | (three[:, 1] << 2)
    out[:, 2] = (three[:, 1] >> 4) | (three[:, 2] << 4)
    out[:, 3] = three[:, 2] >> 2
    out &= np.uint8(63)
    return out.reshape(-1)[:count]


def _padded_threes(raw: Levels) -> Levels:
    padded = np.zeros((-(-raw.size // 3), 3), dtype=np.uint8)
    padded.reshape(-1)[: raw.size] = raw
    return padded
