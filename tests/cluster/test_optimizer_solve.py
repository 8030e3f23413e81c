"""The optimizer against brute force, and what must hold for any cluster."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_samples import GB, MB, curve, holder, random_curve

from kvferry.cluster.optimizer.frontier import make_frontier
from kvferry.cluster.optimizer.ladder import AFFINE, EXACT, Choice, ferry_step, make_ladder
from kvferry.cluster.optimizer.problem import Problem, make_problem
from kvferry.cluster.optimizer.solve import Plan, plan_of, solve

LIMIT = 1e-7


def small(rng: np.random.Generator, groups: int, choices: int) -> Problem:
    """Two or three nodes whose groups have so few choices that all can be tried."""
    ladder = make_ladder(random_curve(rng, groups))
    some = np.sort(rng.choice(len(ladder.choices) - 1, choices - 1, replace=False))
    kept = np.r_[some, len(ladder.choices) - 1]  # the exact one is always there
    ladder = replace(
        ladder,
        choices=tuple(ladder.choices[at] for at in kept),
        bits=ladder.bits[:, kept],
        kl=ladder.kl[:, kept],
        count=choices,
    )
    nodes = int(rng.integers(2, 4))
    share = np.zeros((nodes, groups))
    for group in range(groups):
        first, second = rng.choice(nodes, 2, replace=False)
        part = float(rng.choice([0.25, 0.5, 1.0]))
        share[first, group], share[second, group] = part, 1 - part
    return Problem(
        ladder=ladder,
        share=share,
        bandwidth=10 ** rng.uniform(6, 9, nodes),
        waits=rng.uniform(0, 0.05, nodes),
        budget=float(10 ** rng.uniform(-4, -1)),
    )


def best_of_all(problem: Problem) -> float:
    """The least deadline of all choices that keep the budget."""
    held = list(zip(*np.nonzero(problem.share), strict=True))
    best = np.inf
    for columns in itertools.product(range(len(problem.ladder.choices)), repeat=len(held)):
        choice = np.zeros(problem.share.shape, dtype=np.int64)
        for (node, group), column in zip(held, columns, strict=True):
            choice[node, group] = column
        plan = plan_of(problem, choice)
        if plan.kl <= problem.budget:
            best = min(best, plan.deadline)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better_than_what_was_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = small(rng, groups=int(rng.integers(1, 4)), choices=5)
    plan = solve(problem, spread=np.inf)
    best = best_of_all(problem)
    assert plan.kl <= problem.budget * (1 + LIMIT)
    assert plan.deadline == pytest.approx(best, rel=1e-6)


def slowest_of(problem: Problem, node: int) -> dict[float, tuple[float, float]]:
    """KL -> bits and least time of a node's choices: never less than those with fewer bits."""
    held = np.flatnonzero(problem.share[node])
    alone = replace(problem, share=problem.share * (np.arange(len(problem.share)) == node)[:, None])
    found = []
    for columns in itertools.product(range(len(problem.ladder.choices)), repeat=len(held)):
        choice = np.zeros(problem.share.shape, dtype=np.int64)
        choice[node, held] = columns
        plan = plan_of(alone, choice)
        found.append((plan.bits[node], plan.kl, plan.seconds[node]))
    left, least, latest = {}, np.inf, 0.0
    for bits, kl, seconds in sorted(found):
        if kl < least:
            least, latest = kl, max(latest, seconds)
            left[kl] = (bits, latest)
    return left


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_is_better_where_codecs_take_unlike_long_to_decode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = unlike_codecs(small(rng, groups=int(rng.integers(1, 4)), choices=5), rng)
    plan = solve(problem, spread=np.inf)
    assert plan.kl <= problem.budget * (1 + LIMIT)
    each = [slowest_of(problem, node) for node in range(len(problem.share))]
    best = np.inf
    for kls in itertools.product(*each):
        if sum(kls) <= problem.budget:
            best = min(best, max(of[kl][1] for of, kl in zip(each, kls, strict=True)))
    assert plan.bound == pytest.approx(best, rel=1e-6)
    assert plan.deadline <= plan.bound * (1 + 1e-12)


def unlike_codecs(problem: Problem, rng: np.random.Generator) -> Problem:
    """Nodes whose codecs differ by as much as a link does."""
    codecs = sorted({choice.codec for choice in problem.ladder.choices})
    each = 10 ** rng.uniform(-9.5, -6.5, (len(problem.share), len(codecs)))
    column = [codecs.index(choice.codec) for choice in problem.ladder.choices]
    return replace(problem, decode=each[:, column])


