"""Intervals against published and exact figures."""

import pytest

from kvferry.codec.lab.intervals import paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    hits: int, trials: int, low: float, high: float
) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)
    mirrored = wilson(trials - hits, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_nothing_tried_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_pairs_leave_out_what_is_hard_for_both() -> None:
    first, second = [1.0, 0.0] * 50, [0.0, 0.0] * 50
    low, high = paired_bootstrap(first, second)
    assert 0.39 < low < 0.5 < high < 0.61
    assert paired_bootstrap(first, first) == (0.0, 0.0)
    assert paired_bootstrap([], []) == (0.0, 0.0)
