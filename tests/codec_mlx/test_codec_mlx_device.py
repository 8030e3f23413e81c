"""Products on MLX's device give what numpy gives, from any thread."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from kvferry.codec.basis import Basis, row_weight
from kvferry.codec.mlx.device import DeviceProducts, device_products
from kvferry.codec.transform import Fold, fold, project, reconstruct

WIDTH, RANK, TOKENS = 192, 80, 100


def made(products: DeviceProducts | None) -> Fold:
    rng = np.random.default_rng(5)
    vectors, _ = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))
    sigma = np.geomspace(10, 0.01, RANK).astype(np.float32)
    basis = Basis(rng.standard_normal(WIDTH).astype(np.float32), vectors.astype(np.float32), sigma)
    weight = rng.standard_normal((3, 1, 64, 64)) * 0.05 + np.eye(64)
    return fold(basis, [row_weight(weight.astype(np.float32))], products)


def rows() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 33, RANK])
def test_the_device_gives_the_hosts_result(rank: int) -> None:
    host, device = made(None), made(DeviceProducts())
    expected, found = project(rows(), host, rank), project(rows(), device, rank)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    augmented = np.concatenate([np.ones((TOKENS, 1), np.float32), expected], axis=1)
    for part in (slice(None), slice(64, 128)):
        back, there = reconstruct(augmented, host, part), reconstruct(augmented, device, part)
        assert there.shape == back.shape
        assert np.abs(there - back).max() <= 1e-4 * np.abs(back).max()


def test_threads_other_than_the_models_may_use_it() -> None:
    device = made(DeviceProducts())
    expected = project(rows(), made(None), RANK)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: project(rows(), device, RANK), range(8)):
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_cpu_is_left_to_numpy() -> None:
    chosen = device_products()
    assert (chosen is not None) == (mx.default_device().type == mx.gpu)
