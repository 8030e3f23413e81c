"""The centroid codec: what entries it stores, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from codec_samples import decoded, meta_for, random_calibration, restored, rope_spec
from hostile_samples import damaged, section_lies
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import DType, PageTensors, Stream, takes_whole_context
from kvferry.codec.blob import encode_blob
from kvferry.codec.centroid import CentroidCodec
from kvferry.codec.entropy import pack_bits, unpack_bits
from kvferry.codec.registry import make_codec
from kvferry.codec.rope import apply, undo
from kvferry.errors import CodecError, ConfigError, CorruptBlobError, UnsupportedTensorError
from kvferry.proto import container
from kvferry.proto.container import SectionData

DIM = 16
ROPES = (rope_spec(DIM), rope_spec(DIM, dims=8))


def page_of(
    tokens: tuple[int, int] = (0, 120), dtype: DType = DType.FLOAT32, seed: int = 0
) -> PageTensors:
    """Two layers of two heads whose un-rotated keys lie around a few directions."""
    rng = np.random.default_rng(seed)
    count = tokens[1] - tokens[0]
    middle = rng.standard_normal((2, 2, 6, DIM))
    which = rng.integers(0, 6, (2, 2, count))[..., None]
    plain = np.take_along_axis(middle, which, axis=2) + 0.1 * rng.standard_normal(
        (2, 2, count, DIM)
    )
    keys = np.stack(
        [
            apply(x.astype(np.float32), s, np.arange(*tokens))
            for x, s in zip(plain, ROPES, strict=True)
        ]
    )
    values = (which + 0.1 * rng.standard_normal((2, 2, count, DIM))).astype(np.float32)
    streams = {n: Stream.from_float32(n, x, dtype) for n, x in (("k", keys), ("v", values))}
    return PageTensors((0, 2), (0, 2), tokens, streams)


def codec_of(**options: object) -> CentroidCodec:
    found = make_codec("centroid", {"window": 10, **options})
    assert isinstance(found, CentroidCodec)
    return found.with_ropes(ROPES)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("tokens", [(0, 120), (2, 90), (256, 512)])
def test_tokens_left_alone_are_exact_and_entries_near_what_they_stand_for(
    dtype: DType, tokens: tuple[int, int]
) -> None:
    page = page_of(tokens, dtype)
    found = restored(codec_of(similarity=0.9), page)
    kept = found.kept
    assert kept is not None
    assert not kept.contiguous
    assert kept.weights is not None
    count = tokens[1] - tokens[0]
    assert found.entries < count / 3
    assert (kept.weights.sum(axis=2) == count).all()
    first = max(0, 4 - tokens[0])
    for name, stream in page.streams.items():
        exact = stream.data.astype(np.float16) if dtype is DType.FLOAT32 else stream.data
        got = found.streams[name].data
        assert (got[:, :, :first] == exact[:, :, :first]).all()
        for layer, head in np.ndindex(2, 2):
            alone = int((kept.weights[layer, head] > 0).sum())
            recent = slice(alone - 10, alone)
            assert (kept.weights[layer, head, recent] == 1).all()
            assert (got[layer, head, recent] == exact[layer, head, -10:]).all()
            assert not got[layer, head, alone:].any()


def test_an_entry_is_the_mean_of_unrotated_keys_at_the_mean_position() -> None:
    page = page_of((0, 60))
    page.streams["k"].data[:] = np.stack(
        [apply(np.ones((2, 60, DIM), np.float32), s, np.arange(60)) for s in ROPES]
    )
    page.streams["v"].data[:] = np.arange(60, dtype=np.float32)[:, None]
    found = restored(codec_of(similarity=0.9), page)
    assert found.kept is not None
    assert found.kept.weights is not None
    assert found.kept.weights[0, 0].tolist() == [1] * 4 + [46] + [1] * 10
    assert found.kept.positions[1, 1, 4] == 26  # of 4 to 49, 26.5 rounded to even
    for layer, spec in enumerate(ROPES):
        key = found.streams["k"].float32()[layer, :, 4:5]
        np.testing.assert_allclose(undo(key, spec, np.array([26])), 1, atol=2e-3)
    np.testing.assert_allclose(found.streams["v"].float32()[:, :, 4], 26.5)


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.sampled_from([1, 1.5, 4, 16, 100]),
    tokens=st.tuples(st.sampled_from([0, 3, 256]), st.integers(1, 150)),
    dtype=st.sampled_from(list(DType)),
    more=st.sampled_from([{}, {"persistence": 1, "flush": 9}, {"min_merge": 3}, {"window": 0}]),
)
def test_any_ratio_and_length_makes_a_page(
    ratio: float, tokens: tuple[int, int], dtype: DType, more: dict[str, int]
) -> None:
    page = page_of((tokens[0], sum(tokens)), dtype)
    codec = codec_of(ratio=ratio, **more)
    found = restored(codec, page)
    assert found.kept is not None
    assert found.kept.weights is not None
    assert (found.kept.weights.sum(axis=2) == tokens[1]).all()
    if not more:
        assert found.entries <= max(1, round(tokens[1] / ratio))
    cut = decoded(*encode_blob(codec, page, meta_for())[::-1], page.tokens, cut=(1, 2))
    assert (cut.streams["k"].data == found.streams["k"].data[1:]).all()
    assert cut.kept is not None
    assert (cut.kept.positions == found.kept.positions[1:]).all()


def test_options_and_what_they_say() -> None:
    codec = make_codec("centroid", {"ratio": "8", "flush": "32", "persistence": "0"})
    assert codec.params == {
        "ratio": 8.0, "flush": 32, "persistence": 0, "window": 32, "init_preserve": 4,
        "min_merge": 2,
    }  # fmt: skip
    assert make_codec("centroid", {"similarity": 0.8}).params["similarity"] == 0.8
    assert takes_whole_context(codec)
    calibration = random_calibration(dim=DIM, rope=ROPES[0])
    told = make_codec("centroid", {}, calibration)
    assert isinstance(told, CentroidCodec)
    assert told.ropes == (ROPES[0], ROPES[0])
    for wrong in (
        {"ratio": 0.5}, {"similarity": 2}, {"ratio": 4, "similarity": 0.9}, {"flush": 0},
        {"flush": 4096}, {"window": "wide"}, {"seed": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make_codec("centroid", wrong)


def test_what_cannot_be_merged_is_refused() -> None:
    page, codec = page_of(), codec_of()
    with pytest.raises(UnsupportedTensorError, match="rotated"):
        dataclasses.replace(codec, ropes=()).encode(page)
    with pytest.raises(UnsupportedTensorError, match="rotated"):
        codec.with_ropes(ROPES[:1]).encode(page)
    with pytest.raises(UnsupportedTensorError, match="lacks tokens"):
        codec.encode(page.take(np.arange(0, 120, 2)))
    latent = Stream("latent", page.streams["k"].data, DType.FLOAT32)
    with pytest.raises(UnsupportedTensorError, match="latent"):
        codec.encode(PageTensors((0, 2), (0, 2), (0, 120), {"latent": latent}))
    for name in ("k", "v"):
        bad = page_of()
        bad.streams[name].data[1, 0, 50, 3] = np.inf
        with pytest.raises(UnsupportedTensorError, match=f"'{name}'"):
            codec.encode(bad)


def test_damage_and_lies_are_told() -> None:
    page = page_of((0, 30), DType.FLOAT16)
    key, data = encode_blob(codec_of(ratio=3), page, meta_for())
    decoded(data, key, page.tokens)
    for bad in damaged(data, 1):
        with pytest.raises(CodecError):
            decoded(bad, key, page.tokens)
    for lie in section_lies(data):
        with pytest.raises(CorruptBlobError):
            decoded(lie, key, page.tokens)


@pytest.mark.parametrize(
    ("section", "index", "value", "says"),
    [
        ("kept/positions", -1, 30, "within"),  # the first token after the range
        ("kept/positions", -1, (1 << 32) - 1, "within"),
        ("kept/positions", 0, 29, "rise"),
        ("kept/weights", 0, np.nan, "no number"),
        ("kept/weights", 0, np.inf, "add up"),
        ("kept/weights", 0, -1, "below 0"),
        ("kept/weights", 0, 1e9, "add up"),
        ("kept/weights", slice(None), 0, "add up"),
    ],
)
def test_counts_and_positions_that_cannot_be_are_refused(
    section: str, index: int | slice, value: float, says: str
) -> None:
    """Behind good checksums, in the one head of a blob."""
    page = page_of((0, 30), DType.FLOAT16).cut_layers((0, 1)).cut_heads((0, 1))
    codec = make_codec("centroid", {"window": 4, "ratio": 3})
    assert isinstance(codec, CentroidCodec)
    key, data = encode_blob(codec.with_ropes(ROPES[:1]), page, meta_for())
    blob = container.parse(data)
    count = blob.header.streams[0].shape[2]
    kind = np.dtype("<u4" if section == "kept/positions" else "<f4")
    found = unpack_bits(blob.sections[section].data, (count,), kind, section).copy()
    found[index] = value
    forged = SectionData(section, pack_bits(found), found.nbytes)
    sections = [forged if s.name == section else s for s in blob.sections.values()]
    with pytest.raises(CorruptBlobError, match=says):
        decoded(container.pack(blob.header, sections), key, page.tokens)
