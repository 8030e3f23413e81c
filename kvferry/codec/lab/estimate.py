"""A curve where nothing was measured: what a calibration's own numbers allow to say.

Identity weights know how large an error is, and not what it costs the model. So that is
taken from what share of the cache's variance a step loses, with a margin: coarse, and on
the safe side.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.lab.calibrate import steps_for_bits

ESTIMATED_BITS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
# KL = _NATS * loss ** _POWER. SmolLM2-135M with identity weights, losses of 2e-4 to 0.06
# on source code, prose and chat: the worst of the three stays below with 0.12; half as
# much again is the margin. What fine steps cost is mostly what lies outside the basis,
# hence a power below 1. A calibration that measures needs none of this.
_NATS, _POWER = 0.18, 0.44


def estimated_curve(
    groups: Sequence[GroupCalibration], bits: Sequence[float] = ESTIMATED_BITS
) -> tuple[CurvePoint, ...]:
    """Points to choose a step from, of groups with identity weights."""
    sigma = np.concatenate(
        [bundle.sigma for group in groups for bundle in group.bundles.values()]
    ).astype(np.float64)
    variance = float((sigma**2).sum())
    return tuple(
        CurvePoint(step, wanted, _NATS * lost_share(sigma, step, variance) ** _POWER)
        for wanted, step in zip(sorted(bits), steps_for_bits(groups, sorted(bits)), strict=True)
    )


def lost_share(sigma: npt.NDArray[np.float64], step: float, of: float) -> float:
    """Squared error of coefficients rounded to ``step``, as a share of their variance."""
    if of <= 0 or not math.isfinite(of):
        return 0.0
    return float(np.minimum(sigma**2, step**2 / 12).sum()) / of
