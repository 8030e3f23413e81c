"""Low rank per head: what is coded, what stays exact, what is refused, and what it saves."""

from dataclasses import replace

import numpy as np
import pytest
from codec_samples import (
    Calibrations,
    decoded,
    meta_for,
    random_calibration,
    random_page,
    rope_spec,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_samples import low_page, lowrank_calibration

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import decode_blob, encode_blob
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.lowrank import LowRankCodec
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.codec.lowrank_options import POLICIES, LowRankOptions, parse_spans, warning
from kvferry.codec.registry import make_codec, reader
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
    IdentityMismatchError,
    UnsupportedTensorError,
)
from kvferry.proto import container
from kvferry.proto.keys import SINK_TOKENS

DIM, INNER = 16, 6
KNOWN = lowrank_calibration(dim=DIM, inner=INNER)
NEAR = {DType.FLOAT16: 0.03, DType.BFLOAT16: 0.15, DType.FLOAT32: 0.02}


def made(known: LowRankCalibration = KNOWN, **options: object) -> LowRankCodec:
    codec = make_codec("lowrank", options, known)
    assert isinstance(codec, LowRankCodec)
    return codec


def restore(
    codec: LowRankCodec, page: PageTensors, cut: tuple[int, int] | None = None
) -> tuple[PageTensors, int]:
    """What a reader gets that has nothing but the blob and the calibration's; and bytes."""
    assert codec.calibration is not None
    stored = group_from_blob(codec.calibration.to_blob()[1])
    key, data = encode_blob(codec, page, meta_for())
    return decoded(data, key, page.tokens, stored, cut=cut), len(data)


def halved(stream: Stream) -> np.ndarray:
    """What exact means: bit for bit, float32 as float16."""
    kept = stream.data.astype("<f2") if stream.dtype is DType.FLOAT32 else stream.data
    return kept.astype(stream.data.dtype)


def test_it_is_registered_and_named() -> None:
    codec = reader("lowrank", 1)
    assert isinstance(codec, LowRankCodec)
    with pytest.raises(CalibrationMissingError):
        _ = codec.calibration_id


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    dim=st.sampled_from([8, 16, 20]),
    tokens=st.integers(1, 60),
    start=st.sampled_from([0, 1, SINK_TOKENS, 256, 100_000]),
    dtype=st.sampled_from(list(DType)),
    target=st.sampled_from(["v", "k", "kv"]),
    bits=st.sampled_from([8, 16]),
    identity=st.sampled_from(["", "1", "0-2", "5"]),
)
def test_heads_of_low_rank_come_back_and_the_rest_is_exact(
    heads: int,
    dim: int,
    tokens: int,
    start: int,
    dtype: DType,
    target: str,
    bits: int,
    identity: str,
) -> None:
    shape: dict[str, object] = {"heads": (0, heads), "dim": dim}
    known = lowrank_calibration(**shape)  # type: ignore[arg-type]
    span = (start, start + tokens)
    page = low_page(tokens=span, dtype=dtype, **shape)  # type: ignore[arg-type]
    options: dict[str, object] = {"rank": 6, "target": target, "bits": bits}
    codec = made(known, **options, **({"identity": identity} if identity else {}))
    back, _ = restore(codec, page)
    assert (back.layers, back.heads, back.tokens) == (page.layers, page.heads, page.tokens)
    exact_layers = [n for n in range(2) if identity in (str(n), "0-2")]
    sinks = max(0, min(SINK_TOKENS, span[1]) - start)
    for name, stream in page.streams.items():
        found = back.streams[name]
        assert found.dtype is stream.dtype
        wanted = halved(stream)
        if name not in target:
            assert (found.data == wanted).all()
            continue
        assert (found.data[exact_layers] == wanted[exact_layers]).all()
        assert (found.data[:, :, :sinks] == wanted[:, :, :sinks]).all()
        error = np.abs(found.float32() - stream.float32()).max()
        size = np.abs(stream.float32()).max()
        allowed = NEAR[dtype] if bits == 16 else 0.1 + NEAR[dtype]
        assert error <= allowed * max(1.0, float(size) / 8)


