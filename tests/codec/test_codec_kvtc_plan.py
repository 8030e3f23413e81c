"""The dynamic program against brute force, and plans as they are written."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.kvtc_plan import (
    BITS,
    SIZES,
    BitPlan,
    Errors,
    Group,
    best_plans,
    budget_for,
)
from kvferry.errors import ConfigError

Table = Mapping[tuple[int, int], Errors]


def every_plan(energy: Errors, errors: Table) -> tuple[Errors, Errors]:
    """Cost and error of every way to cut the components into groups of every width."""
    options = [(Group(1, 0), energy), *((Group(*key), errors[key]) for key in errors)]
    ends: list[tuple[Errors, Errors]] = [(np.zeros(1), np.zeros(1))]
    for start in range(len(energy) - 1, -1, -1):
        fit = [(g, e[start]) for g, e in options if g.size <= len(ends)]
        ends.append(
            (
                np.concatenate([ends[-g.size][0] + g.cost for g, _ in fit]),
                np.concatenate([ends[-g.size][1] + error for g, error in fit]),
            )
        )
    return ends[-1]


def error_of(groups: tuple[Group, ...], energy: Errors, errors: Table) -> float:
    total, start = 0.0, 0
    for size, bits in groups:
        total += float(errors[size, bits][start] if bits else energy[start])
        start += size
    return total + float(energy[start:].sum())


def table(rng: np.random.Generator, rank: int, keys: list[tuple[int, int]]) -> tuple[Errors, Table]:
    """Errors of no particular order, so that greedy choices are wrong."""
    energy = rng.exponential(10.0, rank)
    errors = {}
    for size, bits in keys:
        parts = np.array([energy[s : s + size].sum() for s in range(rank - size + 1)])
        errors[size, bits] = parts * rng.uniform(0.0, 1.5, len(parts)) / 2**bits
    return energy, errors


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("rank", "keys"),
    [
        (1, [(1, 2), (1, 8)]),
        (8, [(1, 2), (1, 4), (1, 8)]),
        (16, [(1, 2), (16, 2), (16, 4), (16, 8)]),
        (18, [(16, 2), (16, 4), (16, 8), (1, 4)]),
        (70, [(16, 2), (16, 4), (16, 8), (64, 2), (64, 4)]),
    ],
)
def test_no_plan_within_the_budget_is_better(
    rank: int, keys: list[tuple[int, int]], seed: int
) -> None:
    energy, errors = table(np.random.default_rng(seed), rank, keys)
    costs, found = every_plan(energy, errors)
    budgets = [0, 31, 33, 34, 67, 68, 100, 161, 200, 257, 400, 2000]
    for budget, plan in zip(budgets, best_plans(energy, errors, budgets), strict=True):
        assert plan.bits <= budget
        mine = error_of(plan.groups, energy, errors)
        assert mine == pytest.approx(found[costs <= budget].min(), rel=1e-12)


def test_a_group_starts_only_where_it_may() -> None:
    energy = np.ones(33)
    offered = np.full(18, np.inf)
    offered[[0, 16]] = 0.1
    (plan,) = best_plans(energy, {(16, 2): offered}, [10_000])
    assert plan.groups == (Group(16, 2), Group(16, 2))
    offered[0] = np.inf
    (plan,) = best_plans(energy, {(16, 2): offered}, [10_000])
    assert plan.groups == (*[Group(1, 0)] * 16, Group(16, 2))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), budgets=st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_one_search_serves_all_budgets(seed: int, budgets: list[int]) -> None:
    keys = [(size, bits) for size in (1, 16, 64) for bits in (2, 4, 8)]
    energy, errors = table(np.random.default_rng(seed), 80, keys)
    together = best_plans(energy, errors, budgets)
    assert together == [best_plans(energy, errors, [budget])[0] for budget in budgets]
    lost = [error_of(plan.groups, energy, errors) for plan in together]
    order = np.argsort(budgets)
    assert (np.diff(np.array(lost)[order]) <= 1e-9).all()


def test_a_whole_model_is_planned() -> None:
    """5,760 components, every start offered: SmolLM2-135M."""
    energy = np.geomspace(1e3, 1e-2, 5760)
    sums = np.concatenate([[0], np.cumsum(energy)])
    loss = {2: 0.12, 4: 0.01, 8: 4e-5}
    errors = {
        (size, bits): (sums[size:] - sums[:-size]) * loss[bits] * (1 + np.log2(size) / 8)
        for size in SIZES
        for bits in BITS
        if bits
    }
    budgets = [budget_for(ratio, 5760) for ratio in (4, 8, 16)]
    assert budgets == [23_040, 11_520, 5_760]
    plans = best_plans(energy, errors, budgets)
    for budget, plan in zip(budgets, plans, strict=True):
        assert 0.99 * budget < plan.bits <= budget
    assert plans[0].rank > plans[1].rank > plans[2].rank


PLAN = BitPlan((Group(1, 8), Group(1, 8), Group(16, 4), Group(1, 0), Group(64, 2)))


def test_a_plan_counts_its_bits() -> None:
    assert PLAN.rank == 83
    assert PLAN.bits == 2 * (8 + 32) + (16 * 4 + 32) + 0 + (64 * 2 + 32)
    assert [group.bits for group in PLAN.stored] == [8, 8, 4, 2]


def test_a_plan_is_written_as_runs_and_comes_back() -> None:
    assert PLAN.to_json() == [[8, 1, 2], [4, 16, 1], [0, 1, 1], [2, 64, 1]]
    assert BitPlan.from_json(PLAN.to_json()) == PLAN
    assert BitPlan.from_json([]) == BitPlan(())


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        "8:1",
        [8, 1, 2],
        [[8, 1]],
        [[8, 1, 0]],
        [[8, 1, -1]],
        [[8, 1, True]],
        [[8, 1, 1.0]],
        [[3, 1, 1]],
        [[8, 17, 1]],
        [[8, 1, 1 << 60]],
        [[2, 1024, 65]],
        [[8, 1, 1], None],
    ],
)
def test_what_is_no_plan_is_refused_before_it_is_built(value: object) -> None:
    with pytest.raises(ConfigError):
        BitPlan.from_json(value)


def test_groups_of_other_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="plan"):
        BitPlan((Group(2, 2),))
