"""How far a share that was counted can be trusted."""

import math
from collections.abc import Callable, Sequence

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


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], z: float = Z95
) -> tuple[float, float]:
    """Score interval of ``share(first) - share(second)`` over the same examples.

    Examples differ in how hard they are: only those that came out differently count. Where
    none did, resampling would say that the difference is certainly 0; this does not.

    Returns: 95 % by default, within (-1, 1); (-1, 1) where there are no examples.
    Source: Tango, Statistics in Medicine 17 (1998), p. 891.
    """
    count = len(first)
    gained = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    if not count:
        return -1.0, 1.0

    def score(gap: float) -> float:
        """Falls as ``gap`` rises; 0 where it is what was seen."""
        linear = (2 * count - gained + lost) * gap - gained - lost
        square = linear * linear + 8 * count * lost * gap * (1 - gap)
        chance = (math.sqrt(max(0.0, square)) - linear) / (4 * count)  # of being lost
        variance = count * (2 * chance + gap * (1 - gap))
        away = gained - lost - count * gap
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away)

    seen = (gained - lost) / count
    return _crossing(score, -1.0, seen, z), _crossing(score, seen, 1.0, -z)


def _crossing(score: Callable[[float], float], low: float, high: float, wanted: float) -> float:
    """Where a falling function of ``low`` to ``high`` comes to ``wanted``."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > wanted else (low, middle)
    return (low + high) / 2
