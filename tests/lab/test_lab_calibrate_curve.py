"""The prediction: squared error in the space that the calibration weighs."""

import numpy as np
import pytest

from kvferry.codec.base import DType, FloatArray, PageTensors, Stream
from kvferry.codec.calibration import BundleCalibration, GroupCalibration, StreamPart
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.lab.curve import code_group, metric_of, weighted_error
from kvferry.codec.rope import RopeSpec, apply, positions_of

SPEC = RopeSpec(8, False, (1.0, 0.3, 0.1, 0.01))
TOKENS = (300, 500)


def group(diagonal: list[float]) -> GroupCalibration:
    """Two layers of one head of eight, each value weighed by ``diagonal``."""
    rng = np.random.default_rng(0)
    weight = np.broadcast_to(np.diag(diagonal), (2, 1, 8, 8)).astype(np.float32)
    basis, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    both = BundleCalibration(
        parts=tuple(StreamPart(name=name, heads=1, dim=8, weight=weight) for name in ("k", "v")),
        mean=np.zeros(32, np.float32),
        basis=basis.astype(np.float16),
        sigma=np.full(32, 2.0, np.float32),
    )
    return GroupCalibration(
        model_id=bytes(32),
        layers=(4, 6),
        heads=(0, 1),
        bundles={both.name: both},
        ropes={"k": (SPEC,) * 2},
    )


def page(k: FloatArray, v: FloatArray) -> PageTensors:
    rows = {"k": apply(k, SPEC, positions_of(TOKENS)), "v": v}
    streams = {n: Stream(n, x.astype(np.float32), DType.FLOAT32) for n, x in rows.items()}
    return PageTensors((4, 6), (0, 1), TOKENS, streams)


@pytest.mark.parametrize("name", ["k", "v"])
def test_an_error_counts_as_its_direction_is_weighed_before_rotation(name: str) -> None:
    known = group([3.0, 1, 1, 1, 1, 1, 1, 0.5])
    count = TOKENS[1] - TOKENS[0]
    exact = np.random.default_rng(1).standard_normal((2, 1, count, 8)).astype(np.float32)
    for index, weight in ((0, 3.0), (3, 1.0), (7, 0.5)):
        wrong = exact.copy()
        wrong[..., index] += 0.1
        found = weighted_error(
            page(exact, exact), page(wrong, wrong), name, known, metric_of(known)[name]
        )
        assert found == pytest.approx(2 * count * (0.1 * weight) ** 2, rel=1e-3)


def test_what_rounding_costs_is_what_theory_says() -> None:
    known = group([2.0, 1, 1, 1, 1, 1, 1, 0.5])
    rows = np.random.default_rng(2).standard_normal((2, 1, 200, 8)).astype(np.float32)
    step = 0.1
    coded = code_group([page(rows, rows)], FerryCodec(step, known), known)
    for name in ("k", "v"):
        # Every coefficient is rounded, whatever the weights: step**2 / 12 for each.
        assert coded.error[name] == pytest.approx(16 * step**2 / 12, rel=0.1)
        assert 3 < coded.bits[name] < 40
    assert set(coded.bits) == {"k", "v"}
