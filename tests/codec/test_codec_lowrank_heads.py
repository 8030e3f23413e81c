"""Per-head low rank in plain numpy: there and back, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.covariance import CovarianceAccumulator
from kvferry.codec.lowrank_heads import (
    HeadBasis,
    dequantize,
    fit_heads,
    project,
    quantize,
    reconstruct,
)
from kvferry.errors import CalibrationCorruptError, ConfigError, UnsupportedTensorError

LAYERS, HEADS, DIM = 3, 2, 8


def sample(tokens: int = 200, inner: int = 5, seed: int = 1) -> np.ndarray:
    """Values whose heads live in ``inner`` dimensions each of its own, far from 0."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((LAYERS, HEADS, inner, DIM))
    mixed = random.standard_normal((LAYERS, HEADS, tokens, inner)) @ mix
    return (mixed + 30 * random.standard_normal((LAYERS, HEADS, 1, DIM))).astype(np.float32)


def fitted(values: np.ndarray) -> HeadBasis:
    seen = CovarianceAccumulator(DIM, (LAYERS, HEADS))
    for part in np.array_split(values, 3, axis=2):
        seen.add(part)
    return fit_heads(seen.mean(), seen.covariance())


def test_full_rank_gives_values_back() -> None:
    values = sample()
    basis = fitted(values)
    found = reconstruct(project(values, basis), basis)
    assert np.abs(found - values).max() < 1e-4
    square = np.swapaxes(basis.vectors, -1, -2) @ basis.vectors
    assert np.allclose(square, np.eye(DIM), atol=1e-5)


def test_heads_of_low_rank_need_no_more_directions() -> None:
    values = sample(inner=5)
    basis = fitted(values)
    assert (basis.lost(5) < 1e-5).all()
    assert (basis.lost(4) > 1e-4).all()
    exact, less = basis.keep(5), basis.keep(4)
    assert np.abs(reconstruct(project(values, exact), exact) - values).max() < 1e-3
    error = reconstruct(project(values, less), less) - values
    # What is left out is what the basis says: mean squared error = variances beyond the rank.
    wanted = basis.variances[..., 4:].sum(axis=-1)
    assert np.allclose((error**2).sum(axis=-1).mean(axis=-1), wanted, rtol=1e-2)


def test_a_batch_axis_and_single_layers_are_the_same_numbers() -> None:
    values = sample()
    basis = fitted(values).keep(4)
    whole = project(values, basis)
    batch = project(np.stack([values, 2 * values]), basis)
    assert batch.shape == (2, LAYERS, HEADS, 200, 4)
    assert np.allclose(batch[0], whole, atol=1e-4)
    assert np.allclose(project(values[1], basis[1]), whole[1], atol=1e-5)
    assert np.allclose(project(values[:, 1], basis[:, 1]), whole[:, 1], atol=1e-5)
    # Tokens do not see each other: what a cache appended is what a page holds.
    assert np.allclose(project(values[:, :, 7:8], basis), whole[:, :, 7:8], atol=1e-4)


def test_covariances_side_by_side_are_those_of_each_head() -> None:
    values = sample()
    seen = CovarianceAccumulator(DIM, (LAYERS, HEADS))
    other = CovarianceAccumulator(DIM, (LAYERS, HEADS))
    seen.add(values[:, :, :50])
    other.add(values[:, :, 50:])
    seen.merge(other)
    again = CovarianceAccumulator.of_state({n: v.copy() for n, v in seen.state.items()})
    layout = CovarianceAccumulator.state_layout(DIM, (LAYERS, HEADS))
    assert {n: (v.shape, v.dtype.str) for n, v in seen.state.items()} == layout
    alone = CovarianceAccumulator(DIM)
    alone.add(values[2, 1])
    assert again.count == 200
    assert np.allclose(again.mean()[2, 1], alone.mean(), atol=1e-4)
    assert np.allclose(again.covariance()[2, 1], alone.covariance(), atol=1e-3)
    with pytest.raises(UnsupportedTensorError, match="shape"):
        seen.add(values[:2])


@pytest.mark.parametrize("axis", [-1, -2])
@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-30, 30), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_int8_is_within_half_a_scale(axis: int, scale: float, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    given = random.standard_normal((2, 1, tokens, 3)).astype(np.float32) * np.float32(2.0**scale)
    levels, scales = quantize(given, axis)
    assert levels.dtype == np.int8
    assert levels.shape == given.shape
    assert scales.shape[axis] == 1
    assert scales.dtype == np.float32
    assert (np.abs(dequantize(levels, scales) - given) <= 0.501 * scales).all()
    assert levels.max() <= 127
    assert levels.min() >= -127


def test_zeros_and_the_smallest_numbers_become_zeros() -> None:
    given = np.zeros((1, 1, 4, 2), dtype=np.float32)
    given[..., 1] = 1e-43
    levels, scales = quantize(given)
    assert not levels.any()
    assert np.isfinite(dequantize(levels, scales)).all()


def test_what_cannot_be_is_refused() -> None:
    basis = fitted(sample())
    with pytest.raises(UnsupportedTensorError, match=r"\(\.\.\., 3, 2, tokens, 8\) wanted"):
        project(np.zeros((LAYERS, HEADS, 4, DIM + 1), dtype=np.float32), basis)
    with pytest.raises(UnsupportedTensorError, match="wanted"):
        reconstruct(np.zeros((LAYERS, 1, 4, DIM), dtype=np.float32), basis)
    with pytest.raises(ConfigError, match="1 to 8"):
        basis.keep(9)
    with pytest.raises(UnsupportedTensorError, match="NaN"):
        quantize(np.full((1, 1, 2, 2), np.nan, dtype=np.float32))
    with pytest.raises(CalibrationCorruptError, match="differ"):
        HeadBasis(mean=basis.mean[:1], vectors=basis.vectors, variances=basis.variances)
