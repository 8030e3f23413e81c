"""The setting of a codec's knob that comes to a compression ratio."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kvferry.codec.lab.coding import Coded
from kvferry.codec.lab.knobs import Knob, Options
from kvferry.codec.lab.search import coarsest, coarsest_of
from kvferry.errors import OutOfReachError

# Beyond what is asked for by so much at most; `coarsest` stops 6 % below that.
_OVER = 1.03
_BUDGET = 12
# How far off a knob of many settings, and one of few, may end.
_NEAR, _NEAR_OF_FEW = 0.08, 0.2
_SAME = 0.01
Code = Callable[[Options], Coded]


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """A codec at a setting, and what it made of a text."""

    value: float
    options: Options
    coded: Coded

    @property
    def ratio(self) -> float:
        """fp16 bytes over bytes shipped."""
        return 2 * self.coded.values / self.coded.blob_bytes


def turned_to(knob: Knob, ratio: float, code: Code, start: float | None = None) -> Turned:
    """Code a text at the setting whose measured ratio is ``ratio``.

    Args:
        code: codes the text with options.
        start: where to begin, as from another text.
    Returns: within 8 % of the ratio; 20 % where a knob has but a few settings.
    Raises: OutOfReachError; what ``code`` raises.
    """
    seen: dict[float, Turned] = {}

    def measured(value: float) -> float:
        options = knob.options(value)
        before = list(seen.values())[-1:]
        seen[value] = Turned(value, options, code(options))
        if knob.free and before and _flat(before[0], seen[value]):
            raise _FlatError
        return seen[value].ratio

    with suppress(_FlatError):
        _search(knob, ratio, measured, start)
    best = min(seen.values(), key=lambda turned: abs(math.log(turned.ratio / ratio)))
    if not abs(best.ratio / ratio - 1) <= (_NEAR if knob.free else _NEAR_OF_FEW):
        raise _out_of_reach(knob, ratio, best)
    return best


class _FlatError(Exception):
    """Turning the knob further changes nothing more."""


def _flat(first: Turned, second: Turned) -> bool:
    turned = abs(math.log(second.value / first.value)) > math.log(2)
    return turned and abs(second.ratio / first.ratio - 1) < _SAME


def _search(
    knob: Knob, ratio: float, measured: Callable[[float], float], start: float | None
) -> None:
    if not knob.free:  # measures the settings on both sides of the ratio
        coarsest_of(measured, knob.settings, ratio)
        return
    if start is None:
        own = knob.option == "ratio"
        start = ratio if own else knob.settings[len(knob.settings) // 2]
    coarsest(measured, start, ratio * _OVER, _BUDGET)


def _out_of_reach(knob: Knob, ratio: float, nearest: Turned) -> OutOfReachError:
    shown = " ".join(f"{name}={value}" for name, value in nearest.options.items())
    allowed = f"within reach: the nearest is {nearest.ratio:.2f}x ({shown or 'its one setting'})"
    return OutOfReachError(f"ratio of {knob.codec}", ratio, allowed)
