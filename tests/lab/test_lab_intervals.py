"""Intervals against published and exact figures."""

import numpy as np
import pytest

from kvferry.codec.lab.intervals import Z95, paired_difference, wilson


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


def pairs(both: int, first: int, second: int, none: int) -> tuple[list[bool], list[bool]]:
    """Right in both, in the first alone, in the second alone, in none."""
    return (
        [True] * (both + first) + [False] * (second + none),
        [True] * both + [False] * first + [True] * second + [False] * none,
    )


@pytest.mark.parametrize(
    ("first", "second", "others"), [(12, 2, 36), (2, 12, 36), (7, 1, 13), (0, 5, 31), (3, 3, 30)]
)
def test_a_difference_of_pairs_has_the_published_interval(
    first: int, second: int, others: int
) -> None:
    low, high = paired_difference(*pairs(others, first, second, 0))
    assert -1 < low < (first - second) / (first + second + others) < high < 1
    # Only pairs that differ count, and the other way round it is mirrored.
    assert paired_difference(*pairs(0, first, second, others)) == (low, high)
    mirrored = paired_difference(*pairs(others, second, first, 0))
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)
    # Yang, Sun and Hardin, Statistics in Medicine 32 (2013), p. 1336: both ends are roots.
    n, b, c, g = first + second + others, first, second, Z95**2
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
            2 * n * (b - c) ** 2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
            n * (b - c) * (2 * (b + c) / g + 1) - (b - c) ** 3 * (4 * n / g + 1) / g,
            (b - c) ** 2 * ((b - c) ** 2 / g - (b + c)) / g,
        ]
    )
    for end in (low, high):
        assert min(abs(roots - end)) < 1e-6


def test_pairs_that_never_differ_leave_room_for_a_difference() -> None:
    for both in (0, 20, 50):
        low, high = paired_difference(*pairs(both, 0, 0, 50 - both))
        assert high == pytest.approx(Z95**2 / (50 + Z95**2))
        assert low == pytest.approx(-high)
    assert paired_difference([], []) == (-1.0, 1.0)


def test_pairs_leave_out_what_is_hard_for_both() -> None:
    low, high = paired_difference(*pairs(0, 50, 0, 50))
    assert 0.39 < low < 0.5 < high < 0.61
