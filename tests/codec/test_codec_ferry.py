import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from codec_samples import (
    MODEL_ID,
    Calibrations,
    decoded,
    heavy_rows,
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

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import StoredBlob, decode_blobs, encode_blob
from kvferry.codec.calibration import GroupAccumulator, GroupCalibration, fit_group
from kvferry.codec.entropy import pack_columns
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.rows import store_rows
from kvferry.codec.transform import SURVIVING_SIGMA
from kvferry.errors import CodecError, CorruptBlobError, UnsupportedTensorError
from kvferry.proto import container
from kvferry.proto.keys import SINK_TOKENS


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 8),
    dim=st.sampled_from([32, 64, 128]),
    tokens=st.integers(1, 600),
    start=st.sampled_from([0, 1, 4, 256, 100_000]),
    dtype=st.sampled_from(list(DType)),
    step=st.sampled_from([0.05, 0.5, 3.0]),
    weighted=st.booleans(),
    joint=st.booleans(),
)
def test_error_is_bounded_by_the_step(
    heads: int,
    dim: int,
    tokens: int,
    start: int,
    dtype: DType,
    step: float,
    weighted: bool,
    joint: bool,
) -> None:
    known = random_calibration(
        heads=(0, heads), dim=dim, weighted=weighted, joint=joint, importance=joint
    )
    page = page_of(known, (start, start + tokens), dtype)
    back = restored(FerryCodec(step, known, adapt=0.0), page)
    relative = {DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-7, DType.FLOAT32: 1e-5}[dtype]
    for name, stream in page.streams.items():
        exact, found = stream.float32(), back.streams[name].float32()
        bundle = next(b for b in known.bundles.values() if name in b.rows)
        sigma = bundle.sigma
        dropped = float((sigma[sigma < step * SURVIVING_SIGMA] ** 2).sum()) ** 0.5 * 4
        # Rotation keeps lengths; a weight near identity changes them by less than two.
        bound = step / 2 * np.sqrt(len(sigma)) * (4 if weighted else 1) + dropped
        size = np.linalg.norm(exact.transpose(2, 0, 1, 3).reshape(tokens, -1), axis=1)
        error = np.linalg.norm((found - exact).transpose(2, 0, 1, 3).reshape(tokens, -1), axis=1)
        assert (error <= bound + 4 * relative * size + 1e-3).all()


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(("start", "exact"), [(0, 4), (2, 2), (4, 0), (256, 0)])
def test_first_tokens_of_a_sequence_are_exact(dtype: DType, start: int, exact: int) -> None:
    known = random_calibration()
    page = random_page(tokens=(start, start + 50), dtype=dtype, scale=100.0)
    back = restored(FerryCodec(5.0, known), page)
    for name, stream in page.streams.items():
        # A float32 cache comes from 16-bit weights: its sinks are kept as float16.
        wanted = stream.data.astype("<f2") if dtype is DType.FLOAT32 else stream.data
        same = (back.streams[name].data == wanted).all(axis=(0, 1, 3))
        assert same[:exact].all()
        assert not same[exact:].any()


def test_nan_in_the_exact_tokens_is_kept_and_elsewhere_refused() -> None:
    known = random_calibration()
    page = random_page(tokens=(0, 20))
    page.streams["v"].data[0, 0, SINK_TOKENS - 1, 0] = np.nan
    assert np.isnan(restored(FerryCodec(0.5, known), page).streams["v"].data[0, 0, 3, 0])
    page.streams["v"].data[0, 0, SINK_TOKENS, 0] = np.nan
    with pytest.raises(UnsupportedTensorError, match=r"'k\+v'"):
        restored(FerryCodec(0.5, known), page)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_pages_shorter_than_the_sinks_round_trip(tokens: int) -> None:
    known = random_calibration()
    page = page_of(known, (0, tokens))
    assert worst_error(restored(FerryCodec(0.01, known), page), page) < 0.05


