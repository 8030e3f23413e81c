import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.wrapped import FileCompressor

from kvferry.codec.entropy import pack_bits, pack_columns, unpack_bits, unpack_columns
from kvferry.codec.packing import pack_levels, packed_size, unpack_levels
from kvferry.codec.quantize import quantize
from kvferry.errors import CorruptBlobError, UnsupportedTensorError


def ones(tokens: int) -> np.ndarray:
    """Every token's step."""
    return np.ones(tokens, dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 300), seed=st.integers(0, 99))
def test_levels_round_trip_at_their_size(bits: int, count: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = pack_levels(levels, bits)
    assert len(packed) == packed_size(count, bits)
    np.testing.assert_array_equal(unpack_levels(packed, count, bits), levels)


def test_levels_are_packed_in_mlx_order() -> None:
    mx = pytest.importorskip("mlx.core")
    x = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    for width in (2, 3, 4, 8):
        packed, scales, biases = (np.array(a) for a in mx.quantize(mx.array(x), 64, width))
        levels = np.rint((x.reshape(4, 1, 64) - biases[..., None]) / scales[..., None])
        levels = levels.clip(0, 2**width - 1).astype(np.uint8)
        assert pack_levels(levels, width) == packed.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 300),
    columns=st.integers(1, 200),
    spread=st.sampled_from([0.0, 0.3, 30.0, 9000.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_columns_round_trip(tokens: int, columns: int, spread: float, seed: int) -> None:
    z = np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)
    q = quantize(z * np.float32(spread), ones(len(z)), "k")
    packed = pack_columns(q)
    assert packed == pack_columns(q.copy())
    out = np.full((tokens, columns + 1), 9.0, dtype=np.float32)
    unpack_columns(packed, q.itemsize, 0.5, out[:, 1:], "k/q")
    np.testing.assert_array_equal(out[:, 1:], q * np.float32(0.5))
    assert (out[:, 0] == 9.0).all()


def test_coefficients_beyond_int16_are_kept() -> None:
    z = np.array([[40_000.0, -1.0], [0.4, 2.6]], dtype=np.float32)
    q = quantize(z, ones(len(z)), "k")
    assert q.dtype == np.int32
    assert q.tolist() == [[40_000, -1], [0, 3]]
    assert quantize(np.array([[32_767.0, -32_767.0]], np.float32), ones(1), "k").dtype == np.int16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e12])
def test_what_cannot_be_a_level_is_refused(bad: float) -> None:
    with pytest.raises(UnsupportedTensorError, match="not stored"):
        quantize(np.array([[0.0, bad]], dtype=np.float32), ones(1), "k")


def test_damaged_columns_are_refused_and_shorter_ones_too() -> None:
    q = np.random.default_rng(0).integers(-20, 20, (50, 70)).astype(np.int16)
    packed = pack_columns(q)
    out = np.empty((50, 70), np.float32)
    for cut in range(len(packed)):
        with pytest.raises(CorruptBlobError):
            unpack_columns(packed[:cut], 2, 1.0, out, "k/q")
    with pytest.raises(CorruptBlobError):
        unpack_columns(packed + b"\0", 2, 1.0, out, "k/q")
    for shape in ((49, 70), (51, 70), (50, 64), (50, 129)):
        with pytest.raises(CorruptBlobError):
            unpack_columns(packed, 2, 1.0, np.empty(shape, np.float32), "k/q")
    with pytest.raises(CorruptBlobError):
        unpack_columns(packed, 4, 1.0, out, "k/q")
    with pytest.raises(CorruptBlobError):
        unpack_columns(packed, 8, 1.0, out, "k/q")


def framed(block: bytes) -> bytes:
    """One block as `pack_columns` would frame it."""
    return FileCompressor().write_header() + len(block).to_bytes(4, "little") + block


def test_blocks_that_ferry_does_not_write_are_refused() -> None:
    q = (np.arange(1024) % 77 * 7).astype(np.int16)
    out = np.empty((16, 64), np.float32)

    def block(mode: ModeSpec, delta: DeltaSpec) -> bytes:
        config = ChunkConfig(mode_spec=mode, delta_spec=delta)
        chunk = FileCompressor().chunk_compressor(q, config)
        return bytes(chunk.write_meta() + chunk.write_page(0))

    plain = block(ModeSpec.classic(), DeltaSpec.no_op())
    unpack_columns(framed(plain), 2, 1.0, out, "k/q")
    np.testing.assert_array_equal(out.reshape(-1), q)
    for bad in (
        b"",
        plain + b"\0",
        block(ModeSpec.classic(), DeltaSpec.try_lookback()),
        block(ModeSpec.classic(), DeltaSpec.try_consecutive(2)),
        block(ModeSpec.try_int_mult(7), DeltaSpec.no_op()),
        block(ModeSpec.try_dict(), DeltaSpec.no_op()),
    ):
        with pytest.raises(CorruptBlobError):
            unpack_columns(framed(bad), 2, 1.0, out, "k/q")


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 500), dtype=st.sampled_from(["<f2", "<u2", "<f4"]), seed=st.integers(0, 9)
)
def test_bits_round_trip(count: int, dtype: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, 4 * count, dtype=np.uint8).tobytes()
    data = np.frombuffer(raw, dtype=dtype)[:count]
    back = unpack_bits(pack_bits(data), (count,), np.dtype(dtype), "k/zstd")
    assert back.tobytes() == data.tobytes()


def test_frames_that_claim_another_size_are_refused() -> None:
    packed = pack_bits(np.zeros(1000, "<f4"))
    dtype = np.dtype("<f4")
    for shape in ((999,), (1001,), (1,)):
        with pytest.raises(CorruptBlobError):
            unpack_bits(packed, shape, dtype, "k/zstd")
    for bad in (b"", b"junk", packed[:-1], packed + b"x", packed + packed):
        with pytest.raises(CorruptBlobError):
            unpack_bits(bad, (1000,), dtype, "k/zstd")


def test_a_frame_of_a_terabyte_takes_no_memory() -> None:
    # Single segment, 8-byte content size, no checksum: RFC 8878, 3.1.1.
    frame = bytes.fromhex("28b52ffd") + bytes([0b11100000]) + (1 << 40).to_bytes(8, "little")
    frame += bytes([0x03, 0x00, 0x00])
    with pytest.raises(CorruptBlobError):
        unpack_bits(frame, (1000,), np.dtype("<f4"), "k/zstd")
