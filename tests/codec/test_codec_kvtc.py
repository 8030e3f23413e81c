"""The published codec: what it stores, what it refuses, and what comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_samples import (
    MODEL_ID,
    bits,
    decoded,
    heavy_rows,
    meta_for,
    page_of,
    random_calibration,
    random_page,
    rope_spec,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_samples import kvtc_calibration, with_errors

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration import (
    BundleCalibration,
    CalibrationSet,
    GroupAccumulator,
    GroupCalibration,
    StreamPart,
)
from kvferry.codec.kvtc import KvtcCodec
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.kvtc_fit import KEPT_ROWS, KvtcFit
from kvferry.codec.kvtc_plan import budget_for
from kvferry.codec.registry import make_codec
from kvferry.codec.rows import store_rows
from kvferry.errors import (
    CalibrationCorruptError,
    CalibrationMissingError,
    ConfigError,
    UnsupportedTensorError,
)
from kvferry.proto import container
from kvferry.proto.keys import SINK_TOKENS

KNOWN = kvtc_calibration(rank=100)


def made(ratio: float, known: KvtcCalibration = KNOWN, entropy: str = "zlib") -> KvtcCodec:
    codec = make_codec("kvtc", {"ratio": ratio, "entropy": entropy}, known)
    assert isinstance(codec, KvtcCodec)
    return codec


def a_fit(**group: Any) -> KvtcFit:
    return KvtcFit(GroupAccumulator(model_id=MODEL_ID, joint=False, **group))


def restore(
    codec: KvtcCodec, page: PageTensors, cut: tuple[int, int] | None = None
) -> tuple[PageTensors, int]:
    """What a reader gets that has nothing but the blob and the bases; and bytes."""
    known = codec.calibration
    assert known is not None
    plain = GroupCalibration.from_blob(known.to_blob()[1])
    key, data = encode_blob(codec, page, meta_for())
    return decoded(data, key, page.tokens, plain, cut=cut), len(data)


@settings(max_examples=10, deadline=None)
@given(
    heads=st.integers(1, 4),
    dim=st.sampled_from([32, 64]),
    tokens=st.integers(1, 300),
    start=st.sampled_from([0, 1, 4, 256, 100_000]),
    dtype=st.sampled_from(list(DType)),
    ratio=st.sampled_from([1.2, 4, 16]),
    entropy=st.sampled_from(["zlib", "zstd"]),
)
def test_every_token_is_as_near_as_its_groups_scales_say(
    heads: int, dim: int, tokens: int, start: int, dtype: DType, ratio: float, entropy: str
) -> None:
    known = kvtc_calibration(heads=(0, heads), dim=dim, rank=60)
    page = page_of(known, (start, start + tokens), dtype)
    codec = made(ratio, known, entropy)
    back, _ = restore(codec, page)
    relative = {DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-7, DType.FLOAT32: 1e-5}[dtype]
    for name, stream in page.streams.items():
        sigma, bound, first = known.bundles[name].sigma, 0.0, 0
        for group in codec.plans[name].groups:
            # a Gaussian rarely leaves 5 deviations, and the first of a group is its widest
            reach = 5 * float(sigma[first])
            step = 2 * reach / (2**group.bits - 1) if group.bits else 2 * reach
            bound += group.size * (step / 2 + reach * 2.0**-9) ** 2
            first += group.size
        bound += float((25 * sigma[first:] ** 2).sum())
        exact, found = stream.float32(), back.streams[name].float32()
        size = np.linalg.norm(exact.transpose(2, 0, 1, 3).reshape(tokens, -1), axis=1)
        error = np.linalg.norm((found - exact).transpose(2, 0, 1, 3).reshape(tokens, -1), axis=1)
        assert (error <= np.sqrt(bound) + 4 * relative * size + 1e-3).all()


def test_a_higher_ratio_takes_fewer_bytes_and_more_error() -> None:
    page = page_of(KNOWN, (256, 512))
    sizes, errors = [], []
    for ratio in (2, 4, 8, 16):
        back, size = restore(made(ratio), page)
        sizes.append(size)
        errors.append(sum(float(((s.data - page.streams[n].data) ** 2).sum())
                          for n, s in back.streams.items()))  # fmt: skip
        assert page.raw_bytes_fp16 / size > 0.85 * ratio  # a small page has a large header
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_the_planned_error_is_the_error_of_pages() -> None:
    """The program's table means what it says: squared error per token."""
    codec = made(4)
    page = page_of(KNOWN, (256, 1256))
    back, _ = restore(codec, page)
    for name, plan in codec.plans.items():
        errors, first, planned = KNOWN.errors[name], 0, 0.0
        for group in plan.groups:
            part = slice(first, first + group.size)
            table = errors.groups[group.size, group.bits] if group.bits else errors.energy
            planned += float(table[first] if group.bits else table[part].sum())
            first += group.size
        planned += float(errors.energy[first:].sum())
        lost = back.streams[name].data - page.streams[name].data
        assert float((lost**2).sum()) / 1000 == pytest.approx(planned, rel=0.05)
        assert plan.bits <= budget_for(4, KNOWN.bundles[name].width)


