import numpy as np
import pytest
from codec_samples import heavy_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.basis import Basis, cut_basis, eigenbasis, row_weight
from kvferry.codec.covariance import CovarianceAccumulator
from kvferry.codec.transform import fold, project, rank_at, reconstruct
from kvferry.errors import CalibrationCorruptError, UnsupportedTensorError


def seen(*parts: np.ndarray) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(parts[0].shape[1])
    for part in parts:
        accumulator.add(part)
    return accumulator


def weights(rng: np.random.Generator, layers: int, heads: int, dim: int) -> np.ndarray:
    noise = rng.standard_normal((layers, heads, dim, dim)) * 0.1
    return (np.eye(dim) + noise).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5), offset=st.floats(-1e4, 1e4))
def test_batches_give_the_covariance_of_all_rows(sizes: list[int], offset: float) -> None:
    rng = np.random.default_rng(sum(sizes))
    rows = (rng.standard_normal((sum(sizes), 7)) + offset).astype(np.float32)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    exact = rows.astype(np.float64)
    whole = seen(*parts)
    np.testing.assert_allclose(whole.mean(), exact.mean(axis=0), atol=1e-5 + 1e-7 * abs(offset))
    np.testing.assert_allclose(
        whole.covariance(), np.cov(exact.T, bias=True).reshape(7, 7), atol=1e-4
    )
    merged = CovarianceAccumulator(7)
    for part in parts:
        merged.merge(seen(part))
    np.testing.assert_allclose(merged.covariance(), whole.covariance(), atol=1e-3)
    assert merged.count == whole.count == sum(sizes)


def test_a_state_that_was_kept_goes_on_bit_for_bit() -> None:
    rows = np.random.default_rng(3).standard_normal((90, 7)).astype(np.float32) + 5
    whole, begun = seen(rows[:40], rows[40:]), seen(rows[:40])
    layout = CovarianceAccumulator.state_layout(7)
    assert {n: (v.shape, v.dtype.str) for n, v in begun.state.items()} == layout
    again = CovarianceAccumulator.of_state({n: v.copy() for n, v in begun.state.items()})
    assert (again.width, again.count) == (7, 40)
    again.add(rows[40:])
    assert again.covariance().tobytes() == whole.covariance().tobytes()
    assert again.mean().tobytes() == whole.mean().tobytes()


def test_accumulator_refuses_what_would_poison_it() -> None:
    accumulator = CovarianceAccumulator(4)
    for bad in (np.full((2, 4), np.nan), np.full((2, 4), np.inf), np.zeros((2, 5)), np.zeros(4)):
        with pytest.raises(UnsupportedTensorError):
            accumulator.add(bad.astype(np.float32))
    with pytest.raises(UnsupportedTensorError):
        eigenbasis(accumulator, 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_full_basis_restores_every_row(weighted: bool) -> None:
    rng = np.random.default_rng(3)
    rows, _ = heavy_rows(rng, 400, 2 * 2 * 8, 32)
    # Two streams side by side, of which only the second is weighted.
    at = [row_weight(weights(rng, 2, 1, 8), 16)] if weighted else []
    by = fold(eigenbasis(seen(rows), 32, at), at)
    z = project(rows, by, 32)
    back = reconstruct(np.hstack([np.ones((400, 1), np.float32), z]), by)
    np.testing.assert_allclose(back, rows, atol=2e-4)
    part = reconstruct(np.hstack([np.ones((400, 1), np.float32), z]), by, slice(16, 32))
    np.testing.assert_allclose(part, rows[:, 16:], atol=2e-4)


def test_coefficients_are_uncorrelated_and_have_the_promised_spread() -> None:
    rng = np.random.default_rng(4)
    rows, _ = heavy_rows(rng, 3000, 32, 32)
    weight = [row_weight(weights(rng, 2, 2, 8))]
    basis = eigenbasis(seen(rows), 16, weight)
    z = project(rows, fold(basis, weight), 16)
    covariance = np.cov(z.T, bias=True)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), basis.sigma, rtol=1e-3)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    assert (np.diff(basis.sigma) <= 0).all()


def test_weight_is_applied_before_the_transform() -> None:
    rng = np.random.default_rng(5)
    rows, _ = heavy_rows(rng, 500, 2 * 2 * 8, 32)
    weight = weights(rng, 2, 2, 8)
    at = [row_weight(weight)]
    basis = eigenbasis(seen(rows), 32, at)
    blocks = weight.reshape(4, 8, 8)
    weighted = np.einsum("bij,tbj->tbi", blocks, rows.reshape(-1, 4, 8)).reshape(-1, 32)
    wanted = (weighted - basis.mean) @ basis.vectors
    np.testing.assert_allclose(project(rows, fold(basis, at), 32), wanted, atol=1e-3)


def test_singular_weight_is_refused() -> None:
    basis = Basis(np.zeros(4, np.float32), np.eye(4, dtype=np.float32), np.ones(4, np.float32))
    for weight in (np.zeros((1, 1, 4, 4)), np.full((1, 1, 4, 4), 1.0)):
        with pytest.raises(CalibrationCorruptError):
            fold(basis, [row_weight(weight.astype(np.float32))])
    for shape, start in (((1, 1, 4, 4), 1), ((2, 1, 4, 4), 0)):
        with pytest.raises(UnsupportedTensorError):
            fold(basis, [row_weight(np.broadcast_to(np.eye(4, dtype=np.float32), shape), start)])
    with pytest.raises(UnsupportedTensorError):
        row_weight(np.eye(4, dtype=np.float32))


@pytest.mark.parametrize("kept", [8, 24])
def test_cut_has_the_covariance_of_the_kept_rows(kept: int) -> None:
    rng = np.random.default_rng(6)
    rows, _ = heavy_rows(rng, 2000, 32, 16)
    basis = eigenbasis(seen(rows), 16)
    part = cut_basis(basis, np.arange(kept))
    wanted = np.cov(rows[:, :kept].T, bias=True)
    found = (part.vectors * part.sigma**2) @ part.vectors.T
    np.testing.assert_allclose(found, wanted, atol=1e-3 * wanted.max())
    identity = np.eye(part.vectors.shape[1])
    np.testing.assert_allclose(part.vectors.T @ part.vectors, identity, atol=1e-5)


def test_rank_follows_the_step() -> None:
    sigma = np.geomspace(8, 0.01, 100).astype(np.float32)
    ranks = [rank_at(sigma, step) for step in (0.01, 0.1, 1.0, 10.0, 1e9)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 100
    assert ranks[-1] == 1
