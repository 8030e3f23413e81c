"""How far a share that was counted can be trusted."""

import math
from collections.abc import Sequence

import numpy as np

# Two-sided 95 % of the normal distribution.
Z95 = 1.959963984540054


def wilson(hits: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share; (0, 1) where nothing was tried.

    Unlike the plain normal interval it keeps its promise at few trials and near 0 and 1.

    Source: Wilson, "Probable inference", JASA 22 (1927), p. 209; Brown, Cai and DasGupta,
    Statistical Science 16 (2001), eq. 4.
    """
    if trials < 1:
        return 0.0, 1.0
    share, square = hits / trials, z * z
    middle = share + square / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    # At 0 and at 1 the two terms cancel but for rounding.
    low = 0.0 if hits == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if hits == trials else min(1.0, (middle + half) / scale)
    return low, high


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean difference ``first - second`` over the same examples.

    Examples differ in how hard they are: drawing them as pairs leaves that out.

    Source: percentile bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap
    (1993), chapter 13.
    """
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not gaps.size:
        return 0.0, 0.0
    picked = np.random.default_rng(seed).integers(0, gaps.size, (draws, gaps.size))
    low, high = np.quantile(gaps[picked].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
