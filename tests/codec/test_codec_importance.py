"""Tokens that matter more are coded finer, and a reader needs nothing but the blob for it."""

import dataclasses

import numpy as np
import pytest
from codec_samples import (
    decoded,
    heavy_rows,
    meta_for,
    page_of,
    random_calibration,
    restored,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import PageTensors
from kvferry.codec.basis import cut_basis, eigenbasis
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.covariance import CovarianceAccumulator
from kvferry.codec.entropy import pack_columns
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.importance import MAX_EXPONENT, ImportanceSums, exponents, factors
from kvferry.codec.transform import fold, project
from kvferry.errors import CorruptBlobError
from kvferry.proto import container
from kvferry.proto.container import SectionData


def errors(known: GroupCalibration, page: PageTensors, adapt: float) -> np.ndarray:
    """(tokens,) mean squared error of what comes back."""
    back = restored(FerryCodec(0.5, known, adapt), page)
    parts = [
        np.square(back.streams[n].float32() - s.float32()).mean(axis=(0, 1, 3))
        for n, s in page.streams.items()
    ]
    return np.mean(parts, axis=0)


def chosen(known: GroupCalibration, page: PageTensors, adapt: float) -> np.ndarray:
    """(tokens,) exponents that the blob carries."""
    _, data = encode_blob(FerryCodec(0.5, known, adapt), page, meta_for())
    sections = container.parse(data).sections
    if "k+v/steps" not in sections:
        return np.zeros(page.tokens[1] - page.tokens[0])
    bundle = known.bundles["k+v"]
    from kvferry.codec.rows import page_rows

    rows = page_rows(page, ["k", "v"], known.ropes, page.tokens[0])
    return exponents(rows, bundle.predictor, adapt)


def test_important_tokens_come_back_better() -> None:
    known = random_calibration(importance=True)
    page = page_of(known, (256, 512))
    level, error = chosen(known, page, 1.0), errors(known, page, 1.0)
    fine, coarse = error[level <= -2].mean(), error[level >= 2].mean()
    assert coarse > 2 * fine
    even = errors(known, page, 0.0)
    assert error[level <= -2].mean() < even[level <= -2].mean()
    assert error[level >= 2].mean() > even[level >= 2].mean()


def test_without_what_predicts_it_no_token_differs() -> None:
    page = page_of(random_calibration(), (256, 300))
    for known, adapt in ((random_calibration(), 1.0), (random_calibration(importance=True), 0.0)):
        _, data = encode_blob(FerryCodec(0.5, known, adapt), page, meta_for())
        assert set(container.parse(data).sections) == {"k+v/q"}


def test_prediction_is_learned_from_rows_and_levels() -> None:
    rng = np.random.default_rng(0)
    rows, mixing = heavy_rows(rng, 4000, 32, 16)
    hidden = rows @ np.linalg.pinv(mixing).T
    importance = np.exp(1.5 * hidden[:, 0] - 0.7 * hidden[:, 2])
    covariance, sums = CovarianceAccumulator(32), ImportanceSums(32)
    for part in np.split(np.arange(4000), 4):
        covariance.add(rows[part])
        # the unit of a sequence's importance means nothing
        sums.add(rows[part], importance[part] * float(rng.uniform(0.1, 1e6)))
    basis = dataclasses.replace(
        eigenbasis(covariance, 16), importance=sums.fit(eigenbasis(covariance, 16), ())
    )
    z = project(rows, fold(basis), 16)
    predicted = (z / basis.sigma) @ basis.importance
    assert np.corrcoef(predicted, np.log(importance))[0, 1] > 0.99
    # most of what a cut can know of it, it predicts alike
    part = cut_basis(basis, np.arange(24))
    kept = project(np.ascontiguousarray(rows[:, :24]), fold(part), len(part.sigma))
    usable = part.sigma[: len(part.importance)] > 1e-4
    guess = (kept[:, : len(usable)] / np.where(usable, part.sigma[: len(usable)], 1)) @ (
        part.importance * usable
    )
    assert np.corrcoef(guess, np.log(importance))[0, 1] > 0.95


def test_too_few_tokens_predict_nothing() -> None:
    covariance, sums = CovarianceAccumulator(8), ImportanceSums(8)
    rows = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32)
    covariance.add(rows)
    sums.add(rows, np.arange(1.0, 8.0))
    assert sums.fit(eigenbasis(covariance, 4), ()) is None


@settings(max_examples=30, deadline=None)
@given(levels=st.lists(st.integers(-MAX_EXPONENT, MAX_EXPONENT), min_size=1, max_size=40))
def test_factors_are_powers_of_two_to_the_quarter(levels: list[int]) -> None:
    found = factors(np.array(levels, dtype=np.int16))
    np.testing.assert_allclose(found, 2.0 ** (np.array(levels) / 4), rtol=1e-6)


@pytest.mark.parametrize("level", [MAX_EXPONENT + 1, -MAX_EXPONENT - 1, 32_767, -32_768])
def test_a_forged_step_is_refused(level: int) -> None:
    known = random_calibration(importance=True)
    page = page_of(known, (256, 300))
    key, data = encode_blob(FerryCodec(0.5, known, 1.0), page, meta_for())
    blob = container.parse(data)
    bad = np.zeros((44, 1), dtype=np.int16)
    bad[7] = level
    sections = [
        SectionData(name, pack_columns(bad), bad.nbytes) if name == "k+v/steps" else section
        for name, section in blob.sections.items()
    ]
    with pytest.raises(CorruptBlobError, match="out of range"):
        decoded(container.pack(blob.header, sections), key, page.tokens, known)
