"""The strongest directions alone are as good as the best ones."""

import numpy as np
import pytest

from kvferry.codec.base import FloatArray
from kvferry.codec.eigen import strongest


def covariance(width: int, octaves: float) -> FloatArray:
    """Of random directions whose variances fall by so many octaves from end to end."""
    random = np.random.default_rng(7)
    vectors = np.linalg.qr(random.standard_normal((width, width)))[0]
    variances = np.exp2(-octaves * np.arange(width) / width)
    whole = (vectors * variances) @ vectors.T
    return ((whole + whole.T) / 2).astype(np.float32)


@pytest.mark.parametrize("octaves", [0.0, 6.0, 17.0, 30.0])
def test_a_few_of_many_hold_what_the_best_would(octaves: float) -> None:
    given = covariance(800, octaves)
    variances, vectors = strongest(given, 200)
    best = np.linalg.eigvalsh(given.astype(np.float64))[::-1][:200]
    assert vectors.shape == (800, 200)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(200), atol=5e-6)
    assert (np.diff(variances) <= 0).all()
    held = np.einsum("ij,ij->j", vectors, given @ vectors)
    np.testing.assert_allclose(held, variances, atol=2e-6 * variances[0])
    assert held.sum() > (1 - 1e-3) * best.sum()
    if octaves >= 17:  # as what models cache does
        assert held.sum() > (1 - 1e-4) * best.sum()
        np.testing.assert_allclose(variances[:100], best[:100], rtol=1e-2, atol=1e-6)


def test_most_of_them_are_exact() -> None:
    given = covariance(120, 10)
    variances, vectors = strongest(given, 100)
    expected, directions = np.linalg.eigh(given)
    np.testing.assert_array_equal(variances, expected[::-1][:100])
    np.testing.assert_array_equal(vectors, directions[:, ::-1][:, :100])


def test_they_are_the_same_again() -> None:
    given = covariance(600, 17)
    first, again = strongest(given, 100), strongest(given.copy(), 100)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fewer_directions_than_wanted_are_there() -> None:
    """Rows of rank 10: what is beyond has no variance, and is orthonormal all the same."""
    rows = np.random.default_rng(2).standard_normal((10, 600)).astype(np.float32)
    given = rows.T @ rows
    variances, vectors = strongest(given, 100)
    assert (np.abs(variances[10:]) < 1e-4 * variances[0]).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(100), atol=5e-6)
    held = float(np.einsum("ij,ij->", vectors, given @ vectors))
    assert held == pytest.approx(float(np.trace(given)), rel=1e-5)
