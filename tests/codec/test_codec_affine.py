import numpy as np
import pytest
from codec_samples import decoded, meta_for, random_page
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.affine import AffineCodec, group_size, quantize_groups
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import encode_blob


def restore(page: PageTensors, bits: int) -> tuple[PageTensors, int]:
    key, blob = encode_blob(AffineCodec(bits), page, meta_for("tail"))
    return decoded(blob, key, page.tokens), len(blob)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", list(DType))
def test_error_is_that_of_mlx(bits: int, dtype: DType) -> None:
    mx = pytest.importorskip("mlx.core")
    page = random_page(tokens=(3, 90), dim=64, dtype=dtype)
    back, _ = restore(page, bits)
    for name, stream in page.streams.items():
        exact = stream.float32()
        packed = mx.quantize(mx.array(exact), 64, bits)
        theirs = np.array(mx.dequantize(*packed, 64, bits))
        theirs = Stream.from_float32(name, theirs, dtype).float32()
        mine = back.streams[name].float32()
        # Scales in float16 move the far end of a group by up to a tenth of a level.
        tolerance = {2: 1.001, 3: 1.002, 4: 1.01, 8: 1.15}[bits]
        floor = 2.0**-9 * float(np.abs(exact).max()) if dtype is DType.BFLOAT16 else 2e-4
        assert np.abs(mine - exact).max() <= tolerance * np.abs(theirs - exact).max() + floor
        np.testing.assert_allclose(
            ((mine - exact) ** 2).mean(), ((theirs - exact) ** 2).mean(), rtol=0.05
        )


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    scale=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 60.0, 1e5, 1e30]),
    offset=st.sampled_from([0.0, 1e-3, -50.0, 7e4]),
    seed=st.integers(0, 9),
)
def test_error_is_within_one_level_whatever_the_scale(
    bits: int, scale: float, offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = (rng.standard_normal((20, 32)) * scale + offset).astype(np.float32)
    levels, scales, biases = quantize_groups(groups, bits)
    back = levels * scales.astype(np.float32)[:, None] + biases.astype(np.float32)[:, None]
    span = groups.max(axis=1) - groups.min(axis=1)
    # Scale and bias move to make zero a level, as MLX does it: up to one level of error.
    allowed = span / (2**bits - 1) * 1.01 + 2.0**-11 * np.abs(groups).max(axis=1) + 2e-7
    assert (np.abs(back - groups).max(axis=1) <= allowed).all()


def test_eight_bits_cost_eight_and_a_half() -> None:
    page = random_page(layers=(0, 8), tokens=(0, 256), dim=64, dtype=DType.FLOAT16)
    _, size = restore(page, 8)
    values = page.raw_bytes_fp16 / 2
    assert 8.5 <= 8 * size / values < 8.52


def test_zeros_and_constants_stay_what_they_are() -> None:
    data = np.zeros((1, 1, 3, 64), np.float32)
    data[0, 0, 1] = -3.25
    data[0, 0, 2, ::2] = 1.0
    page = PageTensors((0, 1), (0, 1), (0, 3), {"k": Stream("k", data, DType.FLOAT32)})
    back, _ = restore(page, 8)
    np.testing.assert_array_equal(back.streams["k"].data[:, :, :2], data[:, :, :2])
    np.testing.assert_allclose(back.streams["k"].data, data, atol=2e-5)


def test_groups_follow_the_head() -> None:
    assert [group_size(d) for d in (64, 128, 32, 96, 80, 48, 7)] == [64, 64, 32, 32, 40, 48, 7]