def test_fewer_directions_and_bits_take_fewer_bytes_and_more_error() -> None:
    page = random_page(dim=DIM, tokens=(256, 512), dtype=DType.FLOAT16)
    sizes, errors = [], []
    for options in ({"rank": 16}, {"rank": 12}, {"rank": 8}, {"rank": 8, "bits": 8}, {"rank": 4}):
        back, size = restore(made(**options), page)
        errors.append(worst_error(back, page))
        sizes.append(size)
    assert errors[:3] == sorted(errors[:3])
    assert errors[0] < 0.01
    assert sizes[:4] == sorted(sizes[:4], reverse=True)
    # V is half of what there is; 8 of 16 directions at 16 bits leave three quarters.
    assert page.raw_bytes_fp16 / sizes[2] == pytest.approx(4 / 3, rel=0.15)


def test_int8_has_a_scale_for_each_direction_of_a_page() -> None:
    """Weak directions are not lost beside strong ones."""
    page = low_page(tokens=(256, 512))
    strong, weak = (
        {n: Stream(n, s.data * np.float32(f), s.dtype) for n, s in page.streams.items()}
        for f in (1.0, 1e-3)
    )
    for streams in (strong, weak):
        given = PageTensors(page.layers, page.heads, page.tokens, streams)
        seen = HeadAccumulator.like(KNOWN)
        seen.add(given)
        back, _ = restore(made(seen.finish("x"), rank=INNER, bits=8), given)
        v = given.streams["v"].data
        assert np.abs(back.streams["v"].data - v).max() < 0.02 * np.abs(v).max()


@pytest.mark.parametrize("cut", [(0, 1), (1, 3), (2, 3), (0, 3)])
@pytest.mark.parametrize("identity", ["0", "1", "2", "0-2", "0,2"])
def test_some_layers_of_a_blob_are_those_of_the_whole(cut: tuple[int, int], identity: str) -> None:
    known = lowrank_calibration(layers=(0, 3))
    page = low_page(layers=(0, 3), tokens=(2, 40), dtype=DType.FLOAT16)
    codec = made(known, rank=5, target="kv", bits=8, identity=identity)
    whole, part = restore(codec, page)[0], restore(codec, page, cut)[0]
    assert part.layers == cut
    for name, stream in whole.cut_layers(cut).streams.items():
        assert (part.streams[name].data == stream.data).all()


def test_a_cut_calibration_codes_its_part_the_same() -> None:
    known = lowrank_calibration(layers=(0, 3), heads=(0, 4))
    part = known.cut((1, 3), (2, 4))
    assert part.parent == known.id
    assert part.id == group_from_blob(known.to_blob()[1]).cut((1, 3), (2, 4)).id
    assert known.cut(known.layers, known.heads) is known
    page = low_page(layers=(0, 3), heads=(0, 4), tokens=(0, 64), dtype=DType.FLOAT16)
    mine = page.cut_layers((1, 3)).cut_heads((2, 4))
    back, _ = restore(made(part, rank=6), mine)
    whole, _ = restore(made(known, rank=6), page)
    for name, stream in whole.cut_layers((1, 3)).cut_heads((2, 4)).streams.items():
        assert (back.streams[name].data == stream.data).all()
    with pytest.raises(ConfigError, match="within"):
        known.cut((2, 4), (0, 4))


def test_keys_are_unrotated_before_they_are_projected() -> None:
    """Rotated keys span all directions; unrotated, those of the model."""
    page = low_page(tokens=(256, 512))
    back, _ = restore(made(rank=INNER, target="k"), page)
    assert worst_error(back, page) < 0.03
    other = replace(KNOWN, ropes={"k": (rope_spec(DIM, dims=0),) * 2})
    seen = HeadAccumulator.like(other)
    seen.add(page)
    rotated, _ = restore(made(seen.finish("x"), rank=INNER, target="k"), page)
    assert worst_error(rotated, page) > 1.0


def test_options_and_named_settings() -> None:
    codec = made(policy="memory_emergency", target="kv", identity="0")
    assert codec.params == {
        "bits": 8,
        "identity": [0],
        "rank": {"k": 12, "v": 12},
        "sinks": SINK_TOKENS,
    }
    assert made().params["rank"] == {"v": 15}
    assert made(policy="high_compression", bits=16).bits == 16
    assert parse_spans("0-4, 29") == ((0, 4), (29, 30))
    # A blob's parameters name only its own layers.
    assert made(identity="1-9").identity == (1,)
    assert set(POLICIES) == {"default", "high_compression", "memory_emergency"}
    assert LowRankOptions.parse({"ln_nullspace": "auto"}).ln_nullspace is None
    assert warning({}) == ""
    assert "target=kv" in warning({"target": "kv"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 17}, "1 to 16, the values of a head"),
        ({"rank": 0}, "rank"),
        ({"rank": "many"}, "rank"),
        ({"bits": 4}, "8, 16"),
        ({"target": "q"}, "one of v, k, kv"),
        ({"policy": "fast"}, "default, high_compression, memory_emergency"),
        ({"identity": "3-3"}, "0-4,29"),
        ({"identity": "a"}, "0-4,29"),
        ({"ln_nullspace": "maybe"}, "true, false or auto"),
        ({"ratio": 4}, "one of rank, target"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**options)


