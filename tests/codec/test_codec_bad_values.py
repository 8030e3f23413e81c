"""NaN, infinities, constants and extremes: exact or refused, never silently another."""

import dataclasses

import numpy as np
import pytest
from codec_samples import (
    MODEL_ID,
    bits,
    page_of,
    random_calibration,
    restored,
    rope_spec,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import Codec, DType, PageTensors, Stream
from kvferry.codec.calibration import GroupAccumulator, GroupCalibration, fit_group
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.registry import make_codec
from kvferry.errors import UnsupportedTensorError
from kvferry.proto.keys import SINK_TOKENS

PATTERNS = {  # dtype -> bits of NaN, negative NaN, infinity, minus infinity
    DType.FLOAT16: (0x7E01, 0xFC01, 0x7C00, 0xFC00),
    DType.BFLOAT16: (0x7FC1, 0xFF81, 0x7F80, 0xFF80),
    DType.FLOAT32: (0x7FC00001, 0xFF800001, 0x7F800000, 0xFF800000),
}
CODECS = [
    ("raw", {}),
    ("zstd", {}),
    *[("affine", {"bits": b}) for b in (8, 4, 3, 2)],
    ("bitpack", {"bits": 6}),
    ("ferry", {"step": 0.3}),
]

WITH_SINKS = ("bitpack", "ferry")


def made(name: str, options: dict[str, object], known: GroupCalibration) -> Codec:
    return make_codec(name, options, known if name == "ferry" else None)


@pytest.mark.parametrize(("name", "options"), CODECS)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("stream", ["k", "v"])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("in_sinks", [True, False])
def test_what_is_no_number_is_kept_exactly_or_refused(
    name: str, options: dict[str, object], dtype: DType, stream: str, tokens: int, in_sinks: bool
) -> None:
    known = random_calibration(layers=(0, 2), dim=32)
    start = 0 if in_sinks else SINK_TOKENS
    at = min(tokens, SINK_TOKENS if in_sinks else tokens) - 1
    codec = made(name, options, known)
    for pattern in PATTERNS[dtype]:
        page = page_of(known, (start, start + tokens), dtype)
        page.streams[stream].data.view(f"<u{dtype.storage.itemsize}")[1, 0, at, 7] = pattern
        assert not np.isfinite(page.streams[stream].float32()).all()
        kept_exactly = name in ("raw", "zstd") or (name in WITH_SINKS and in_sinks)
        if name in WITH_SINKS and dtype is DType.FLOAT32:
            # The other stream's sinks are kept as float16: make them such values.
            for other in page.streams.values():
                sinks = other.data[:, :, :SINK_TOKENS]
                finite = np.isfinite(sinks)
                sinks[finite] = sinks[finite].astype(np.float16)
        if not kept_exactly:
            with pytest.raises(UnsupportedTensorError, match=rf"'(k\+v|{stream})'"):
                codec.encode(page)
            continue
        found = restored(codec, page)
        assert bits(found.cut_tokens((start + at, start + at + 1))) == bits(
            page.cut_tokens((start + at, start + at + 1))
        )


def fitted(constant: np.ndarray, varying: np.ndarray) -> GroupCalibration:
    """A calibration from text in which the ``constant`` columns of k and v never change."""
    seen = GroupAccumulator(
        model_id=MODEL_ID, layers=(0, 1), heads=(0, 2), ropes={"k": [rope_spec(16, dims=0)]}
    )
    seen.add(page_with(constant, varying, (4, 4 + len(varying))))
    return fit_group(seen)


def page_with(
    constant: np.ndarray,
    varying: np.ndarray,
    tokens: tuple[int, int],
    dtype: DType = DType.FLOAT32,
) -> PageTensors:
    """One layer, two heads of 16: the first head varies, the second is constant."""
    data = np.empty((1, 2, len(varying), 16), np.float32)
    data[0, 0], data[0, 1] = varying, constant
    streams = {n: Stream.from_float32(n, data, dtype) for n in "kv"}
    return PageTensors((0, 1), (0, 2), tokens, streams)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(("name", "options"), CODECS)
def test_constant_columns_stay_what_they_are(
    name: str, options: dict[str, object], dtype: DType
) -> None:
    rng = np.random.default_rng(0)
    constant = np.array([0, 1, -3, 40, 1e-3, -0.5, 7, 300, 2, 2, 2, 0, -9, 1, 5, 6], np.float32)
    varying = (rng.standard_normal((300, 16)) @ rng.standard_normal((16, 16))).astype(np.float32)
    known = fitted(constant, varying)
    if name == "ferry":
        options = {"step": 0.01}
    page = page_with(constant, varying[:64], (4, 68), dtype)
    found = restored(made(name, options, known), page)
    for stream in "kv":
        exact, got = page.streams[stream].float32(), found.streams[stream].float32()
        if name in ("raw", "zstd"):
            assert (got == exact).all()
        elif name == "ferry":
            rounding = 2.0**-7 if dtype is DType.BFLOAT16 else 2.0**-10
            assert np.abs(got - exact).max() < 0.1 + rounding * 300
            np.testing.assert_allclose(got[0, 1], exact[0, 1], rtol=2 * rounding, atol=0.02)
        else:  # the same for every token, whatever the group
            assert (got[0, 1] == got[0, 1, :1]).all()


@settings(max_examples=80, deadline=None)
@given(
    value=st.floats(-(2.0**120), 2.0**120, width=32),
    dtype=st.sampled_from(list(DType)),
    bits_=st.sampled_from([8, 4, 3, 2]),
)
def test_affine_gives_back_groups_of_one_value_exactly(
    value: float, dtype: DType, bits_: int
) -> None:
    data = np.full((1, 1, 3, 64), value, np.float32)
    if dtype is DType.FLOAT16:
        data = np.clip(data, -65_504, 65_504)
    data[0, 0, 1] = np.random.default_rng(0).standard_normal(64)
    page = PageTensors((0, 1), (0, 1), (0, 3), {"k": Stream.from_float32("k", data, dtype)})
    found = restored(make_codec("affine", {"bits": bits_}), page)
    got, exact = found.streams["k"].float32(), page.streams["k"].float32()
    assert (got[:, :, ::2] == exact[:, :, ::2]).all()


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(-65_504, 65_504, width=16),
    high=st.floats(-65_504, 65_504, width=16),
    bits_=st.sampled_from([8, 4, 3, 2]),
    seed=st.integers(0, 1000),
)
def test_affine_never_turns_large_halves_into_infinity(
    low: float, high: float, bits_: int, seed: int
) -> None:
    share = np.random.default_rng(seed).random((1, 1, 4, 64)).astype(np.float32)
    share[..., 0], share[..., 1] = 0, 1
    data = (low + share * (np.float32(high) - np.float32(low))).astype(np.float16)
    page = PageTensors((0, 1), (0, 1), (0, 4), {"v": Stream("v", data, DType.FLOAT16)})
    found = restored(make_codec("affine", {"bits": bits_}), page)
    step = abs(high - low) / (2**bits_ - 1)
    assert np.isfinite(found.streams["v"].float32()).all()
    assert worst_error(found, page) <= 1.02 * step + 2.0**-9 * max(abs(low), abs(high)) + 1e-6