def test_values_far_outside_the_calibration_survive() -> None:
    known = random_calibration()
    centred = {
        name: dataclasses.replace(bundle, mean=np.zeros_like(bundle.mean))
        for name, bundle in known.bundles.items()
    }
    known = dataclasses.replace(known, bundles=centred)
    page = page_of(known, (256, 300))
    for stream in page.streams.values():
        stream.data[...] *= 3e4
    codec = FerryCodec(0.5, known)
    sections = container.parse(encode_blob(codec, page, meta_for())[1]).sections
    assert sections["k+v/q"].raw_length == 4 * 44 * known.bundles["k+v"].rank  # int32
    assert worst_error(restored(codec, page), page) < 1e-3 * np.abs(page.streams["k"].data).max()


def test_values_at_the_end_of_float16_stay_finite() -> None:
    known = random_calibration()
    page = page_of(known, (256, 280), DType.FLOAT16)
    for stream in page.streams.values():
        stream.data[...] = np.where(stream.data < 0, -65_000, 65_000)
    back = restored(FerryCodec(3000.0, known), page)
    assert all(np.isfinite(s.data).all() for s in back.streams.values())


def test_forged_levels_never_become_nan_or_infinity() -> None:
    known = random_calibration()
    codec = FerryCodec(9e29, known)
    key, data = encode_blob(codec, page_of(known, (256, 280)), meta_for())
    blob = container.parse(data)
    forged = []
    for section in blob.sections.values():
        q = np.full((24, 1), 2**31 - 1, dtype=np.int32)
        forged.append(container.SectionData(section.name, pack_columns(q), q.nbytes))
    data = container.pack(blob.header, forged)
    with pytest.raises(CorruptBlobError, match="infinite"):
        decoded(data, key, (256, 280), known)


def test_a_run_of_pages_equals_the_pages_one_by_one() -> None:
    known = random_calibration(layers=(3, 7), dim=64)
    codec = FerryCodec(0.3, known)
    spans = [(0, 256), (256, 512), (512, 600)]
    pages = [page_of(known, span, seed=i) for i, span in enumerate(spans)]
    blobs = [
        StoredBlob(data, key, page.tokens)
        for page in pages
        for key, data in [encode_blob(codec, page, meta_for())]
    ]
    source = Calibrations(known)
    run = decode_blobs(blobs, model_id=MODEL_ID, cut=(4, 6), calibrations=source)
    for blob, page, found in zip(blobs, pages, run, strict=True):
        assert isinstance(found, PageTensors)
        one = decoded(blob.data, blob.key, blob.tokens, known, cut=(4, 6))
        assert found.tokens == page.tokens
        assert worst_error(found, one) < 1e-5


def test_one_bad_page_of_a_run_is_named_and_the_others_decode() -> None:
    known = random_calibration()
    codec = FerryCodec(0.3, known)
    pages = [page_of(known, (at, at + 64), seed=at) for at in (0, 64, 128)]
    blobs = []
    for index, page in enumerate(pages):
        key, data = encode_blob(codec, page, meta_for())
        if index == 1:
            data = data[:300] + bytes([data[300] ^ 1]) + data[301:]
        blobs.append(StoredBlob(data, key, page.tokens))
    run = decode_blobs(blobs, model_id=MODEL_ID, cut=None, calibrations=Calibrations(known))
    assert isinstance(run[1], CorruptBlobError)
    for index in (0, 2):
        found = run[index]
        assert isinstance(found, PageTensors)
        assert found.tokens == pages[index].tokens
        assert worst_error(found, pages[index]) < 1.5


def test_bad_coefficients_behind_good_checksums_are_found_in_a_run() -> None:
    known = random_calibration()
    codec = FerryCodec(0.3, known)
    blobs = []
    for index, start in enumerate((64, 128, 192)):
        key, data = encode_blob(codec, page_of(known, (start, start + 64), seed=start), meta_for())
        if index == 2:
            blob = container.parse(data)
            sections = list(blob.sections.values())
            sections[0] = container.SectionData("k+v/q", b"\1" * 90, sections[0].raw_length)
            data = container.pack(blob.header, sections)
        blobs.append(StoredBlob(data, key, (start, start + 64)))
    run = decode_blobs(blobs, model_id=MODEL_ID, cut=None, calibrations=Calibrations(known))
    assert [isinstance(found, CodecError) for found in run] == [False, False, True]