@pytest.mark.parametrize("seed", range(20))
def test_walking_along_hulls_is_as_good_as_all_combinations_but_for_one_rung(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ladder = make_ladder(random_curve(rng, 3))
    problem = make_problem(ladder, [holder("a", (0, 3))], 0.01)
    exact = make_frontier(problem)
    many = make_problem(ladder, [holder(f"n{i}", (0, 3)) for i in range(20)], 0.01)
    hull = make_frontier(many)  # too many nodes to try everything
    for bits in np.linspace(exact.bits[0, 0], exact.bits[0][np.isfinite(exact.bits[0])].max(), 50):
        best = exact.kl[0, exact.within(np.array([bits]))[0]]
        point = int(hull.within(np.full(20, bits))[0])
        found = hull.kl[0, point]
        assert found >= best * (1 - 1e-9) - 1e-15
        # One more segment of the hulls would be more than fits, and no worse than the best.
        after = hull.kl[0, min(point + 1, hull.kl.shape[1] - 1)]
        assert after <= best * (1 + 1e-9) + 1e-15


_cases = st.integers(0, 2**32 - 1)


def cluster(seed: int) -> Problem:
    """Any cluster, also one too large for combinations."""
    rng = np.random.default_rng(seed)
    groups, nodes = int(rng.integers(1, 8)), int(rng.integers(1, 24))
    ladder = make_ladder(random_curve(rng, groups))
    share = rng.dirichlet(np.ones(nodes), groups).T * (rng.random((nodes, groups)) < 0.6)
    share[0] += 1 - share.sum(axis=0)
    return Problem(
        ladder=ladder,
        share=share,
        bandwidth=10 ** rng.uniform(5, 10, nodes),
        waits=rng.uniform(0, 0.1, nodes) * (rng.random(nodes) < 0.5),
        budget=float(10 ** rng.uniform(-5, 0)),
    )


def kept(plan: Plan) -> bool:
    return plan.kl <= plan.problem.budget * (1 + LIMIT) + 1e-12


@given(_cases)
@settings(max_examples=60, deadline=None)
def test_the_budget_is_kept(seed: int) -> None:
    assert kept(solve(cluster(seed)))


@given(_cases, st.integers(0, 23), st.floats(1.0, 1000.0), st.booleans())
@settings(max_examples=80, deadline=None)
def test_more_bandwidth_never_makes_a_restore_slower(
    seed: int, which: int, more: float, unlike: bool
) -> None:
    problem = cluster(seed)
    if unlike:
        problem = unlike_codecs(problem, np.random.default_rng(seed))
    wider = problem.bandwidth.copy()
    wider[which % len(wider)] *= more
    before, after = solve(problem), solve(replace(problem, bandwidth=wider))
    assert after.bound <= before.bound * (1 + LIMIT)
    assert after.deadline <= after.bound


@given(_cases, st.floats(1.0, 1000.0), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_larger_budget_never_gives_a_node_larger_blobs(
    seed: int, more: float, unlike: bool
) -> None:
    problem = cluster(seed)
    if unlike:
        problem = unlike_codecs(problem, np.random.default_rng(seed))
    before = solve(problem)
    after = solve(replace(problem, budget=problem.budget * more))
    assert (after.bits <= before.bits * (1 + LIMIT)).all()
    assert after.bound <= before.bound * (1 + LIMIT)
    assert unlike or after.deadline <= before.deadline * (1 + LIMIT)
    assert kept(after)


def test_a_node_behind_a_slow_link_is_coded_coarsely_and_the_one_beside_the_store_finely() -> None:
    ladder = make_ladder(curve(), 0.02)
    holders = [holder("studio", (0, 4), GB), holder("laptop", (4, 8), 4 * MB)]
    problem = make_problem(ladder, holders, 0.02)
    plan = solve(problem)
    alike = plan_of(problem, np.full((2, 2), ladder.alike))
    assert plan.bits[1] < alike.bits[1]
    assert plan.bits[0] > alike.bits[0]
    assert plan.deadline < 0.9 * alike.deadline
    assert plan.bits[0] <= 4 * plan.bits[1] * 1.001  # and not finer than makes a difference


def test_equal_links_code_equally() -> None:
    ladder = make_ladder(curve())
    plan = solve(make_problem(ladder, [holder("a", (0, 4)), holder("b", (4, 8))], 0.01))
    assert plan.bits[0] == plan.bits[1]


def test_a_group_that_costs_too_much_is_coded_by_8_bits_or_exactly() -> None:
    # Steps of the second group take more bits than affine, and lose more.
    made = curve()
    made.groups[1].bits_per_token[:] = [9000.0, 9500.0, 9900.0]
    ladder = make_ladder(made)
    plan = solve(make_problem(ladder, [holder("a", (0, 8))], 0.004))
    chosen = [ladder.choices[column] for column in plan.choice[0]]
    assert chosen[0].codec == "ferry"
    assert chosen[1] == AFFINE
    nothing = solve(make_problem(ladder, [holder("a", (0, 8))], 0.0))
    assert [ladder.choices[column] for column in nothing.choice[0]] == [EXACT, EXACT]
    assert nothing.kl == 0


def test_parts_of_groups_cost_their_share() -> None:
    ladder = make_ladder(curve(heads=4))
    holders = [
        holder("a", (0, 6), heads=(0, 4)),
        holder("b", (6, 8), heads=(0, 1)),
        holder("c", (6, 8), heads=(1, 4)),
    ]
    problem = make_problem(ladder, holders, 0.01)
    assert problem.share.tolist() == [[1.0, 0.5], [0.0, 0.125], [0.0, 0.375]]
    assert kept(solve(problem))


def test_latency_and_decoding_count_as_much_as_bytes() -> None:
    ladder = make_ladder(curve())
    late = [holder("a", (0, 4), 10 * MB, latency_s=0.4), holder("b", (4, 8), 10 * MB)]
    plan = solve(make_problem(ladder, late, 0.01))
    assert plan.bits[0] < plan.bits[1]
    slow = [holder("a", (0, 4), 10 * MB, decode=8000), holder("b", (4, 8), 10 * MB, decode=1e6)]
    assert solve(make_problem(ladder, slow, 0.01)).bits[0] < plan.bits[1]
    # Nobody has measured how fast the second decodes: as the first, for what it holds.
    unknown = [slow[0], holder("b", (4, 6), 10 * MB)]
    waits = make_problem(ladder, unknown, 0.01).waits
    assert waits.tolist() == pytest.approx([4096 / 8000, 4096 / 16000])


def test_a_codec_is_judged_by_what_it_takes_this_node_to_decode() -> None:
    made = curve()
    made.groups[1].bits_per_token[:] = [9000.0, 9500.0, 9900.0]  # 8 bits are less, and better
    ladder = make_ladder(made)
    slow = holder("a", (0, 8), GB, decode=1e6, codecs={"ferry": 1e6, "affine": 1e9, "zstd": 1e8})
    problem = make_problem(ladder, [slow], 0.02)
    plan = solve(problem)
    chosen = [ladder.choices[column].codec for column in plan.choice[0]]
    assert chosen == ["ferry", "affine"]
    carried = 4096 * plan.bits[0] / 8 / GB
    assert plan.deadline == pytest.approx(carried + 4096 * (1000 / 1e6 + 1000 / 1e9))
    # 8 bits would be here a hundred times sooner, and are larger all the same.
    assert plan.bits[0] < 10_000
    # Without a rate of its own a codec takes what all take together, or what others see.
    both = [replace(slow, decode_values_per_s=()), holder("b", (4, 8), GB)]
    assert not make_problem(ladder, both, 0.02).decode.size


def test_a_link_that_nobody_measured_is_taken_to_be_as_the_others() -> None:
    ladder = make_ladder(curve())
    holders = [holder("a", (0, 4), 8 * MB), holder("b", (4, 8), 0.0)]
    problem = make_problem(ladder, holders, 0.01)
    assert problem.bandwidth.tolist() == [64 * MB, 64 * MB]


def test_what_was_measured_scales_what_was_predicted() -> None:
    # The model lost twice of what its groups' predictions add up to.
    predicted, measured = make_ladder(curve()), make_ladder(curve(measured=[0.08, 0.024, 0.006]))
    ferry = [at for at, choice in enumerate(predicted.choices) if choice.codec == "ferry"]
    np.testing.assert_allclose(measured.kl[:, ferry], 2 * predicted.kl[:, ferry], rtol=1e-9)


def test_steps_lie_on_one_ladder_within_what_was_measured() -> None:
    ladder = make_ladder(curve())
    steps = [float(dict(c.options)["step"]) for c in ladder.choices if c.codec == "ferry"]
    assert steps == sorted(steps, reverse=True)
    assert max(steps) <= 0.004  # coarser was not measured
    assert min(steps) >= 0.001 / 4
    assert set(steps) <= {ferry_step(rung) for rung in range(-120, 0)}
    finest, coarsest = ladder.kl[0, len(steps) - 1], ladder.kl[0, 0]
    assert finest < 0.0015 < coarsest <= 0.02
    # Beyond what was measured: a bit for each halving of the step, and a quarter of the KL.
    assert finest == pytest.approx(0.0015 * (min(steps) / 0.001) ** 2)
    more = 1000 * np.log2(0.001 / min(steps))
    assert ladder.bits[0, len(steps) - 1] == pytest.approx(900 + more)
    assert ladder.index[Choice("zstd")] == len(ladder.choices) - 1


def test_one_step_for_all_is_the_coarsest_within_the_budget_also_between_rungs() -> None:
    for budget in (1e-7, 0.003, 0.011, 0.0399):
        ladder = make_ladder(curve(), budget)
        assert ladder.kl[:, ladder.alike].sum() == pytest.approx(budget, rel=1e-6)
        assert ladder.choices[ladder.alike] not in ladder.index
    # No coarser than was measured; 2 groups of 0.02 nats.
    assert make_ladder(curve(), 0.5).kl[:, -1].sum() == pytest.approx(0.04)


@pytest.mark.parametrize("points", [1, 2])
def test_a_curve_of_one_or_two_points_will_do(points: int) -> None:
    made = curve()
    del made.steps[points:]
    for group in made.groups:
        del group.bits_per_token[points:], group.kl[points:]
    assert kept(solve(make_problem(make_ladder(made), [holder("a", (0, 8))], 0.005)))
