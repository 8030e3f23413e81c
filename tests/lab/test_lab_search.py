"""The search finds the coarsest setting that holds, in few measurements."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.codec.lab.search import CLOSE, coarsest, coarsest_of


class Counted:
    """An error that grows as a power, with its calls."""

    def __init__(self, scale: float, power: float) -> None:
        self.scale, self.power, self.asked = scale, power, list[float]()

    def __call__(self, value: float) -> float:
        self.asked.append(value)
        return self.scale * value**self.power


@given(
    scale=st.floats(1e-4, 1e4),
    power=st.floats(0.8, 3.5),
    start=st.floats(1e-3, 1e3),
    bound=st.floats(1e-3, 1.0),
)
def test_close_below_the_bound_for_any_power(
    scale: float, power: float, start: float, bound: float
) -> None:
    error = Counted(scale, power)
    best, _ = coarsest(error, start, bound, 40)
    assert best is not None
    assert best.error <= bound
    limit = (bound / scale) ** (1 / power)
    assert best.value <= limit * (1 + 1e-9)
    assert best.error >= (1 - CLOSE) * bound * (1 - 1e-9) or best.value > limit / 1.03


def test_few_measurements_where_the_start_is_near() -> None:
    error = Counted(1.0, 1.6)
    best, _ = coarsest(error, 0.9, 0.5, 8)
    assert best is not None
    assert len(error.asked) <= 4


def test_an_error_that_falls_to_nothing_is_followed_to_coarser_settings() -> None:
    """As perplexity does, which may fall below the exact cache's."""
    best, _ = coarsest(lambda value: -1.0 if value < 3 else value - 3, 1.0, 0.5, 12)
    assert best is not None
    assert 3.0 <= best.value <= 3.5


def test_numbers_that_are_none_do_not_hold() -> None:
    best, finest = coarsest(lambda value: math.nan, 1.0, 0.5, 5)
    assert best is None
    assert finest.value == pytest.approx(4.0**-4)
    best, _ = coarsest_of(lambda value: math.nan, [8, 4, 2], 0.5)
    assert best is None


def test_out_of_reach_says_how_far_it_came() -> None:
    best, finest = coarsest(lambda value: 1.0 + value, 1.0, 0.5, 6)
    assert best is None
    assert finest.error == pytest.approx(1.0 + finest.value)


@pytest.mark.parametrize(("bound", "wanted"), [(0.5, 8), (1.5, 4), (2.5, 3), (3.5, 2), (9, 2)])
def test_settings_from_fine_to_coarse(bound: float, wanted: float) -> None:
    errors = {8: 0.1, 4: 1.0, 3: 2.0, 2: 3.0}
    asked = []

    def error(value: float) -> float:
        asked.append(value)
        return errors[int(value)]

    best, _ = coarsest_of(error, list(errors), bound)
    assert best is not None
    assert (best.value, best.error) == (wanted, errors[int(wanted)])
    assert len(asked) <= 3


def test_no_setting_holds() -> None:
    best, finest = coarsest_of(lambda value: 10.0 / value, [8, 4, 2], 0.1)
    assert best is None
    assert (finest.value, finest.error) == (8, 1.25)