def test_other_calibrations_are_refused_both_ways() -> None:
    other = random_calibration(dim=DIM)
    with pytest.raises(ConfigError, match="calibrate --codec lowrank"):
        make_codec("lowrank", {}, other)
    with pytest.raises(ConfigError, match="of ferry"):
        make_codec("ferry", {"step": 1}, KNOWN)
    with pytest.raises(CalibrationMissingError):
        make_codec("lowrank", {})


def test_a_page_of_another_model_is_refused() -> None:
    codec = made(rank=8)
    page = low_page(tokens=(0, 20))
    with pytest.raises(UnsupportedTensorError, match="layers"):
        codec.encode(low_page(layers=(0, 3)))
    with pytest.raises(UnsupportedTensorError, match="not calibrated"):
        codec.encode(low_page(dim=8))
    with pytest.raises(UnsupportedTensorError, match="not calibrated"):
        codec.encode(PageTensors(page.layers, page.heads, page.tokens, {"v": page.streams["v"]}))
    for bad in (np.nan, np.inf, 1e9):
        data = page.streams["v"].data.copy()
        data[1, 1, 11, 3] = bad
        streams = {**page.streams, "v": Stream("v", data, DType.FLOAT32)}
        with pytest.raises(UnsupportedTensorError, match="not stored"):
            codec.encode(PageTensors(page.layers, page.heads, page.tokens, streams))
        back, _ = restore(
            made(rank=8, identity="1"), PageTensors(page.layers, page.heads, page.tokens, streams)
        )
        assert np.array_equal(back.streams["v"].data[1, 1, 11, 3], bad, equal_nan=True)


def test_a_blob_of_another_rope_or_without_its_calibration() -> None:
    page = low_page(tokens=(0, 20))
    key, data = encode_blob(made(rank=8), page, meta_for())
    with pytest.raises(CalibrationMissingError):
        decoded(data, key, page.tokens)
    blob = container.parse(data)
    blob.header.rope_fingerprint = bytes(32)
    forged = container.pack(blob.header, list(blob.sections.values()))
    with pytest.raises(IdentityMismatchError, match="rope"):
        decode_blob(
            forged,
            key=container.key_of(blob.header),
            model_id=bytes(range(32)),
            tokens=page.tokens,
            cut=None,
            calibrations=Calibrations(KNOWN),
        )


def test_fitting_again_and_in_parts() -> None:
    pages = [low_page(tokens=(0, 200), seed=s) for s in (1, 2)]
    codec = made(rank=4)
    whole = codec.fit(pages)
    halves = [HeadAccumulator.like(KNOWN), HeadAccumulator.like(KNOWN)]
    for half, page in zip(halves, pages, strict=True):
        half.add(page)
    halves[0].merge(halves[1])
    merged = halves[0].finish("tests")
    kept = HeadAccumulator.like(KNOWN)
    kept.load({name: value.copy() for name, value in halves[0].tensors().items()})
    assert {n: (v.shape, v.dtype.str) for n, v in kept.tensors().items()} == kept.layout()
    assert kept.finish("tests").id == merged.id
    assert whole.tokens == merged.tokens == 400 - 2 * SINK_TOKENS
    assert np.allclose(whole.bases["v"].variances, merged.bases["v"].variances, atol=1e-3)
    with pytest.raises(UnsupportedTensorError, match="at least 32 tokens"):
        HeadAccumulator.like(KNOWN).finish("x")


def test_same_input_same_bytes() -> None:
    page = low_page(tokens=(0, 64), dtype=DType.FLOAT16)
    for options in ({"rank": 5}, {"rank": 5, "bits": 8, "target": "kv"}):
        first = encode_blob(made(**options), page, meta_for())
        assert first == encode_blob(made(lowrank_calibration(), **options), page, meta_for())