def test_both_entropy_coders_give_the_same_numbers() -> None:
    page = page_of(KNOWN, (0, 100), DType.FLOAT16)
    a, b = (restore(made(6, entropy=entropy), page)[0] for entropy in ("zlib", "zstd"))
    assert bits(a) == bits(b)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(("start", "exact"), [(0, 4), (2, 2), (4, 0), (256, 0)])
def test_first_tokens_of_a_sequence_are_exact(dtype: DType, start: int, exact: int) -> None:
    page = random_page(tokens=(start, start + 50), dtype=dtype, scale=100.0)
    back, _ = restore(made(12), page)
    for name, stream in page.streams.items():
        wanted = stream.data.astype("<f2") if dtype is DType.FLOAT32 else stream.data
        same = (back.streams[name].data == wanted).all(axis=(0, 1, 3))
        assert same[:exact].all()
        assert not same[exact:].any()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_pages_hardly_longer_than_the_sinks_round_trip(tokens: int) -> None:
    page = page_of(KNOWN, (0, tokens))
    assert worst_error(restore(made(1.1), page)[0], page) < 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_what_float16_cannot_carry_is_refused_behind_the_sinks(bad: float) -> None:
    page = random_page(tokens=(0, 20))
    page.streams["v"].data[0, 0, SINK_TOKENS - 1, 0] = bad
    back = restore(made(4), page)[0].streams["v"].data[0, 0, SINK_TOKENS - 1, 0]
    assert np.isnan(back) if np.isnan(bad) else back == bad
    page.streams["v"].data[:, :, SINK_TOKENS] = bad
    with pytest.raises(UnsupportedTensorError, match="'v'"):
        restore(made(4), page)


def test_constant_columns_and_constant_tokens_survive() -> None:
    page = page_of(KNOWN, (256, 280))
    for stream in page.streams.values():
        stream.data[:, 0, :, 3] = 7.25
        stream.data[:, :, 5] = 0.0
    back, _ = restore(made(1.1), page)
    assert all(np.isfinite(stream.data).all() for stream in back.streams.values())


def test_a_budget_that_buys_nothing_stores_the_mean() -> None:
    page = page_of(KNOWN, (256, 300))
    back, size = restore(made(1000), page)
    assert size < 2000
    mean = KNOWN.bundles["v"].mean.reshape(2, 2, 1, 32)
    assert np.allclose(back.streams["v"].data, mean, atol=1e-2)


def test_a_reader_of_some_layers_gets_them_alone() -> None:
    page = page_of(KNOWN, (0, 60), DType.FLOAT16)
    whole, _ = restore(made(4), page)
    part, _ = restore(made(4), page, cut=(1, 2))
    assert part.layers == (1, 2)
    for name, stream in part.streams.items():
        mine = whole.streams[name].float32()[1:2]
        assert np.abs(stream.float32() - mine).max() <= 2.0**-8 * np.abs(mine).max()


def test_same_input_same_bytes() -> None:
    page = page_of(KNOWN, (0, 256), DType.BFLOAT16)
    assert encode_blob(made(8), page, meta_for()) == encode_blob(made(8), page, meta_for())


