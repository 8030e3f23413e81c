"""A knob is turned to a ratio in few measurements, or it is said that it cannot be."""

from collections.abc import Callable

import pytest

from kvferry.codec.lab.coding import Coded
from kvferry.codec.lab.experiment.ratio import turned_to
from kvferry.codec.lab.knobs import Knob, Options
from kvferry.errors import OutOfReachError

KNOB = Knob(codec="ferry", option="step", settings=(1.0,), free=True)
VALUES = 1_000_000


def coder(ratio: Callable[[float], float], asked: list[float]) -> Callable[[Options], Coded]:
    def code(options: Options) -> Coded:
        step = float(str(options["step"]))
        asked.append(step)
        return Coded([], VALUES, round(2 * VALUES / ratio(step)), 0.0, 0.0)

    return code


def test_a_smooth_knob_is_turned_there() -> None:
    asked: list[float] = []
    found = turned_to(KNOB, 10.0, coder(lambda step: 4 * step**0.5, asked))
    assert found.ratio == pytest.approx(10.0, rel=0.08)
    assert len(asked) <= 8


@pytest.mark.parametrize("wanted", [3.0, 4.0])
def test_a_ratio_that_is_leapt_over_is_out_of_reach(wanted: float) -> None:
    asked: list[float] = []
    leap = coder(lambda step: 6 * step**0.05 if step > 0.01 else 2.0, asked)
    with pytest.raises(OutOfReachError, match=rf"{wanted}.* nearest is [24]\."):
        turned_to(Knob(codec="ferry", option="step", settings=(0.02,), free=True), wanted, leap)
    assert len(asked) <= 12


def test_a_knob_that_changes_nothing_more_is_given_up_soon() -> None:
    asked: list[float] = []
    with pytest.raises(OutOfReachError, match=r"nearest is 8\.00x"):
        turned_to(KNOB, 50.0, coder(lambda step: min(8.0, 8 * step), asked))
    assert len(asked) <= 4