@pytest.mark.parametrize("value", [1.1e38, -2e38, 3.4e38])
@pytest.mark.parametrize(("name", "options"), CODECS)
def test_what_leaves_float32_on_the_way_is_exact_or_refused(
    name: str, options: dict[str, object], value: float
) -> None:
    known = random_calibration()
    for stream in ("k", "v"):
        page = page_of(known, (4, 40))
        page.streams[stream].data[0, 1, 9, 3] = value
        codec = made(name, options, known)
        if name in ("raw", "zstd"):
            assert bits(restored(codec, page)) == bits(page)
        else:
            with pytest.raises(UnsupportedTensorError):
                codec.encode(page)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_ferry_sees_nan_also_where_its_basis_does_not_look(bad: float, tokens: int) -> None:
    """A column that was constant in calibration has no weight in any coefficient."""
    known = random_calibration()
    bundles = {}
    for name, bundle in known.bundles.items():
        basis = bundle.basis.copy()
        for rows in bundle.rows.values():
            basis[rows.start + 5] = 0
        bundles[name] = dataclasses.replace(bundle, basis=basis)
    known = dataclasses.replace(known, bundles=bundles)
    for name in ("k", "v"):
        page = page_of(known, (4, 4 + tokens))
        page.streams[name].data[0, 0, tokens - 1, 5] = bad
        with pytest.raises(UnsupportedTensorError, match=r"'k\+v'"):
            FerryCodec(0.5, known).encode(page)