def test_streams_that_heads_share() -> None:
    """MLA: one latent and one rotated key for all heads."""
    rng = np.random.default_rng(0)
    bundles = {}
    for name, dim in (("latent", 48), ("rope_key", 16)):
        basis, _ = np.linalg.qr(rng.standard_normal((2 * dim, 2 * dim)))
        bundles[name] = BundleCalibration(
            parts=(StreamPart(name=name, heads=1, dim=dim),),
            mean=np.zeros(2 * dim, dtype=np.float32),
            basis=basis.astype(np.float16),
            sigma=np.geomspace(8, 0.1, 2 * dim).astype(np.float32),
        )
    known = with_errors(
        GroupCalibration(
            model_id=MODEL_ID,
            layers=(0, 2),
            heads=(0, 8),
            bundles=bundles,
            ropes={"rope_key": (rope_spec(16),) * 2},
        )
    )
    page = page_of(known, (0, 64), DType.BFLOAT16)
    back, _ = restore(made(2, known), page)
    for name, stream in page.streams.items():
        lost = np.square(back.streams[name].float32() - stream.float32()).sum()
        assert lost < 0.02 * np.square(stream.float32()).sum()


def test_other_layers_streams_and_shapes_are_refused() -> None:
    codec = made(4)
    page = page_of(KNOWN, (0, 30))
    with pytest.raises(UnsupportedTensorError, match="layers"):
        codec.encode(page.cut_layers((0, 1)))
    short = PageTensors(page.layers, page.heads, page.tokens, {"k": page.streams["k"]})
    with pytest.raises(UnsupportedTensorError, match="calibrated"):
        codec.encode(short)
    with pytest.raises(UnsupportedTensorError, match="shape"):
        codec.encode(random_page(tokens=(0, 30), dim=16))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "ratio"),
        ({"ratio": "many"}, "ratio"),
        ({"ratio": 0.5}, "at least 1"),
        ({"ratio": 4, "entropy": "lzma"}, "zlib or zstd"),
        ({"ratio": 4, "bits": 2}, "bits"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_codec("kvtc", options, KNOWN)


def test_it_needs_a_calibration_of_its_own() -> None:
    with pytest.raises(CalibrationMissingError):
        make_codec("kvtc", {"ratio": 4})
    with pytest.raises(ConfigError, match="kvferry calibrate --codec kvtc"):
        make_codec("kvtc", {"ratio": 4}, random_calibration())
    with pytest.raises(CalibrationMissingError):
        encode_blob(KvtcCodec(), page_of(KNOWN), meta_for())


def test_the_header_names_plan_and_coder_and_no_more() -> None:
    codec = made(4)
    _, data = encode_blob(codec, page_of(KNOWN, (0, 30)), meta_for())
    header = container.read_header(data)
    params = container.codec_params(header)
    assert params == {
        "entropy": "zlib",
        "plan": {name: plan.to_json() for name, plan in codec.plans.items()},
        "sinks": SINK_TOKENS,
    }
    assert header.codec.calibration_id == KNOWN.id


def sample(tokens: int = 900, seed: int = 3) -> list[PageTensors]:
    """Pages whose rows are correlated, with a mean far from zero."""
    rng = np.random.default_rng(seed)
    spec = rope_spec(16)
    pages = []
    for start in range(0, tokens, 300):
        streams = {}
        for name in ("k", "v"):
            rows, _ = heavy_rows(np.random.default_rng(7), 300, 64, 20)
            rows = rows[rng.permutation(300)] + 5
            out = np.empty((2, 2, 300, 16), dtype=np.float32)
            ropes = (spec, spec) if name == "k" else None
            store_rows(out, DType.FLOAT32, rows, ropes, (start, start + 300))
            streams[name] = Stream(name, out, DType.FLOAT32)
        pages.append(PageTensors((0, 2), (0, 2), (start, start + 300), streams))
    return pages


def fitted(pages: list[PageTensors]) -> KvtcCalibration:
    ropes = {"k": (rope_spec(16),) * 2}
    seen = a_fit(layers=(0, 2), heads=(0, 2), ropes=ropes)
    for page in pages:
        seen.add(page)
    return seen.finish("made up")


def test_a_fitted_basis_holds_what_there_is() -> None:
    pages = sample()
    known = fitted(pages)
    assert (known.source, known.tokens) == ("made up", 896)
    assert set(known.plans) >= {4.0, 8.0, 16.0}
    back, _ = restore(made(4, known), pages[1])
    for name, stream in pages[1].streams.items():
        spread = np.square(stream.data - stream.data.mean(axis=2, keepdims=True)).sum()
        lost = np.square(back.streams[name].data - stream.data).sum()
        assert lost < 0.01 * spread
        basis = known.bundles[name].basis.astype(np.float32)
        assert np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=2e-3)
        assert known.bundles[name].sigma[20] < 1e-2 * known.bundles[name].sigma[0]


