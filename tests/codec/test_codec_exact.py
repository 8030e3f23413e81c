"""What holds for every codec, and what the exact ones promise on top."""

import numpy as np
import pytest
from codec_samples import (
    bits,
    decoded,
    meta_for,
    page_of,
    random_calibration,
    random_page,
    restored,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import encode_blob
from kvferry.codec.registry import make_codec
from kvferry.errors import UnsupportedTensorError

EXACT = [("raw", {}), ("zstd", {}), ("zstd", {"level": 19})]
CODECS = [*EXACT, *[("affine", {"bits": b}) for b in (8, 4, 3, 2)], ("ferry", {"step": 0.5})]


def through(
    name: str, options: dict[str, object], page: PageTensors, cut: tuple[int, int] | None = None
) -> PageTensors:
    """Encode, frame, check, decode."""
    known = random_calibration(
        layers=page.layers, heads=page.heads, dim=page.streams["k"].data.shape[3]
    )
    codec = make_codec(name, options, known if name == "ferry" else None)
    key, data = encode_blob(codec, page, meta_for())
    again = encode_blob(codec, page, meta_for())
    assert again == (key, data)
    return decoded(data, key, page.tokens, known, cut=cut)


def spans(
    starts: st.SearchStrategy[int], lengths: st.SearchStrategy[int]
) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(starts, lengths).map(lambda t: (t[0], t[0] + t[1]))


shapes = st.fixed_dictionaries(
    {
        "layers": st.tuples(st.integers(0, 9), st.integers(1, 2)).map(
            lambda t: (t[0], t[0] + t[1])
        ),
        "heads": st.tuples(st.integers(0, 3), st.integers(1, 8)).map(lambda t: (t[0], t[0] + t[1])),
        "tokens": st.tuples(st.sampled_from([0, 2, 256]), st.integers(1, 600)).map(
            lambda t: (t[0], t[0] + t[1])
        ),
        "dim": st.sampled_from([32, 48, 64, 80, 96, 128]),
        "dtype": st.sampled_from(list(DType)),
        "seed": st.integers(0, 5),
    }
)


@pytest.mark.parametrize(("name", "options"), CODECS)
@settings(max_examples=8, deadline=None)
@given(shape=shapes)
def test_every_codec_keeps_shape_dtype_and_ranges(
    name: str, options: dict[str, object], shape: dict[str, object]
) -> None:
    page = random_page(**shape)  # type: ignore[arg-type]
    back = through(name, options, page)
    assert (back.layers, back.heads, back.tokens) == (page.layers, page.heads, page.tokens)
    for stream, found in back.streams.items():
        assert found.data.shape == page.streams[stream].data.shape
        assert found.dtype is page.streams[stream].dtype
    if name in ("raw", "zstd"):
        assert bits(back) == bits(page)


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_cut_reader_gets_the_same_numbers_as_a_whole_one(
    name: str, options: dict[str, object]
) -> None:
    page = page_of(random_calibration(layers=(10, 14)), tokens=(0, 70))
    whole = through(name, options, page)
    for cut in ((10, 11), (11, 13), (13, 14), (10, 14)):
        part = through(name, options, page, cut)
        assert part.layers == cut
        assert worst_error(part, whole.cut_layers(cut)) < 1e-5


@pytest.mark.parametrize(("name", "options"), EXACT)
@pytest.mark.parametrize("dtype", list(DType))
def test_exact_codecs_keep_every_bit_pattern(
    name: str, options: dict[str, object], dtype: DType
) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 2 * 1 * 70 * 32 * 4, dtype=np.uint8)
    data = raw.view(dtype.storage)[: 2 * 70 * 32].reshape(2, 1, 70, 32)  # NaN, inf, subnormals
    page = PageTensors((0, 2), (0, 1), (5, 75), {"k": Stream("k", data, dtype)})
    back = restored(make_codec(name, options), page)
    assert bits(back) == bits(page)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "options"), CODECS[len(EXACT) :])
def test_lossy_codecs_never_store_nan_or_infinity_wrongly(
    name: str, options: dict[str, object], bad: float
) -> None:
    page = random_page(tokens=(100, 140))
    page.streams["k"].data[1, 1, 30, 5] = bad
    with pytest.raises(UnsupportedTensorError):
        through(name, options, page)


def test_replicated_streams_keep_their_single_head() -> None:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((2, 1, 9, 96), dtype=np.float32)
    page = PageTensors((0, 2), (0, 4), (0, 9), {"latent": Stream("latent", latent, DType.FLOAT32)})
    for name, options in CODECS[:-1]:
        key, blob = encode_blob(make_codec(name, options), page, meta_for())
        back = decoded(blob, key, (0, 9), cut=(1, 2))
        assert back.streams["latent"].data.shape == (1, 1, 9, 96)
    assert page.cut_heads((1, 3)).streams["latent"].data.shape == (2, 1, 9, 96)


@pytest.mark.parametrize("dtype", list(DType))
def test_rounding_to_the_cache_type_is_to_nearest(dtype: DType) -> None:
    values = np.random.default_rng(1).standard_normal((1, 1, 64, 64), dtype=np.float32)
    values[0, 0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    stream = Stream.from_float32("k", values, dtype)
    again = Stream.from_float32("k", stream.float32(), dtype)
    assert again.data.tobytes() == stream.data.tobytes()
    found = stream.float32()[0, 0]
    assert np.isnan(found[0, 0])
    assert found[0, 1:3].tolist() == [np.inf, -np.inf]
    relative = {DType.FLOAT16: 2.0**-11, DType.BFLOAT16: 2.0**-8, DType.FLOAT32: 0.0}[dtype]
    finite = values[0, 0, 1:]
    assert (np.abs(found[1:] - finite) <= np.abs(finite) * relative + 1e-7).all()


def test_ranges_that_cannot_be_are_refused() -> None:
    page = random_page(layers=(4, 6), tokens=(10, 20))
    for cut in ((3, 5), (5, 7), (5, 5)):
        with pytest.raises(UnsupportedTensorError):
            page.cut_layers(cut)
    assert page.cut_tokens((12, 15)).streams["v"].data.shape[2] == 3
    with pytest.raises(UnsupportedTensorError):
        PageTensors((4, 7), (0, 2), (10, 20), page.streams)
    with pytest.raises(UnsupportedTensorError):
        PageTensors((4, 6), (0, 3), (10, 20), page.streams)
    with pytest.raises(UnsupportedTensorError):
        PageTensors((4, 6), (0, 2), (10, 21), page.streams)
