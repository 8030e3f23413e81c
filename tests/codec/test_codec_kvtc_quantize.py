"""Levels, shifts and scales: how near they are, and how they are packed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.kvtc_pack import ENTROPIES, pack, raw_size, unpack
from kvferry.codec.kvtc_plan import BitPlan, Group
from kvferry.codec.kvtc_quantize import dequantize, measured_errors, quantize
from kvferry.errors import UnsupportedTensorError

GROUPS = st.builds(Group, st.sampled_from([1, 16, 64]), st.sampled_from([0, 2, 4, 8]))
PLANS = st.lists(GROUPS, min_size=1, max_size=8).map(lambda groups: BitPlan(tuple(groups)))


@settings(max_examples=60, deadline=None)
@given(
    plan=PLANS,
    tokens=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 0.01, 1.0, 300.0]),
    offset=st.sampled_from([0.0, -40.0]),
    entropy=st.sampled_from(ENTROPIES),
    seed=st.integers(0, 99),
)
def test_every_coefficient_is_within_half_a_level(
    plan: BitPlan, tokens: int, scale: float, offset: float, entropy: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((tokens, plan.rank + 3)) * scale + offset).astype(np.float32)
    packed = pack(quantize(z, plan, "k"), entropy)
    out = np.full((tokens, plan.rank), np.nan, dtype=np.float32)
    dequantize(unpack(packed, plan, tokens, entropy, "k"), plan, out)
    first = 0
    for size, bits in plan.groups:
        part, back = z[:, first : first + size], out[:, first : first + size]
        first += size
        if not bits:
            assert not back.any()
            continue
        low, high = part.min(axis=1), part.max(axis=1)
        step = (high - low) / (2**bits - 1)
        # shift and scale are float16: rounded, and coarser below its normal range
        rounding = 2.0**-10 * np.maximum(abs(low), high - low) + 2**bits * 2.0**-24
        assert (abs(back - part) <= (step / 2 + rounding)[:, None] * 1.001).all()


def test_levels_take_the_bits_that_they_are_said_to_take() -> None:
    plan = BitPlan((Group(16, 8), Group(1, 0), Group(64, 4), Group(1024, 2)))
    z = np.random.default_rng(0).standard_normal((256, plan.rank), dtype=np.float32)
    q = quantize(z, plan, "v")
    assert raw_size(plan, 256) == 256 * plan.bits // 8
    assert {bits: levels.shape for bits, levels in q.levels.items()} == {
        8: (16, 256),
        4: (64, 256),
        2: (1024, 256),
    }
    assert all(int(levels.max()) == 2**bits - 1 for bits, levels in q.levels.items())
    assert q.shift.shape == q.scale.shape == (3, 256)


def test_outliers_of_one_token_do_not_coarsen_the_others() -> None:
    """Every token has its own scale."""
    plan = BitPlan((Group(64, 4),))
    z = np.random.default_rng(0).standard_normal((32, 64), dtype=np.float32)
    z[7] *= 1000
    out = np.empty_like(z)
    dequantize(quantize(z, plan, "k"), plan, out)
    error = np.abs(out - z).max(axis=1)
    assert error[7] > 50
    assert np.delete(error, 7).max() < 0.3


def test_measured_errors_are_those_of_the_quantizer() -> None:
    rng = np.random.default_rng(1)
    z = (rng.standard_normal((50, 80)) * np.geomspace(4, 0.1, 80)).astype(np.float32)
    energy, errors = measured_errors(z)
    assert np.allclose(energy, np.square(z).sum(axis=0) / 50, rtol=1e-5)
    for start, size, bits in ((0, 16, 4), (16, 16, 2), (64, 16, 8), (16, 64, 2)):
        plan = BitPlan((Group(size, bits),))
        out = np.empty((50, size), dtype=np.float32)
        part = np.ascontiguousarray(z[:, start : start + size])
        dequantize(quantize(part, plan, "k"), plan, out)
        wanted = float(np.square(out - part).sum()) / 50
        assert errors[size, bits][start] == pytest.approx(wanted, rel=1e-4)
    assert np.isinf(errors[16, 2][[1, 15, 17]]).all()
    assert (errors[1, 2] < 1e-5).all()
    assert (256, 2) not in errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e6])
def test_what_float16_cannot_carry_is_refused(bad: float) -> None:
    z = np.zeros((4, 16), dtype=np.float32)
    z[2, 5] = bad
    with pytest.raises(UnsupportedTensorError, match="'k'"):
        quantize(z, BitPlan((Group(16, 2),)), "k")
    quantize(z, BitPlan((Group(16, 0),)), "k")
