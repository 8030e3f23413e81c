"""Every codec over every shape: what comes back, and how close it is."""

import numpy as np
import pytest
from codec_samples import (
    MODEL_ID,
    Calibrations,
    bits,
    meta_for,
    page_of,
    random_calibration,
    random_page,
    restored,
    rope_spec,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.affine import group_size
from kvferry.codec.base import Codec, DType, PageTensors
from kvferry.codec.blob import StoredBlob, decode_blobs, encode_blob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.registry import make_codec
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import project, rank_at
from kvferry.proto.keys import SINK_TOKENS

ELEMENTS = 1 << 18  # of a stream: keeps the largest case small
ROUNDING = {DType.FLOAT16: 2.0**-11, DType.BFLOAT16: 2.0**-8, DType.FLOAT32: 2.0**-22}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """(heads, dim, tokens): 1 to 64 heads, 32 to 576 dims, 1 to 4096 tokens."""
    heads = draw(st.one_of(st.sampled_from([1, 2, 8, 64]), st.integers(1, 64)))
    dim = draw(
        st.one_of(
            st.sampled_from([32, 64, 80, 96, 128, 192, 576]),
            st.integers(16, 288).map(lambda half: 2 * half),
        )
    )
    most = min(4096, max(1, ELEMENTS // (heads * dim)))
    tokens = draw(st.one_of(st.just(most), st.integers(1, most)))
    first = draw(st.sampled_from([0, 0, 3, 256, 131_072]))
    head = draw(st.sampled_from([0, 5]))
    return (head, head + heads), dim, (first, first + tokens)


def back(codec: Codec, page: PageTensors) -> PageTensors:
    found = restored(codec, page, meta_for(model_heads=128))
    assert (found.layers, found.heads, found.tokens) == (page.layers, page.heads, page.tokens)
    for name, stream in page.streams.items():
        assert found.streams[name].data.shape == stream.data.shape
        assert found.streams[name].dtype is stream.dtype
    return found


@pytest.mark.parametrize("name", ["raw", "zstd"])
@settings(max_examples=20, deadline=None)
@given(shape=shapes(), dtype=st.sampled_from(list(DType)))
def test_exact_codecs_are_exact(
    name: str, shape: tuple[tuple[int, int], int, tuple[int, int]], dtype: DType
) -> None:
    heads, dim, tokens = shape
    page = random_page(layers=(3, 4), heads=heads, tokens=tokens, dim=dim, dtype=dtype)
    assert bits(back(make_codec(name, {}), page)) == bits(page)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(),
    dtype=st.sampled_from(list(DType)),
    level_bits=st.sampled_from([8, 4, 3, 2]),
    offset=st.sampled_from([0.0, 0.5, -20.0]),
)
def test_affine_is_within_half_a_step(
    shape: tuple[tuple[int, int], int, tuple[int, int]],
    dtype: DType,
    level_bits: int,
    offset: float,
) -> None:
    """Of a group's own step; where zero became a level, its far end within one step."""
    heads, dim, tokens = shape
    page = random_page(layers=(3, 4), heads=heads, tokens=tokens, dim=dim, dtype=DType.FLOAT32)
    page = PageTensors(
        page.layers,
        page.heads,
        page.tokens,
        {
            n: type(s).from_float32(n, s.float32() + np.float32(offset), dtype)
            for n, s in page.streams.items()
        },
    )
    found = back(make_codec("affine", {"bits": level_bits}), page)
    for name, stream in page.streams.items():
        size = group_size(dim)
        exact = stream.float32().reshape(-1, size)
        error = np.abs(found.streams[name].float32().reshape(-1, size) - exact)
        low, high = exact.min(axis=1, keepdims=True), exact.max(axis=1, keepdims=True)
        levels = 2**level_bits - 1
        step = (high - low) / levels * (1 + 1 / levels)
        far = np.where(np.abs(low) <= np.abs(high), low, high)
        allowed = np.where(np.abs(exact - far) < step, step, step / 2)
        # Scale and bias are float16, the answer is rounded to the cache's type.
        largest = np.abs(exact).max(axis=1, keepdims=True)
        slack = (2.0**-10 + ROUNDING[dtype]) * (largest + high - low)
        assert (error <= allowed + slack).all()


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(),
    dtype=st.sampled_from(list(DType)),
    step=st.sampled_from([0.02, 0.3, 1.4]),
    weighted=st.booleans(),
    rotated=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_ferry_is_within_half_a_step_in_its_own_space(
    shape: tuple[tuple[int, int], int, tuple[int, int]],
    dtype: DType,
    step: float,
    weighted: bool,
    rotated: float,
) -> None:
    """Every weighted coefficient, where the rank is not truncated."""
    heads, dim, tokens = shape
    weighted = weighted and (heads[1] - heads[0]) * dim <= 1024
    rope = rope_spec(dim, dims=int(dim * rotated) // 2 * 2)
    known = random_calibration(
        layers=(3, 4), heads=heads, dim=dim, rank=16, weighted=weighted, rope=rope
    )
    codec = FerryCodec(step, known, adapt=0.0)
    page = page_of(known, tokens, dtype)
    found = back(codec, page)
    begin = max(tokens[0], min(SINK_TOKENS, tokens[1]))
    exact = begin - tokens[0]
    for name, stream in page.streams.items():
        sinks = stream.data[:, :, :exact]
        kept = sinks.astype("<f2") if dtype is DType.FLOAT32 else sinks
        assert (found.streams[name].data[:, :, :exact] == kept).all()
    for basis in known.bundles.values():
        assert rank_at(basis.sigma, step) == basis.rank
        if begin == tokens[1]:
            continue
        names = [part.name for part in basis.parts]
        before, after = (page_rows(part, names, known.ropes, begin) for part in (page, found))
        z = project(before, basis.fold, basis.rank)
        difference = np.abs(project(after, basis.fold, basis.rank) - z)
        # Rounding to the cache's type, and a basis whose columns are stored in float16.
        reach = np.linalg.norm(basis.fold.forward.matrix, axis=0)
        rounding = ROUNDING[dtype] * np.linalg.norm(before, axis=1)[:, None] * reach
        slack = 2e-3 * np.linalg.norm(z, axis=1)[:, None] + 1e-4
        assert (difference <= step / 2 + rounding + slack).all()


CODECS = [("raw", {}), ("zstd", {}), ("affine", {"bits": 8}), ("bitpack", {"bits": 8})]
CODECS += [("ferry", {"step": 0.25})]


def codec_for(name: str, options: dict[str, object], known: GroupCalibration) -> Codec:
    return make_codec(name, options, known if name == "ferry" else None)


@pytest.mark.parametrize(("name", "options"), CODECS)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("start", [0, 3, SINK_TOKENS, 100_000])
def test_pages_of_very_few_tokens(
    name: str, options: dict[str, object], dtype: DType, start: int
) -> None:
    """One token, and a sequence that is barely longer than its sinks."""
    known = random_calibration()
    codec = codec_for(name, options, known)
    for tokens in (1, 2, 5, 6, 8, 9, 12):
        page = page_of(known, (start, start + tokens), dtype)
        assert worst_error(back(codec, page), page) < (0.0 if name in "raw zstd" else 2.0) + 1e-9


@pytest.mark.parametrize(("name", "options"), CODECS)
@pytest.mark.parametrize("pages", [[(0, 5000)], [(i, i + 256) for i in range(0, 4608, 256)]])
def test_long_sequences_whole_and_in_pages(
    name: str, options: dict[str, object], pages: list[tuple[int, int]]
) -> None:
    known = random_calibration(layers=(0, 1), heads=(0, 1))
    codec = codec_for(name, options, known)
    whole = page_of(known, (0, pages[-1][1]), DType.FLOAT16)
    blobs = []
    for index, span in enumerate(pages):
        meta = meta_for(page_key=bytes([index + 1]) * 32)
        key, data = encode_blob(codec, whole.cut_tokens(span), meta)
        blobs.append(StoredBlob(data, key, span))
    run = decode_blobs(blobs, model_id=MODEL_ID, cut=None, calibrations=Calibrations(known))
    for span, found in zip(pages, run, strict=True):
        assert isinstance(found, PageTensors)
        assert found.tokens == span
        if name in ("raw", "zstd"):
            assert bits(found) == bits(whole.cut_tokens(span))
        else:
            assert worst_error(found, whole.cut_tokens(span)) < 1.5