def fitted(rows: dict[str, np.ndarray], layers: tuple[int, int], dim: int) -> GroupCalibration:
    """Calibration of two heads fitted on rows (tokens, layers x 2 x dim)."""
    count = layers[1] - layers[0]
    seen = GroupAccumulator(
        model_id=MODEL_ID, layers=layers, heads=(0, 2), ropes={"k": [rope_spec(dim)] * count}
    )
    seen.add(page_from(rows, layers, dim, (4, 4 + len(rows["k"]))))
    return fit_group(seen)


def page_from(
    rows: dict[str, np.ndarray], layers: tuple[int, int], dim: int, tokens: tuple[int, int]
) -> PageTensors:
    streams = {}
    count = layers[1] - layers[0]
    for name, values in rows.items():
        out = np.empty((count, 2, len(values), dim), np.float32)
        ropes = [rope_spec(dim)] * count if name == "k" else None
        store_rows(out, DType.FLOAT32, np.ascontiguousarray(values), ropes, tokens)
        streams[name] = Stream(name, out, DType.FLOAT32)
    return PageTensors(layers, (0, 2), tokens, streams)


def test_a_cut_costs_hardly_more_than_a_refit() -> None:
    rng = np.random.default_rng(11)
    dim, width = 32, 4 * 2 * 32
    mixing = heavy_rows(rng, 1, width, 160)[1]

    def sample(tokens: int) -> dict[str, np.ndarray]:
        noise = {n: 0.02 * rng.standard_normal((tokens, width)) for n in "kv"}
        mixed = {n: rng.standard_normal((tokens, 160)) @ mixing.T + noise[n] for n in "kv"}
        return {n: x.astype(np.float32) for n, x in mixed.items()}

    train, test = sample(4000), sample(256)
    half = {n: x[:, : width // 2] for n, x in train.items()}
    page = page_from({n: x[:, : width // 2] for n, x in test.items()}, (10, 12), dim, (256, 512))
    whole = fitted(train, (10, 14), dim)
    sizes, errors = [], []
    for known in (whole.cut((10, 12), (0, 2)), fitted(half, (10, 12), dim)):
        codec = FerryCodec(0.2, known)
        sizes.append(len(encode_blob(codec, page, meta_for())[1]))
        back = restored(codec, page)
        errors.append(float(((back.streams["v"].data - page.streams["v"].data) ** 2).mean()))
    assert sizes[0] <= 1.03 * sizes[1]
    assert errors[0] <= 1.05 * errors[1]


def test_refit_on_other_text_keeps_rope_and_ranges() -> None:
    known = random_calibration()
    again = FerryCodec(0.5, known).fit([page_of(known, (0, 400), seed=5)])
    assert (again.layers, again.heads, again.ropes) == (known.layers, known.heads, known.ropes)
    page = page_of(known, (400, 500), seed=6)
    assert worst_error(restored(FerryCodec(0.05, again), page), page) < 0.5


@pytest.mark.parametrize("layers", [(0, 1), (1, 3)])
def test_pages_of_another_range_are_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedTensorError, match="layers"):
        FerryCodec(0.5, random_calibration()).encode(random_page(layers=layers))
    with pytest.raises(UnsupportedTensorError, match="calibrated"):
        FerryCodec(0.5, random_calibration()).encode(random_page(dim=64))


DIGEST = """
import sys
from pathlib import Path
from blake3 import blake3
sys.path.insert(0, sys.argv[1])
from codec_samples import meta_for, random_page
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.ferry import FerryCodec
known = GroupCalibration.from_blob(Path(sys.argv[2]).read_bytes())
codec = FerryCodec(0.07, known)
hasher = blake3()
for start in (0, 256):
    page = random_page(layers=(0, 8), heads=(0, 3), tokens=(start, start + 256), dim=64)
    hasher.update(encode_blob(codec, page, meta_for())[1])
print(hasher.hexdigest())
"""


def test_same_bytes_on_every_run_and_thread_count(tmp_path: Path) -> None:
    known = random_calibration(layers=(0, 8), heads=(0, 3), dim=64, rank=300)
    path = tmp_path / "calibration"
    path.write_bytes(known.to_blob()[1])
    digests = set()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", DIGEST, str(Path(__file__).parent), str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
