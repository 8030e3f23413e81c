"""The coarsest setting that keeps an error within a bound, found in few measurements."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Error = Callable[[float], float]
# An error this little below the bound is close enough: what is left to gain is 1-2 % of
# the bytes, less than texts differ by.
CLOSE = 0.06
_NARROW = math.log(1.02)
_FACTOR = 4.0  # a step into the unknown is at most so long


@dataclass(frozen=True, slots=True)
class Found:
    """A setting and the error measured with it."""

    value: float
    error: float


def coarsest(error: Error, start: float, bound: float, budget: int) -> tuple[Found | None, Found]:
    """Over all numbers above 0, of which a larger one is coarser.

    Errors are taken to grow about as a power of the setting, so the search interpolates
    where both axes are logarithmic, and halves the interval where it cannot.

    Args:
        error: measures a setting; need not rise everywhere.
        start: where to begin.
        budget: measurements allowed.
    Returns: the largest value measured whose error is at most ``bound``, None where
        there was none, and the finest one measured.
    """
    seen: list[Found] = []
    value = start
    for _ in range(budget):
        seen.append(Found(value, error(value)))
        good, bad = _bracket(seen, bound)
        if good is not None and good.error >= (1 - CLOSE) * bound:
            break
        if good is not None and bad is not None and math.log(bad.value / good.value) < _NARROW:
            break
        value = _next(good, bad, bound * (1 - CLOSE / 2), _power(seen))
    return _bracket(seen, bound)[0], min(seen, key=lambda found: found.value)


def _bracket(seen: Sequence[Found], bound: float) -> tuple[Found | None, Found | None]:
    """The coarsest that holds, and the finest beyond it that does not."""
    good = max((f for f in seen if f.error <= bound), key=lambda f: f.value, default=None)
    # An error that is no number does not hold either.
    beyond = [f for f in seen if not f.error <= bound and (good is None or f.value > good.value)]
    return good, min(beyond, key=lambda f: f.value, default=None)


def _next(good: Found | None, bad: Found | None, aim: float, power: float) -> float:
    if good is not None and bad is not None:
        low, high = math.log(good.value), math.log(bad.value)
        share = 0.5
        if 0 < good.error < aim < bad.error:
            share = math.log(aim / good.error) / math.log(bad.error / good.error)
        return math.exp(low + (high - low) * min(max(share, 0.1), 0.9))
    known, reach = (good, _FACTOR) if good is not None else (bad, 1 / _FACTOR)
    if known is None:
        raise ValueError("nothing was measured")
    if math.isfinite(known.error) and known.error > 0:
        factor = math.exp(math.log(aim / known.error) / power)
    else:
        factor = reach
    return known.value * min(max(factor, 1 / _FACTOR), _FACTOR)


def _power(seen: Sequence[Found]) -> float:
    """What power of the setting the error grew by over the last two measurements."""
    last = [f for f in seen[-2:] if math.isfinite(f.error) and f.error > 0]
    if len(last) < 2 or last[0].value == last[1].value:
        return 2.0  # small errors cost KL in proportion to their square
    rise = math.log(last[1].error / last[0].error) / math.log(last[1].value / last[0].value)
    return min(max(rise, 1.0), 4.0)


def coarsest_of(
    error: Error, settings: Sequence[float], bound: float
) -> tuple[Found | None, Found]:
    """Over a few settings, given from fine to coarse; errors are taken to rise.

    Returns: as `coarsest`; the finest is measured if none before it holds.
    """
    best: Found | None = None
    low, high = 0, len(settings) - 1
    finest: tuple[int, Found] | None = None
    while low <= high:
        middle = (low + high) // 2
        found = Found(settings[middle], error(settings[middle]))
        if finest is None or middle < finest[0]:
            finest = (middle, found)
        if found.error <= bound:
            best, low = found, middle + 1
        else:
            high = middle - 1
    if finest is None:
        raise ValueError("no settings")
    return best, finest[1]


def last_of(error: Error, settings: Sequence[float], bound: float) -> tuple[Found | None, Found]:
    """The last of a few settings that holds, where errors need not rise; asked from the last.

    Returns: as `coarsest`; the first is what was measured last if none holds.
    """
    if not settings:
        raise ValueError("no settings")
    for setting in reversed(settings):
        found = Found(setting, error(setting))
        if found.error <= bound:
            return found, found
    return None, found