def test_fitting_again_by_the_codec_is_the_same() -> None:
    pages = sample()
    known = fitted(pages)
    again = made(4, known).fit(iter(pages))
    assert again.id == known.id
    assert again.plans == known.plans


def test_errors_are_measured_on_rows_from_everywhere() -> None:
    seen = a_fit(layers=(0, 1), heads=(0, 1), ropes={})
    count = 5 * KEPT_ROWS
    for start in range(0, count, 777):
        end = min(start + 777, count)
        values = np.arange(start, end, dtype=np.float32)[None, None, :, None]
        data = np.concatenate([values, np.sin(values)], axis=3)
        page = PageTensors((0, 1), (0, 1), (start, end), {"v": Stream("v", data, DType.FLOAT32)})
        seen.add(page)
    rows = seen.kept["v"][:, 0]
    assert KEPT_ROWS <= len(rows) <= 2 * KEPT_ROWS
    assert len(set(np.diff(rows))) == 1
    assert rows[0] == SINK_TOKENS
    assert rows[-1] > 0.99 * count


def test_errors_are_measured_apart_from_what_was_fitted() -> None:
    ropes = {"k": (rope_spec(16),) * 2}
    seen = a_fit(layers=(0, 2), heads=(0, 2), ropes=ropes)
    fitted_on, apart = sample(), random_page(layers=(0, 2), tokens=(0, 304), dim=16)
    for page in fitted_on:
        seen.add(page)
    seen.measure_on(apart)
    known, plain = seen.finish("made up"), fitted(fitted_on)
    assert known.id == plain.id  # the same basis
    # noise falls on all directions alike, the fitted text on the first twenty
    energy = {name: errors.energy for name, errors in known.errors.items()}
    assert all(values[30:].mean() > 0.2 for values in energy.values())
    assert all(errors.energy[30:].mean() < 1e-2 for errors in plain.errors.values())
    assert known.plans[4.0]["v"] != plain.plans[4.0]["v"]


def test_too_little_or_too_wide() -> None:
    seen = a_fit(layers=(0, 1), heads=(0, 64), ropes={})
    with pytest.raises(UnsupportedTensorError, match="no tokens"):
        seen.finish("")
    wide = random_page(layers=(0, 1), heads=(0, 64), tokens=(0, 5), dim=256)
    with pytest.raises(ConfigError, match="use ferry"):
        seen.add(wide)
    with pytest.raises(ConfigError, match="a basis for each stream"):
        KvtcFit(GroupAccumulator(model_id=MODEL_ID, layers=(0, 1), heads=(0, 1), ropes={}))


def test_it_comes_back_from_a_folder(tmp_path: Path) -> None:
    known = fitted(sample())
    (tmp_path / ("0" * 64 + ".kvferry")).write_bytes(b"of an older calibration")
    saved = known.save(tmp_path)
    found, loaded = KvtcCalibration.load(tmp_path)
    assert found.id == saved.id
    assert loaded.id == known.id
    assert loaded.plans == known.plans
    for ratio in (8.0, 9.5):  # one that is kept, one that is searched
        assert loaded.plans_for(ratio) == known.plans_for(ratio)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".errors", ".json", ".kvferry"]


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        KvtcCalibration.load(tmp_path)
    known = fitted(sample())
    made_set = known.save(tmp_path)
    path = next(tmp_path.glob("*.errors"))
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(CalibrationCorruptError):
            KvtcCalibration.load(tmp_path)
    path.write_bytes(whole.replace(b"[[", b"[]", 1))
    with pytest.raises(CalibrationCorruptError):
        KvtcCalibration.load(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="kvferry calibrate --codec kvtc"):
        KvtcCalibration.load(tmp_path)
    assert CalibrationSet.load(tmp_path)[0].id == made_set.id
